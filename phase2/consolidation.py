# Generated from notebooks/06_consolidation.ipynb; edit the notebook, not this file.
"""Consolidation."""

from typing import NamedTuple

import torch
from torch import Tensor

from phase2.memory import memory_chunked
from phase2.resonance import resonate
from phase2.snr import carried, select
from phase2.stability import coherence, controller, energy, restart, running_bound

__all__ = ["MemoryState", "empty_memory", "consolidate", "choose", "stretch", "remember"]


# %% notebooks/06_consolidation.ipynb#state
class MemoryState(NamedTuple):
    """All that one layer's memory carries from token to token.

    Attributes:
        fast_weights: W, (B, H, D, D), [key index, value index].
        earlier: what is left in W of the memory at the last consolidation, (B, H, D, D).
        bound: the largest size W can have, (B, H), see :func:`~phase2.stability.running_bound`.
        incoherent: the energy W would have if the writes since the last consolidation were
            unrelated, (B, H).
        energy: ‖W‖² after the last consolidation, (B, H).
        coherence: c of the stretch before the last consolidation, (B, H).
        eta_scale: factor on η during this stretch, (B, H).
        last_key: the previous token's key, at which the next one looks back (chapter 7),
            (B, H, D).
    """

    fast_weights: Tensor
    earlier: Tensor
    bound: Tensor
    incoherent: Tensor
    energy: Tensor
    coherence: Tensor
    eta_scale: Tensor
    last_key: Tensor


def empty_memory(batch, heads, dim, device=None, dtype=torch.float32):
    """The state of a memory in which nothing has been written: B, H, D -> MemoryState."""
    zero = torch.zeros(batch, heads, device=device, dtype=dtype)
    weights = torch.zeros(batch, heads, dim, dim, device=device, dtype=dtype)
    return MemoryState(weights, weights, *[zero] * 4, torch.ones_like(zero), weights[..., 0])


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
    driven = coherence(energy(state.fast_weights), state.bound, state.incoherent)  # c, (B, H)
    written = state.fast_weights - state.earlier
    written, share = select(written, config.snr_threshold, config.snr_gamma_boost)
    weights = state.earlier + written
    if basis is not None:
        weights = resonate(weights, basis, config.resonance_strength)
    bound, incoherent = restart(weights)
    return MemoryState(
        weights,
        weights,
        bound,
        incoherent,
        energy=incoherent,
        coherence=driven,
        eta_scale=1 + config.snr_eta_boost * share,
        last_key=state.last_key,
    )


# %% notebooks/06_consolidation.ipynb#remember
def choose(mask, new, old):
    """Row by row: the new state where mask (B,) is True, the old one elsewhere."""
    pairs = zip(new, old, strict=True)
    return MemoryState(*(torch.where(mask.view(-1, *[1] * (n.dim() - 1)), n, o) for n, o in pairs))


def stretch(q, k, v, gamma, potential, eta, state, config, mask):
    """The tokens between two consolidations: equation (eq-memory) with this stretch's Γ and η.

    Shapes as in :func:`remember`; returns y, Γ as it was in force, and the new state.
    """
    shift = controller(state.coherence, config.gamma_adjust_rate)  # (B, H)
    gamma = gamma + shift[:, None]  # (B, T, H)
    eta = eta * state.eta_scale[:, None]
    weights, dt = state.fast_weights, config.dt
    y, weights = memory_chunked(q, k, v, gamma, potential, eta, dt, weights, mask)
    # s = η ‖k‖ ‖v‖ with ‖k‖ = 1
    strength = eta * torch.linalg.vector_norm(v, dim=-1, dtype=eta.dtype)  # (B, T, H)
    if mask is not None:
        strength, gamma, potential = (x * mask[..., None] for x in (strength, gamma, potential))
    earlier = carried(state.earlier, gamma, potential, dt)
    bound, incoherent = running_bound(state.bound, state.incoherent, strength, gamma, dt)
    new = {"fast_weights": weights, "earlier": earlier, "bound": bound, "incoherent": incoherent}
    return y, gamma, state._replace(**new)


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
    if not q.shape[1]:
        return torch.empty_like(q), gamma, state
    every, start, outputs = config.consolidate_every, 0, []
    while start < q.shape[1]:
        if position and position % every == 0:
            due = consolidate(state, basis, config)
            state = due if mask is None else choose(mask[:, start], due, state)
        stop = min(q.shape[1], start + every - position % every)
        now = [x[:, start:stop] for x in (q, k, v, gamma, potential, eta)]
        part = None if mask is None else mask[:, start:stop]
        *output, state = stretch(*now, state, config, part)
        outputs.append(output)
        position, start = position + stop - start, stop
    y, gamma = (torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
    return y, gamma, state
