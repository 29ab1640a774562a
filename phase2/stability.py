# Generated from notebooks/05_stability.ipynb; edit the notebook, not this file.
"""Stability."""

import torch

from phase2.decay import warn_caller
from phase2.memory import decays

__all__ = [
    "energy",
    "running_bound",
    "restart",
    "iss_bound",
    "RESOLUTION",
    "coherence",
    "DRIVEN",
    "SATURATED",
    "controller",
    "stability_metrics",
    "RISE",
    "violated",
    "StabilityWarning",
    "warn_unstable",
]


# %% notebooks/05_stability.ipynb#energy
def energy(fast_weights):
    """Energy of a memory, the square of its size: equation (eq-memory-energy), E = ‖W‖².

    Args:
        fast_weights: W, (B, H, D, D).

    Returns:
        E, (B, H), in float32 or wider.
    """
    wide = torch.promote_types(fast_weights.dtype, torch.float32)
    # E = Σ_ij W_ij²
    return fast_weights.to(wide).square().sum((-2, -1))  # (B, H)


# %% notebooks/05_stability.ipynb#bound
def running_bound(bound, incoherent, strength, gamma, dt=1.0):
    """Follow b and a of equation (eq-running-bound) over a stretch of tokens, without a loop.

    b is the largest size the memory can have; a is the energy it has if its writes are unrelated.
    Both may be started from any memory W, as ‖W‖ and ‖W‖²: see :func:`restart`.

    Args:
        bound, incoherent: b and a before the stretch, (B, H).
        strength: s = η ‖k‖ ‖v‖ of each write, (B, T, H).
        gamma: Γ, (B, T, H), 1 / time.
        dt: time between two tokens.

    Returns:
        b and a after the stretch, (B, H).
    """
    decay = decays(gamma, dt)  # (B, T, H)
    # Σ_{i>t} Γ_i dt, summed from the end: exact for the latest writes, which weigh most
    remaining = decay.flip(1).cumsum(1).flip(1) - decay  # (B, T, H)
    left = strength * torch.exp(-remaining)  # x_i, (B, T, H)
    kept = torch.exp(-decay.sum(1))  # (B, H)
    # b = e^{−Σ Γ dt} b_0 + Σ x_i,  a = e^{−2 Σ Γ dt} a_0 + Σ x_i²
    return kept * bound + left.sum(1), kept.square() * incoherent + left.square().sum(1)


def restart(fast_weights):
    """b and a of equation (eq-running-bound) for a memory just looked at: ‖W‖ and ‖W‖².

    Args:
        fast_weights: W, (B, H, D, D).

    Returns:
        b and a, (B, H), with finite gradients for an empty memory too.
    """
    wide = torch.promote_types(fast_weights.dtype, torch.float32)
    size = torch.linalg.vector_norm(fast_weights.to(wide), dim=(-2, -1))  # (B, H)
    return size, size.square()


# %% notebooks/05_stability.ipynb#iss
def iss_bound(time, size, gamma_min, strength_max, dt=1.0):
    """Ceiling of ‖W‖ from the slowest decay and the strongest write alone: equation (eq-iss).

    Args:
        time: t dt, time since the memory had the size `size`; a float or a tensor.
        size: ‖W_0‖.
        gamma_min: smallest Γ > 0, 1 / time.
        strength_max: largest s = η ‖k‖ ‖v‖.
        dt: time between two tokens.

    Returns:
        e^{−Γ_min t dt} ‖W_0‖ + s_max / (1 − e^{−Γ_min dt}), of the shape that the
        arguments broadcast to.
    """
    gamma_min = torch.as_tensor(gamma_min)
    return torch.exp(-gamma_min * time) * size - strength_max / torch.expm1(-gamma_min * dt)


# %% notebooks/05_stability.ipynb#coherence
RESOLUTION = 1e-4  # differences of b² and a below this share of b² are rounding


def coherence(energy, bound, incoherent):
    """Mean cosine between the writes of a memory: equation (eq-coherence).

    Args:
        energy: E, (B, H).
        bound, incoherent: b and a from :func:`running_bound`, (B, H).

    Returns:
        c in [0, 1], (B, H): 0 for unrelated writes, 1 if all are alike. A memory of one write, or
        none, has 0.
    """
    tiny = torch.finfo(energy.dtype).tiny  # an empty memory is 0 / 0
    # c = (E − a) / (b² − a)
    pairs = (1 + RESOLUTION) * bound.square() - incoherent
    return ((energy - incoherent) / (pairs + tiny)).clamp(0, 1)


# %% notebooks/05_stability.ipynb#controller
DRIVEN = 0.5  # coherence at which the controller starts to act
SATURATED = 0.75  # and at which it gives all it has


def controller(coherence, gamma_adjust_rate):
    """Decay rate to add over the next stretch: equation (eq-controller).

    Args:
        coherence: c of the last stretch, (B, H).
        gamma_adjust_rate: g ≥ 0, the most that is added, 1 / time.

    Returns:
        Addition to Γ, between 0 and g, (B, H), 1 / time.
    """
    effort = (coherence - DRIVEN) / (SATURATED - DRIVEN)
    return gamma_adjust_rate * effort.clamp(0, 1)


# %% notebooks/05_stability.ipynb#metrics
def stability_metrics(energy, last_energy, elapsed, bound, coherence, gamma_shift):
    """The state of stability in plain numbers: equation (eq-monitor).

    Args:
        energy, last_energy: E now, and as the last look left it, (B, H).
        elapsed: Δt > 0, time since the last look; a float or a tensor broadcastable to (B, H).
        bound: b now, (B, H).
        coherence: c, (B, H).
        gamma_shift: what the controller adds to Γ, (B, H), 1 / time.

    Returns:
        Floats. Means over batch and heads: `energy`, `dE_dt` (1 / time), `bound`, `gamma_shift`
        (1 / time) and `stable_ratio`, the share with dE_dt ≤ 0. The worst of batch and heads:
        `margin` (smallest) and `coherence` (largest).
    """
    slope = (energy - last_energy) / elapsed
    tiny = torch.finfo(energy.dtype).tiny  # an empty memory has its whole margin left
    margin = 1 - energy.sqrt() / (bound + tiny)
    metrics = {
        "energy": energy.mean(),
        "dE_dt": slope.mean(),
        "bound": bound.mean(),
        "margin": margin.min(),
        "coherence": coherence.max(),
        "gamma_shift": gamma_shift.mean(),
        "stable_ratio": (slope <= 0).to(energy.dtype).mean(),
    }
    numbers = torch.stack([x.detach().to(energy.dtype) for x in metrics.values()])
    return dict(zip(metrics, numbers.tolist()))  # one transfer, not seven


# %% notebooks/05_stability.ipynb#violated
RISE = 1.25  # energy over the last one, above which it is said to rise


def violated(energy, last_energy, coherence, last_coherence):
    """Memories that rise although the controller does what it can: equation (eq-violated).

    Args:
        energy, coherence: E and c at the end of a stretch, (B, H).
        last_energy, last_coherence: E as the last look left it, and c of the stretch before that
            look; both zero if there was none.

    Returns:
        Boolean (B, H).
    """
    driven = torch.minimum(coherence, last_coherence) >= SATURATED
    return driven & (energy > RISE * last_energy) | ~torch.isfinite(energy)


# %% notebooks/05_stability.ipynb#warn
class StabilityWarning(UserWarning):
    """The energy of a memory rises although the controller does what it can."""


def warn_unstable(unstable, energy, gamma_adjust_rate):
    """Warn of memories found :func:`violated`, equation (eq-violated), and say what helps.

    Args:
        unstable: boolean (B, H).
        energy: E, (B, H).
        gamma_adjust_rate: g, for the message.

    Returns:
        True if it warned (:class:`StabilityWarning`).
    """
    count = int(unstable.sum())
    if count:
        finite = bool(torch.isfinite(energy).all())
        found = "rises, their writes all push one way" if finite else "is not finite"
        cure = (
            f"Raise gamma_adjust_rate (now {gamma_adjust_rate:g}) or lower" if finite else "Lower"
        )
        warn_caller(
            f"Lyapunov stability violated: the energy of {count} of {unstable.numel()} memories "
            f"{found}. {cure} the learning rate of the optimizer.",
            StabilityWarning,
        )
    return count > 0
