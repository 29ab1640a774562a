# Generated from notebooks/01_decay.ipynb; edit the notebook, not this file.
"""Decay."""

import math
import sys
import warnings

import torch
import torch.nn.functional as F

__all__ = [
    "propagator",
    "half_life",
    "window",
    "damping_ratio",
    "quality_factor",
    "check_floor",
    "decay_rate",
    "spread_half_lives",
    "decay_bias",
    "DecayPotential",
    "OVERDAMPED",
    "OverdampedWarning",
    "THROUGH",
    "warn_caller",
    "warn_overdamped",
]


# %% notebooks/01_decay.ipynb#propagator
def propagator(potential, gamma, dt=1.0):
    """What a free memory is multiplied by over a time step: equation (eq-propagator).

    Args:
        potential: V, real frequency, any shape, rad / time.
        gamma: Γ, decay rate, broadcastable to `potential`, 1 / time.
        dt: length of the step, time (default 1: time is counted in tokens).

    Returns:
        e^{−iV dt} e^{−Γ dt}, complex, of the broadcast shape.
    """
    potential, gamma = torch.broadcast_tensors(torch.as_tensor(potential), torch.as_tensor(gamma))
    wide = torch.promote_types(torch.result_type(potential, gamma), torch.float32)
    potential, gamma = potential.to(wide), gamma.to(wide)
    # not torch.polar, whose gradient is NaN where e^{−Γ dt} is next to nothing
    return torch.exp(torch.complex(-gamma * dt, -potential * dt))


# %% notebooks/01_decay.ipynb#half-life
def half_life(gamma):
    """Time until half of a memory's amplitude is left: equation (eq-half-life), ln 2 / Γ.

    Args:
        gamma: Γ > 0, a float or a tensor of any shape, 1 / time.

    Returns:
        Half-life in units of time, of the shape of `gamma`.
    """
    return math.log(2) / gamma


def window(gamma):
    """Amplitude a memory written at every instant holds in all: equation (eq-half-life), 1 / Γ.

    Args:
        gamma: Γ > 0, a float or a tensor of any shape, 1 / time.

    Returns:
        Window in units of time, of the shape of `gamma`.
    """
    return 1 / gamma


# %% notebooks/01_decay.ipynb#quality
def damping_ratio(gamma, potential):
    """Decay against rotation: equation (eq-quality), ζ = Γ / |V|.

    Args:
        gamma: Γ, a float or a tensor of any shape, 1 / time.
        potential: V, a float or broadcastable to `gamma`, rad / time.

    Returns:
        ζ, dimensionless: below 1 underdamped, 1 critical, above 1 overdamped.
    """
    return gamma / abs(potential)


def quality_factor(gamma, potential):
    """Rotation against decay: equation (eq-quality), Q = |V| / 2Γ.

    Args:
        gamma: Γ, a float or a tensor of any shape, 1 / time.
        potential: V, a float or broadcastable to `gamma`, rad / time.

    Returns:
        Q, dimensionless: 1/2 at the critical point.
    """
    return abs(potential) / (2 * gamma)


# %% notebooks/01_decay.ipynb#decay-rate
def check_floor(base_decay):
    """Refuse a floor of Γ that is not positive with a ValueError."""
    if not base_decay > 0:
        raise ValueError(f"base_decay must be positive, got {base_decay}")


def decay_rate(raw, base_decay):
    """Positive decay rate from an unconstrained number: equation (eq-rate).

    Args:
        raw: any real tensor.
        base_decay: Γ_0 > 0, the floor, 1 / time.

    Returns:
        Γ ≥ base_decay, above it but for rounding, of the shape of `raw`, 1 / time.

    Raises:
        ValueError: base_decay is not positive.
    """
    check_floor(base_decay)
    return base_decay + F.softplus(raw)


# %% notebooks/01_decay.ipynb#spread
def spread_half_lives(n_heads, base_decay, shortest=4.0, longest=2048.0):
    """Half-lives of the heads at initialization: equation (eq-spread), even in the logarithm.

    Args:
        n_heads: H.
        base_decay: Γ_0, 1 / time; no half-life is above half of what it allows; 0 allows any.
        shortest, longest: ends of the range, time.

    Returns:
        (H,) half-lives, ascending, time.
    """
    spread = torch.logspace(math.log10(shortest), math.log10(longest), n_heads)
    return spread.clamp(max=half_life(base_decay) / 2) if base_decay else spread


def decay_bias(half_lives, base_decay):
    """The bias b_Γ at which :func:`decay_rate` gives these half-lives: equation (eq-spread).

    Args:
        half_lives: (H,), time, each below ln 2 / base_decay.
        base_decay: Γ_0, 1 / time.

    Returns:
        (H,) bias.
    """
    wanted = math.log(2) / half_lives - base_decay
    return wanted + torch.log(-torch.expm1(-wanted))  # of a large rate too: e^wanted would overflow


# %% notebooks/01_decay.ipynb#potential
class DecayPotential(torch.nn.Module):
    """V and Γ of every head from the token at hand: equation (eq-rate).

    At initialization the half-lives are spread (:func:`spread_half_lives`) and V is the rate of the
    wanted half-life: ζ is 1, or above it where `base_decay` cuts the half-life short. Both then
    follow the data.

    Args:
        d_model: width of the input.
        n_heads: H.
        base_decay: floor Γ_0 of the decay rate, 1 / time.
        dt: time between two tokens; the half-lives are spread in tokens.

    Raises:
        ValueError: base_decay is not positive.
    """

    def __init__(self, d_model, n_heads, base_decay, dt=1.0):
        super().__init__()
        check_floor(base_decay)
        self.base_decay = base_decay
        self.linear = torch.nn.Linear(d_model, 2 * n_heads)
        half_lives = spread_half_lives(n_heads, base_decay * dt) * dt
        frequencies = math.log(2) / (spread_half_lives(n_heads, 0) * dt)
        turns = frequencies / (math.log(2) / half_lives - base_decay)  # b_V
        with torch.no_grad():
            self.linear.weight.normal_(std=0.1 / math.sqrt(d_model))
            self.linear.bias.copy_(torch.cat((turns, decay_bias(half_lives, base_decay))))

    def forward(self, x):
        """x (B, N, d_model) -> V (rad / time) and Γ (1 / time), each (B, N, H)."""
        turns, raw = self.linear(x).chunk(2, dim=-1)
        wide = torch.promote_types(raw.dtype, torch.float32)
        above = F.softplus(raw.to(wide))  # Γ − Γ_0, with all its digits
        return turns.to(wide) * above, self.base_decay + above


# %% notebooks/01_decay.ipynb#warn
OVERDAMPED = 10.0  # Γ/|V| above which a memory cannot be said to turn at all


class OverdampedWarning(UserWarning):
    """The memory forgets much faster than it turns."""


THROUGH = ("phase2", "torch", "accelerate", "huggingface_hub")  # whose lines are not the caller's


def warn_caller(message, category):
    """Warn where this package was called from, of every model anew.

    `warnings.warn` would name a line of the package, and be silent the second time in a process.
    """
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in THROUGH:
        frame = frame.f_back
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno)


# %% notebooks/01_decay.ipynb#warn-overdamped
def warn_overdamped(gamma, potential):
    """Warn when a memory forgets before it has turned: mean Γ / mean |V| above 10.

    Args:
        gamma: Γ, any shape, 1 / time.
        potential: V, any shape, rad / time.

    Returns:
        True if it warned (:class:`OverdampedWarning`).
    """
    ratio = damping_ratio(gamma.mean(), potential.abs().mean()).item()
    if ratio > OVERDAMPED:
        warn_caller(
            f"Overdamped system detected: Γ/|V| = {ratio:.2f}, above {OVERDAMPED:g}. "
            "Lower base_decay (or gamma_adjust_rate, if the controller adds to Γ), or the learning "
            "rate of the optimizer if training has led here.",
            OverdampedWarning,
        )
    return ratio > OVERDAMPED
