# Generated from notebooks/06_consolidation.ipynb; edit the notebook, not this file.
"""Consolidation."""

from typing import NamedTuple

import torch
from torch import Tensor

from phase2.memory import check_memory, evolve, memory_chunked, memory_step
from phase2.resonance import resonate
from phase2.snr import select
from phase2.stability import coherence, controller, energy, restart, running_bound

__all__ = [
    "MemoryState",
    "empty_memory",
    "consolidate",
    "stretch_lengths",
    "cut",
    "choose",
    "stretch",
    "token",
    "remember",
]


# %% notebooks/06_consolidation.ipynb#state
class MemoryState(NamedTuple):
    """All that one layer's memory carries from token to token.

    Attributes:
        fast_weights: W, (B, H, D, D), [key index, value index].
        earlier: W after the last consolidation, (B, H, D, D).
        faded: ΣΓ dt since then, (B, H).
        turned: ΣV dt since then, (B, H), rad.
        bound: the largest size W can have, (B, H), see :func:`~phase2.stability.running_bound`.
        incoherent: the energy W would have if the writes since the last consolidation were
            unrelated, (B, H).
        energy: ‖W‖² after the last consolidation, (B, H).
        coherence: c of the stretch before the last consolidation, (B, H).
        gamma_shift: what the controller adds to Γ during this stretch, (B, H), 1 / time.
        eta_scale: factor on η during this stretch, (B, H).
        last_key: the previous token's key, at which the next one looks back (chapter 7),
            (B, H, D).
    """

    fast_weights: Tensor
    earlier: Tensor
    faded: Tensor
    turned: Tensor
    bound: Tensor
    incoherent: Tensor
    energy: Tensor
    coherence: Tensor
    gamma_shift: Tensor
    eta_scale: Tensor
    last_key: Tensor


# %% notebooks/06_consolidation.ipynb#empty-memory
def empty_memory(batch, heads, dim, device=None, dtype=torch.float32):
    """The state of a memory in which nothing has been written: B, H, D -> MemoryState."""
    zero = torch.zeros(batch, heads, device=device, dtype=dtype)
    weights = torch.zeros(batch, heads, dim, dim, device=device, dtype=dtype)
    return MemoryState(weights, weights, *[zero] * 7, torch.ones_like(zero), weights[..., 0])


# %% notebooks/06_consolidation.ipynb#consolidate
def consolidate(state, basis, config):
    """Look at the memory between two stretches: equation (eq-consolidation).

    Args:
        state: MemoryState at the end of a stretch.
        basis: orthonormal basis of the resonance filter, (D, D); None leaves the filter out.
        config: anything with `snr_threshold`, `snr_gamma_boost`, `snr_eta_boost`,
            `resonance_strength` and `gamma_adjust_rate`.

    Returns:
        MemoryState at the start of the next stretch.
    """
    earlier = evolve(state.earlier, state.faded, state.turned)
    written = state.fast_weights - earlier
    written, share = select(written, config.snr_threshold, config.snr_gamma_boost)
    weights = earlier + written
    if basis is not None:
        weights = resonate(weights, basis, config.resonance_strength)
    with torch.no_grad():
        driven = coherence(energy(state.fast_weights), state.bound, state.incoherent)  # c, (B, H)
        bound, incoherent = restart(weights)
    return MemoryState(
        weights,
        weights,
        faded=torch.zeros_like(bound),
        turned=torch.zeros_like(bound),
        bound=bound,
        incoherent=incoherent,
        energy=incoherent,
        coherence=driven,
        gamma_shift=controller(driven, config.gamma_adjust_rate),
        eta_scale=1 + config.snr_eta_boost * share,
        last_key=state.last_key,
    )


# %% notebooks/06_consolidation.ipynb#remember
def stretch_lengths(position, length, every):
    """How `length` tokens after the first `position` are cut at the multiples of `every`."""
    first = min(length, every - position % every)
    whole, rest = divmod(length - first, every)
    return [first] + [every] * whole + [rest] * (rest > 0)


def cut(tensors, mask, position, every):
    """The stretches of tensors (B, N, …) and of a mask (B, N) or None, one tuple a stretch."""
    lengths = stretch_lengths(position, tensors[0].shape[1], every)
    if len(lengths) == 1:
        return [(*tensors, mask)]
    # split, not slices: the gradient of a slice is as long as the whole sequence
    parts = [x.split(lengths, dim=1) for x in tensors]
    masks = [None] * len(lengths) if mask is None else mask.split(lengths, dim=1)
    return zip(*parts, masks, strict=True)


def choose(mask, new, old):
    """Row by row: the new state where mask (B,) is True, the old one elsewhere."""
    pairs = zip(new, old, strict=True)
    return MemoryState(*(torch.where(mask.view(-1, *[1] * (n.dim() - 1)), n, o) for n, o in pairs))


# %% notebooks/06_consolidation.ipynb#stretch
def stretch(q, k, v, gamma, potential, eta, state, config, mask):
    """The tokens between two consolidations: equation (eq-memory) with this stretch's Γ and η.

    Shapes as in :func:`remember`; returns y, Γ as it was in force, and the new state.
    """
    gamma = gamma + state.gamma_shift[:, None]  # (B, T, H)
    eta = eta * state.eta_scale[:, None]
    rates, dt = (gamma, potential, eta), config.dt
    y, weights = memory_chunked(q, k, v, *rates, dt, state.fast_weights, mask)
    # where there is no token, nothing fades, turns or is written
    faded, turned, eta = rates if mask is None else (x * mask[..., None] for x in rates)
    with torch.no_grad():
        # s = η ‖k‖ ‖v‖ with ‖k‖ = 1
        strength = eta * torch.linalg.vector_norm(v, dim=-1, dtype=eta.dtype)  # (B, T, H)
        bound, incoherent = running_bound(state.bound, state.incoherent, strength, faded, dt)
    faded = state.faded + dt * faded.sum(1)
    turned = state.turned + dt * turned.sum(1)
    limits = {"bound": bound, "incoherent": incoherent, "faded": faded, "turned": turned}
    return y, gamma, state._replace(fast_weights=weights, **limits)


# %% notebooks/06_consolidation.ipynb#token
def token(q, k, v, gamma, potential, eta, state, dt):
    """What :func:`stretch` does with a single token.

    Args:
        q, k, v: (B, H, D), keys of unit norm, in the dtype of the memory.
        gamma, potential, eta: Γ > 0 (1 / time), V (rad / time) and η, (B, H).
        state: MemoryState before the token.
        dt: time between two tokens.

    Returns:
        y (B, H, D), Γ as it was in force (B, H), and the MemoryState after the token.
    """
    gamma, eta = gamma + state.gamma_shift, eta * state.eta_scale
    y, weights = memory_step(q, k, v, gamma, potential, eta, dt, state.fast_weights)
    decay = gamma * dt
    with torch.no_grad():
        strength, kept = eta * torch.linalg.vector_norm(v, dim=-1), torch.exp(-decay)
        bound = torch.addcmul(strength, kept, state.bound)
        incoherent = torch.addcmul(strength.square(), kept.square(), state.incoherent)
    faded, turned = state.faded + decay, state.turned + potential * dt
    limits = {"bound": bound, "incoherent": incoherent, "faded": faded, "turned": turned}
    return y, gamma, state._replace(fast_weights=weights, **limits)


# %% notebooks/06_consolidation.ipynb#remember-loop
def remember(q, k, v, gamma, potential, eta, state, position, basis, config, mask=None):
    """A sequence through the memory, with a consolidation between stretches.

    Args:
        q, k, v: (B, N, H, D), keys of unit norm.
        gamma, potential, eta: Γ > 0 (1 / time), V (rad / time) and η, (B, N, H).
        state: MemoryState before the first token.
        position: tokens since the reset, an int, the same for all rows.
        basis: see :func:`consolidate`.
        config: see :func:`consolidate`; also `consolidate_every` and `dt`.
        mask: (B, N) bool, False where a row has no token.

    Returns:
        y (B, N, H, D), Γ as it was in force (B, N, H), and the MemoryState after the last token.

    Raises:
        ValueError: see :func:`phase2.memory.check_memory`.
    """
    tensors = q, k, v, gamma, potential, eta
    check_memory(*tensors, state.fast_weights)
    if not q.shape[1]:
        return torch.empty_like(q), gamma, state
    outputs = []
    for *now, part in cut(tensors, mask, position, config.consolidate_every):
        if position and position % config.consolidate_every == 0:
            due = consolidate(state, basis, config)
            state = due if mask is None else choose(part[:, 0], due, state)
        *output, state = stretch(*now, state, config, part)
        outputs.append(output)
        position += now[0].shape[1]
    y, gamma = outputs[0] if len(outputs) == 1 else (torch.cat(x, 1) for x in zip(*outputs))
    return y, gamma, state
