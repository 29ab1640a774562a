# Generated from notebooks/04_resonance.ipynb; edit the notebook, not this file.
"""Resonance."""

import math

import torch

__all__ = [
    "lorentzian",
    "discrete_response",
    "in_basis",
    "without_rounding",
    "diag_energy",
    "ZETA_ZEROS",
    "zeta_zeros",
    "smooth_count",
    "tones",
    "orthonormalize",
    "BASES",
    "MAX_ZETA_DIM",
    "resonance_basis",
    "safe_ratio",
    "resonance_mask",
    "mode_gate",
    "resonate",
    "resonance_info",
]


# %% notebooks/04_resonance.ipynb#responses
def lorentzian(omega, potential, gamma):
    """Energy of a memory written while its key turns, in continuous time: equation (eq-lorentzian).

    Args:
        omega: ω, frequency of the writing, tensor of any shape, rad / time.
        potential: V, broadcastable to `omega`, rad / time.
        gamma: Γ > 0, broadcastable to `omega`, 1 / time.

    Returns:
        ‖W‖² for writes of unit rate, time²; the peak, 1 / Γ², is at ω = V and 2Γ wide.
    """
    return 1 / ((omega - potential) ** 2 + gamma**2)


def discrete_response(omega, potential, gamma, dt=1.0):
    """The same for a memory written once every `dt`: equation (eq-discrete-response), exact.

    Args:
        omega: ω, frequency of the writing, tensor of any shape, rad / time.
        potential: V, broadcastable to `omega`, rad / time.
        gamma: Γ > 0, broadcastable to `omega`, 1 / time.
        dt: time between two writes, each of strength η = dt (default 1: time is counted in tokens).

    Returns:
        ‖W‖² in the steady state, time²; periodic in ω with period 2π / dt.
    """
    omega = torch.as_tensor(omega)
    omega = omega.to(torch.promote_types(omega.dtype, torch.float32))
    decay, angle = torch.as_tensor(gamma, dtype=omega.dtype) * dt, (omega - potential) * dt
    # 1 − 2 e^{−Γ dt} cos(…) + e^{−2Γ dt}, without its cancellation at the peak of a slow memory
    return dt**2 / (torch.expm1(-decay) ** 2 + 4 * torch.exp(-decay) * torch.sin(angle / 2) ** 2)


# %% notebooks/04_resonance.ipynb#modes
def in_basis(fast_weights, basis):
    """The memory in a fixed basis, Ŵ = Uᵀ W U: equation (eq-modes).

    Args:
        fast_weights: W, (..., D, D), [key index, value index].
        basis: U, orthonormal columns, (D, D).

    Returns:
        Ŵ, (..., D, D), [key mode, value mode], in float32 or float64.
    """
    dtype = torch.promote_types(fast_weights.dtype, torch.float32)
    basis = basis.to(fast_weights.device, dtype)
    with torch.autocast(fast_weights.device.type, enabled=False):
        return basis.mT @ fast_weights.to(dtype) @ basis


def without_rounding(energy, size):
    """Energies (…, D) of modes, 0 where they are but rounding of a memory with ‖W‖ = size, (…)."""
    return energy * (energy > 64 * torch.finfo(energy.dtype).eps * size[..., None])


def diag_energy(fast_weights, basis):
    """How strongly each mode answers to itself, e_j = abs(Ŵ_jj): equation (eq-modes).

    Args:
        fast_weights: W, (B, H, D, D).
        basis: U, orthonormal columns, (D, D).

    Returns:
        e, (B, H, D), in the unit of W; 0 where it is but rounding.
    """
    weights = fast_weights.to(torch.promote_types(fast_weights.dtype, torch.float32))
    basis = basis.to(weights)
    with torch.autocast(weights.device.type, enabled=False):
        # Ŵ_jj = Σ_i U_ij (W U)_ij: the rest of Ŵ is not needed, and one product is half of two
        found = ((weights @ basis) * basis).sum(-2).abs()
    size = torch.linalg.vector_norm(weights.detach(), dim=(-2, -1), dtype=torch.float64)
    return without_rounding(found, size)


# %% notebooks/04_resonance.ipynb#zeros-table
# Ordinates of the first 256 zeros of ζ on the critical line, to nine digits.
ZETA_ZEROS = """
14.1347251 21.0220396 25.0108576 30.4248761 32.9350616 37.5861782 40.9187190 43.3270733 48.0051509
49.7738325 52.9703215 56.4462477 59.3470440 60.8317785 65.1125440 67.0798105 69.5464017 72.0671577
75.7046907 77.1448401 79.3373750 82.9103809 84.7354930 87.4252746 88.8091112 92.4918993 94.6513440
95.8706342 98.8311942 101.317851 103.725538 105.446623 107.168611 111.029536 111.874659 114.320221
116.226680 118.790783 121.370125 122.946829 124.256819 127.516684 129.578704 131.087689 133.497737
134.756510 138.116042 139.736209 141.123707 143.111846 146.000982 147.422765 150.053520 150.925258
153.024694 156.112909 157.597592 158.849988 161.188964 163.030710 165.537069 167.184440 169.094515
169.911976 173.411537 174.754192 176.441434 178.377408 179.916484 182.207078 184.874468 185.598784
187.228923 189.416159 192.026656 193.079727 195.265397 196.876482 198.015310 201.264752 202.493595
204.189672 205.394697 207.906259 209.576510 211.690863 213.347919 214.547045 216.169539 219.067596
220.714919 221.430706 224.007000 224.983325 227.421444 229.337413 231.250189 231.987235 233.693404
236.524230 237.769820 239.555478 241.049158 242.823272 244.070898 247.136990 248.101990 249.573690
251.014948 253.069987 255.306256 256.380714 258.610439 259.874407 260.805085 263.573894 265.557852
266.614974 267.921915 269.970449 271.494056 273.459609 275.587493 276.452050 278.250744 279.229251
282.465115 283.211186 284.835964 286.667445 287.911921 289.579855 291.846291 293.558434 294.965370
295.573255 297.979277 299.840326 301.649325 302.696750 304.864371 305.728913 307.219496 310.109463
311.165142 312.427801 313.985286 315.475616 317.734806 318.853104 321.160134 322.144559 323.466970
324.862866 327.443901 329.033072 329.953240 331.474468 333.645379 334.211355 336.841850 338.339993
339.858217 341.042261 342.054878 344.661703 346.347871 347.272678 349.316261 350.408419 351.878649
353.488900 356.017575 357.151302 357.952685 359.743755 361.289362 363.331331 364.736024 366.212710
367.993575 368.968438 370.050919 373.061928 373.864874 375.825913 376.324092 378.436680 379.872975
381.484469 383.443529 384.956117 385.861301 387.222890 388.846128 391.456084 392.245083 393.427744
395.582870 396.381854 397.918736 399.985120 401.839229 402.861918 404.236442 405.134387 407.581460
408.947246 410.513869 411.972268 413.262736 415.018810 415.455215 418.387706 419.861365 420.643828
422.076710 423.716580 425.069882 427.208825 428.127914 430.328745 431.301307 432.138642 433.889218
436.161006 437.581698 438.621739 439.918442 441.683199 442.904546 444.319336 446.860623 447.441704
449.148546 450.126946 451.403308 453.986738 454.974684 456.328427 457.903893 459.513415 460.087944
462.065367 464.057287 465.671539 466.570287 467.439046 469.536005 470.773655 472.799175 473.835232
475.600339 476.769015 478.075264 478.942182
"""


# %% notebooks/04_resonance.ipynb#zeros
def zeta_zeros(count):
    """The first zeros of the zeta function on the critical line: equation (eq-zeros).

    Args:
        count: how many, from 1 to 256.

    Returns:
        γ_1 … γ_count to nine digits, float64 (count,).

    Raises:
        ValueError: `count` is beyond the table.
    """
    zeros = [float(zero) for zero in ZETA_ZEROS.split()]
    if not 0 < count <= len(zeros):
        raise ValueError(f"count must be from 1 to {len(zeros)}, the zeros tabulated, got {count}")
    return torch.tensor(zeros[:count], dtype=torch.float64)


# %% notebooks/04_resonance.ipynb#count
def smooth_count(height):
    """Number of zeta zeros expected below a height: equation (eq-smooth-count).

    Args:
        height: T > 0, tensor of any shape.

    Returns:
        N̄(T), of the shape of `height`; close to n − 1/2 at the n-th zero.
    """
    return height / (2 * math.pi) * torch.log(height / (2 * math.pi * math.e)) + 7 / 8


# %% notebooks/04_resonance.ipynb#tones
def tones(frequencies, dim):
    """A cosine and a sine for each frequency, sampled at the entries of a key: equation (eq-tones).

    Args:
        frequencies: ν, full turns over `dim` entries, (F,).
        dim: D, number of entries.

    Returns:
        (D, 2F), columns cos ν_0, sin ν_0, cos ν_1, …, in the dtype of `frequencies`. They are
        orthonormal for ν = 1/2, 3/2, …, and nearly dependent if two ν are much closer than 1.
    """
    entry = torch.arange(dim, dtype=frequencies.dtype, device=frequencies.device)
    angle = 2 * math.pi / dim * torch.outer(entry, frequencies)  # (D, F)
    return math.sqrt(2 / dim) * torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(-2)


# %% notebooks/04_resonance.ipynb#orthonormalize
def orthonormalize(matrix):
    """The orthonormal matrix closest to a square one, M (MᵀM)^{-1/2}: equation (eq-lowdin).

    Args:
        matrix: M, invertible, (D, D).

    Returns:
        U with UᵀU = 1, (D, D). It does not depend on the order of the columns.
    """
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


# %% notebooks/04_resonance.ipynb#basis
BASES = ("zeta", "fourier", "random", "identity")
MAX_ZETA_DIM = 512  # two columns for each of the zeros tabulated


def resonance_basis(kind, dim, dtype=torch.float32):
    """A fixed orthonormal basis for the modes of a memory: equations (eq-tones) and (eq-lowdin).

    Args:
        kind: "zeta" (tones at the unfolded zeta zeros, orthonormalized), "fourier" (evenly spaced
            tones), "random" (a random rotation, always the same one) or "identity".
        dim: D, even and at least 2; at most 512 for "zeta".
        dtype: of the result; computed in float64.

    Returns:
        U, (D, D), orthonormal columns.

    Raises:
        ValueError: another kind or dim.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, got {dim}")
    if kind == "zeta":
        if dim > MAX_ZETA_DIM:
            raise ValueError(f"dim must be at most {MAX_ZETA_DIM} for kind 'zeta', got {dim}")
        basis = orthonormalize(tones(smooth_count(zeta_zeros(dim // 2)), dim))
    elif kind == "fourier":
        basis = tones(torch.arange(dim // 2, dtype=torch.float64) + 0.5, dim)
    elif kind == "random":
        generator = torch.Generator().manual_seed(0)
        options = {"dtype": torch.float64, "generator": generator, "device": "cpu"}
        basis = orthonormalize(torch.randn(dim, dim, **options))
    elif kind == "identity":
        basis = torch.eye(dim, dtype=torch.float64)
    else:
        raise ValueError(f"kind must be one of {', '.join(BASES)}, got {kind!r}")
    return basis.to(dtype)


# %% notebooks/04_resonance.ipynb#mask
def safe_ratio(numerator, denominator):
    """Quotient of two tensors, and 1 where the denominator is 0; gradients are finite there."""
    empty = denominator == 0
    return torch.where(empty, 1.0, numerator / torch.where(empty, 1.0, denominator))


def resonance_mask(energy, threshold=1.0):
    """Which modes resonate, softly and relative to the mean energy: equation (eq-mask).

    Args:
        energy: e ≥ 0, from :func:`diag_energy`, (..., D).
        threshold: θ > 0, the energy at which the mask is 1/2, in units of the mean (default 1).

    Returns:
        m, (..., D), from 0 (silent) to 1 (resonating), unchanged if all energies are scaled.

    Raises:
        ValueError: `threshold` is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    wide = energy.double()  # squares of energies of any size
    relative = safe_ratio(wide, wide.mean(-1, keepdim=True)).square()  # r²
    return (relative / (relative + threshold**2)).to(energy.dtype)


# %% notebooks/04_resonance.ipynb#resonate
@torch.no_grad()
def mode_gate(modes, strength, threshold=1.0):
    """What equation (eq-resonate) multiplies Ŵ by: c g gᵀ.

    Args:
        modes: Ŵ, (…, D, D), float32 or wider.
        strength, threshold: λ and θ, as for :func:`resonate`.

    Returns:
        c g gᵀ, (…, D, D).

    Raises:
        ValueError: `strength` or `threshold` is out of range.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, got {strength}")
    options = {"dim": (-2, -1), "dtype": torch.float64}  # of modes of any size
    size = torch.linalg.vector_norm(modes, **options)
    energy = without_rounding(modes.diagonal(dim1=-2, dim2=-1).abs(), size)
    gate = 1 - strength * (1 - resonance_mask(energy, threshold))  # g, (…, D)
    gate = gate[..., :, None] * gate[..., None, :]
    scale = safe_ratio(size, torch.linalg.vector_norm(modes * gate, **options))  # c
    return scale.to(gate.dtype)[..., None, None] * gate


# %% notebooks/04_resonance.ipynb#resonate-function
def resonate(fast_weights, basis, strength=0.01, threshold=1.0):
    """Turn down the modes that do not resonate, keep the norm: equation (eq-resonate).

    Args:
        fast_weights: W, (B, H, D, D).
        basis: U, orthonormal columns, (D, D), from :func:`resonance_basis`.
        strength: λ, the largest share taken from a mode on either side, 0 ≤ λ ≤ 1 (default 0.01).
        threshold: θ of :func:`resonance_mask`.

    Returns:
        W' of the shape, dtype and Frobenius norm of `fast_weights`. Scaling W scales W'. The
        gradient is that for given g and c: they are measured, not learned.

    Raises:
        ValueError: `strength` or `threshold` is out of range.
    """
    # products in half precision would not keep the norm
    with torch.autocast(fast_weights.device.type, enabled=False):
        modes = in_basis(fast_weights, basis)
        basis = basis.to(modes)
        gated = modes * mode_gate(modes, strength, threshold)
        return (basis @ gated @ basis.mT).to(fast_weights.dtype)


# %% notebooks/04_resonance.ipynb#info
def resonance_info(fast_weights, basis, threshold=1.0):
    """What resonates in a memory, for inspection: equations (eq-modes) and (eq-mask).

    Args:
        fast_weights: W, (B, H, D, D).
        basis: U, orthonormal columns, (D, D).
        threshold: θ of :func:`resonance_mask`.

    Returns:
        dict with `diag_energy` and `mask`, (B, H, D), and `resonant_share`, a float: the share of
        modes with more than θ times the mean energy of their memory. All without gradient.
    """
    energy = diag_energy(fast_weights.detach(), basis)
    mask = resonance_mask(energy, threshold)
    share = (mask > 0.5).float().mean().item()
    return {"diag_energy": energy, "mask": mask, "resonant_share": share}
