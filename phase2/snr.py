# Generated from notebooks/03_snr.ipynb; edit the notebook, not this file.
"""SNR selection."""

import math

import torch

__all__ = [
    "noise_edge",
    "RIDGE",
    "TINY",
    "lift",
    "noise_energy",
    "check_matrices",
    "gram_matrix",
    "noise_scale",
    "rejected",
    "selection",
    "select",
    "snr_stats",
]


# %% notebooks/03_snr.ipynb#noise-edge
def noise_edge(sigma, d_k, d_v):
    """Largest singular value of pure noise: equation (eq-noise-edge), σ (√d_k + √d_v).

    Args:
        sigma: standard deviation of an element, a float or a tensor of any shape.
        d_k, d_v: number of rows and of columns.

    Returns:
        The edge, of the shape of `sigma`.
    """
    return sigma * (math.sqrt(d_k) + math.sqrt(d_v))


# %% notebooks/03_snr.ipynb#resolvent
# of the mean mode energy: far above rounding, far below the noise unless few modes hold nearly all
RIDGE = 1e-4
TINY = 1e-280  # keeps an empty memory invertible


def lift(matrices, shift):
    """Add shift I to matrices, in place: (…, D, D) and (…) -> (…, D, D)."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    return matrices


def noise_energy(gram):
    """Mean energy σ² D of a mode of the noise: equation (eq-noise-scale).

    Args:
        gram: W Wᵀ, (…, D, D).

    Returns:
        σ² D, (…); above zero also for an empty memory.
    """
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    # no error, and no wait for the device
    factor = torch.linalg.cholesky_ex(lift(gram.clone(), RIDGE * mean + TINY)).L
    # σ² D = exp(1 + ln det(W Wᵀ) / D), and the determinant is that of L squared
    return torch.exp(1 + 2 * factor.diagonal(dim1=-2, dim2=-1).log().mean(-1))


# %% notebooks/03_snr.ipynb#noise-scale
def check_matrices(name, matrices):
    """Refuse what is not a stack of memories.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not of shape (B, H, D, D).
    """
    if not torch.is_tensor(matrices) or not matrices.is_floating_point():
        kind = matrices.dtype if torch.is_tensor(matrices) else type(matrices).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if matrices.dim() != 4 or matrices.shape[-1] != matrices.shape[-2] or not matrices.shape[-1]:
        raise ValueError(f"{name} must have shape (B, H, D, D), got {tuple(matrices.shape)}")


def gram_matrix(weights):
    """W Wᵀ of (…, D, D) in float64: rounding would decide the noise of fewer tokens than D."""
    with torch.autocast(weights.device.type, enabled=False):
        wide = weights.double()
        return wide @ wide.mT


@torch.no_grad()
def noise_scale(fast_weights):
    """Noise scale σ of a memory, little disturbed by a few strong modes: equation (eq-noise-scale).

    Args:
        fast_weights: W, (B, H, D, D).

    Returns:
        σ, the standard deviation of an element of the noise, (B, H), float32 or float64.

    Raises:
        TypeError, ValueError: see :func:`check_matrices`.
    """
    check_matrices("fast_weights", fast_weights)
    sigma = (noise_energy(gram_matrix(fast_weights)) / fast_weights.shape[-1]).sqrt()
    return sigma.to(torch.promote_types(fast_weights.dtype, torch.float32))


# %% notebooks/03_snr.ipynb#fade
@torch.no_grad()
def rejected(weights, threshold):
    """What equation (eq-gate) takes from a memory.

    Args:
        weights: W, (…, D, D).
        threshold: θ.

    Returns:
        The noise's σ² D, (…), in float64; a root of what is not selected, R = τ L⁻¹ (…, D, D) with
        Rᵀ R = 1 − G = τ² (W Wᵀ + τ² I)⁻¹, and the selected share of the modes tr G / D, (…), in
        float32 or wider.

    Raises:
        ValueError: a threshold that float64 has no digits for.
    """
    if not 1e-3 <= threshold <= 1e6:  # with less, rounding decides what is empty
        raise ValueError(f"threshold must be from 0.001 to 1e6, got {threshold}")
    gram, dtype = gram_matrix(weights), torch.promote_types(weights.dtype, torch.float32)
    noise = noise_energy(gram)
    tau2 = threshold**2 * noise  # τ² = θ² σ² D
    factor = torch.linalg.cholesky_ex(lift(gram, tau2)).L
    shift = lift(torch.zeros_like(gram), tau2.sqrt())
    root = torch.linalg.solve_triangular(factor, shift, upper=False).to(dtype)  # τ L⁻¹
    return noise, root, 1 - root.square().sum((-2, -1)) / root.shape[-1]


# %% notebooks/03_snr.ipynb#select
def selection(written, threshold, gamma_boost):
    """The fixed matrix 1 − λ (1 − G) of equation (eq-select).

    Args:
        written: W, (…, D, D).
        threshold, gamma_boost: as for :func:`select`.

    Returns:
        The matrix (…, D, D), and the selected share (…), in float32 or wider.

    Raises:
        ValueError: a negative boost; see also :func:`rejected`.
    """
    if not gamma_boost >= 0:
        raise ValueError(f"gamma_boost must be zero or more, got {gamma_boost}")
    _, root, share = rejected(written, threshold)
    with torch.autocast(written.device.type, enabled=False):
        noisy = root.mT @ root  # 1 − G
    # expm1(−β) = −λ
    return lift(math.expm1(-gamma_boost) * noisy, torch.ones_like(share)), share


# %% notebooks/03_snr.ipynb#select-function
def select(written, threshold=2.0, gamma_boost=1.0):
    """Let the modes that do not stand out of the noise fade: equation (eq-select).

    Give it what one stretch has written, equation (eq-written), and not the sum of many stretches.
    The gradient is that for a given filter: it is measured, not learned.

    Args:
        written: W, (B, H, D, D).
        threshold: θ, from 0.001 to 1e6, the SNR that divides signal from noise; 2 is the edge of
            pure noise.
        gamma_boost: β ≥ 0, Γ · time added to a mode that is all noise, dimensionless.

    Returns:
        W′ (B, H, D, D) in the dtype of `written`, and the selected share (B, H), between 0 and 1.

    Raises:
        TypeError, ValueError: see :func:`check_matrices`, :func:`selection` and :func:`rejected`.
    """
    check_matrices("written", written)
    keep, share = selection(written, threshold, gamma_boost)
    with torch.autocast(written.device.type, enabled=False):
        return (keep @ written.to(keep.dtype)).to(written.dtype), share


# %% notebooks/03_snr.ipynb#stats
@torch.no_grad()
def snr_stats(fast_weights, threshold=2.0):
    """How far a memory stands out of its noise: equations (eq-snr) and (eq-gate).

    Args:
        fast_weights: W, (B, H, D, D).
        threshold: θ, see :func:`select`.

    Returns:
        A dictionary of floats: `mean_snr` and `std_snr`, mean and spread of |W_ij| / σ over all
        elements of all memories (pure noise in a wide memory has 0.80 and 0.60, an empty one 0);
        averages over the memories of `selected_share` of the modes (0 to 1) and `noise_scale` σ;
        `threshold`.

    Raises:
        TypeError, ValueError: see :func:`check_matrices` and :func:`rejected`.
    """
    check_matrices("fast_weights", fast_weights)
    noise, _, share = rejected(fast_weights, threshold)
    wide = torch.promote_types(fast_weights.dtype, torch.float32)
    sigma = (noise / fast_weights.shape[-1]).sqrt().to(wide)
    # of an empty memory σ is 0, and so is its SNR
    snr = fast_weights.abs() / sigma.clamp(min=torch.finfo(wide).tiny)[..., None, None]
    return {
        "mean_snr": snr.mean().item(),
        "std_snr": snr.std(correction=0).item(),
        "selected_share": share.mean().item(),
        "noise_scale": sigma.mean().item(),
        "threshold": float(threshold),
    }
