# Generated from notebooks/06_consolidation.ipynb; edit the notebook, not this file.
"""Consolidation."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phase2.memory import (
    Chunks,
    answers,
    carry,
    check_memory,
    chunk_gradients,
    cumulative_angle,
    evolve,
    memory_chunked,
    memory_step,
    overlap,
    read_gradients,
    to_chunks,
    turn,
    writes,
)
from phase2.resonance import mode_gate, resonate
from phase2.snr import select, selection
from phase2.stability import coherence, controller, energy, restart, running_bound

__all__ = [
    "MemoryState",
    "empty_memory",
    "consolidate",
    "stretch",
    "token",
    "pass_looks",
    "pass_looks_back",
    "apart",
    "accumulate",
    "consolidated_forward",
    "consolidated_backward",
    "ConsolidatedMemory",
    "CHUNK",
    "stretches",
    "stretch_lengths",
    "cut",
    "choose",
    "pass_through",
    "TOGETHER",
    "is_quiet",
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
    decay, angle, eta = rates if mask is None else (x * mask[..., None] for x in rates)
    with torch.no_grad():
        # s = η ‖k‖ ‖v‖ with ‖k‖ = 1
        strength = eta * torch.linalg.vector_norm(v, dim=-1, dtype=eta.dtype)  # (B, T, H)
        bound, incoherent = running_bound(state.bound, state.incoherent, strength, decay, dt)
    faded = state.faded + dt * decay.sum(1)
    turned = state.turned + dt * angle.sum(1)
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


# %% notebooks/06_consolidation.ipynb#looks
def pass_looks(written, first, across, spin, basis, config):
    """Equation (eq-looks) from stretch to stretch, in the rotating frame.

    Args:
        written: what each of S stretches has written, (B, S, H, D, D).
        first: W̃ at the start of the first, (B, H, D, D).
        across: a of each stretch, (B, S, H, 1, 1).
        spin: e^{−iΦ} at the end of each stretch, (B, S, H).
        basis, config: see :func:`consolidate`.

    Returns:
        W̃ at the start of each stretch, (B, S, H, D, D), and the matrices of the looks: P,
        (B, S − 1, H, D, D), and if there is a basis U, U_s of that shape, and G of one look after
        the other, (B, H, D, D).
    """
    written = written[:, :-1]  # the last stretch is not looked at
    keep, _ = selection(written, config.snr_threshold, config.snr_gamma_boost)
    kept, memories, gates = keep @ written, [first], []
    if basis is not None:
        basis = basis.to(first)
        key_basis = turn(basis, spin[:, :-1])  # U_s
        kept, memories = kept @ basis, [first @ basis]
    for s in range(kept.shape[1]):
        weights = torch.addcmul(kept[:, s], across[:, s], memories[-1])
        if basis is not None:
            modes = key_basis[:, s].mT @ weights
            gates.append(mode_gate(modes, config.resonance_strength))
            weights = key_basis[:, s] @ (modes * gates[-1])
        memories.append(weights)
    memories = torch.stack(memories, 1)
    if basis is None:
        return memories, (keep,)
    return memories @ basis.mT, (keep, basis, key_basis, *gates)


# %% notebooks/06_consolidation.ipynb#looks-back
def pass_looks_back(dlast, dreads, across, matrices):
    """The gradient of :func:`pass_looks`.

    Args:
        dlast: gradient of W̃ at the end of the last stretch, (B, H, D, D).
        dreads: what reading in a stretch adds to the gradient of W̃ at its start,
            (B, S, H, D, D).
        across, matrices: as there.

    Returns:
        Gradients, at the end of each stretch, of what it carries and of what it has written,
        (B, S, H, D, D), and that of the first W̃.
    """
    keep, *filter = matrices
    if filter:
        basis, key_basis, *gates = filter
        dlast, dreads = dlast @ basis, dreads @ basis
    dends = [dlast]
    for s in range(keep.shape[1] - 1, -1, -1):
        dweights = torch.addcmul(dreads[:, s + 1], across[:, s + 1], dends[-1])
        if filter:
            dweights = key_basis[:, s] @ (gates[s] * (key_basis[:, s].mT @ dweights))
        dends.append(dweights)
    dfirst = torch.addcmul(dreads[:, 0], across[:, 0], dends[-1])
    dcarried = torch.stack(dends[::-1], 1)
    if filter:
        dcarried, dfirst = dcarried @ basis.mT, dfirst @ basis.mT
    dwritten = torch.cat((keep.mT @ dcarried[:, :-1], dcarried[:, -1:]), 1)
    return dcarried, dwritten, dfirst


# %% notebooks/06_consolidation.ipynb#accumulate
def apart(x, count):
    """(B, S n, …) -> (B S, n, …): each of `count` = S stretches as a row of its own."""
    return x.unflatten(1, (count, -1)).flatten(0, 1)


def accumulate(added, across, order):
    """What :func:`phase2.memory.carry` from nothing leaves, taking chunks in this order.

    Args:
        added, across: (B, n, H, D, D) and (B, n, H, 1, 1).
        order: range over the n chunks.

    Returns:
        (B, H, D, D).
    """
    total = added[:, order[0]]
    for c in order[1:]:
        total = torch.addcmul(added[:, c], total, across[:, c])
    return total


# %% notebooks/06_consolidation.ipynb#consolidated-forward
def consolidated_forward(q, k, v, decay, spin, eta, fast_weights, basis, config, size, count):
    """Equations (eq-chunk) and (eq-looks) for `count` = S whole stretches.

    Args:
        q, k, v, decay, spin, eta, size: see :func:`phase2.memory.to_chunks`; C divides a stretch.
        fast_weights: W before the first token, (B, H, D, D).
        basis, config: see :func:`consolidate`.

    Returns:
        Y (B, N, H, D), W̃ at the end of each stretch and at its start, (B, S, H, D, D), and the
        rest that the backward pass needs.
    """
    chunks = to_chunks(q, k, v, decay, spin, eta, size)
    added, fade = (apart(x, count).to(eta.dtype) for x in (writes(chunks), chunks.across))
    written = accumulate(added, fade, range(added.shape[1]))
    written, across = (x.unflatten(0, (-1, count)) for x in (written, fade.prod(1)))
    edges = spin.unflatten(1, (count, -1))[:, :, -1]  # (B, S, H)
    memories, matrices = pass_looks(written, fast_weights, across, edges, basis, config)
    starts, ends = carry(memories.flatten(0, 1), added, fade)
    starts = starts.unflatten(0, (-1, count)).flatten(1, 2).to(v.dtype)
    y, ends = answers(chunks, starts), ends.unflatten(0, (-1, count))
    return y, ends, memories, (across, starts, *chunks, *matrices)


# %% notebooks/06_consolidation.ipynb#consolidated-backward
def consolidated_backward(ends, memories, saved, v, eta, spin, dy, dlast, dearlier):
    """The backward pass of :func:`consolidated_forward`.

    Args:
        ends, memories, saved: what it returned.
        v, eta, spin: its arguments.
        dy: gradient of Y, (B, N, H, D).
        dlast, dearlier: gradients of W̃ at the end of the last stretch and at its start, or None.

    Returns:
        Gradients of q, k, v, Γ dt, V dt, η and the first W.
    """
    parts, count = len(Chunks._fields), memories.shape[1]
    across, starts, *saved = saved
    chunks, matrices = Chunks(*saved[:parts]), saved[parts:]
    dy, dy_since, dreads = read_gradients(chunks, dy)
    dreads, fade = (apart(x, count).to(eta.dtype) for x in (dreads, chunks.across))
    dstarts = accumulate(dreads, fade, range(dreads.shape[1])[::-1]).unflatten(0, (-1, count))
    if dearlier is not None:
        dstarts = torch.cat((dstarts[:, :-1], (dstarts[:, -1] + dearlier)[:, None]), 1)
    dlast = torch.zeros_like(dstarts[:, 0]) if dlast is None else dlast
    dcarried, dwritten, dfirst = pass_looks_back(dlast, dstarts, across, matrices)
    dends, _ = carry(dwritten.flatten(0, 1), dreads, fade, backwards=True)
    # equation (eq-carried-gradient)
    inner = overlap(dends[:, :-1], apart(starts, count)[:, 1:])
    outer = overlap(dends[:, -1], ends.flatten(0, 1))
    handed_on = torch.cat((inner, outer[:, None]), 1).unflatten(0, (-1, count))
    extra = overlap(dcarried[:, :-1] - dwritten[:, :-1], memories[:, :-1])
    handed_on[:, :-1] += (extra * across[:, :-1, :, 0, 0])[:, :, None]
    dends = dends.unflatten(0, (-1, count)).flatten(1, 2)
    rest = handed_on.flatten(1, 2), dy, dy_since, v, eta, spin
    return *chunk_gradients(chunks, starts, dends, *rest), dfirst


# %% notebooks/06_consolidation.ipynb#consolidated
class ConsolidatedMemory(torch.autograd.Function):
    """:func:`consolidated_forward` and its backward pass as one differentiable operation."""

    @staticmethod
    def forward(ctx, q, k, v, decay, angle, eta, fast_weights, basis, config, size, count):
        """q, k, v, Γ dt, V dt, η, W, … -> Y, the last W, W after the last look, and of
        each stretch the energy at its end and ‖W‖ at its start, (B, S, H)."""
        spin = torch.polar(torch.ones_like(angle), -cumulative_angle(angle))  # e^{−iΦ}
        rest = eta, fast_weights, basis, config, size, count
        with torch.autocast(q.device.type, enabled=False):
            y, ends, memories, saved = consolidated_forward(q, k, v, decay, spin, *rest)
        sizes = torch.linalg.vector_norm(memories, dim=(-2, -1))
        ctx.every = q.shape[1] // count
        ctx.save_for_backward(v, eta, spin, ends, memories, *saved)
        ctx.mark_non_differentiable(energies := energy(ends), sizes)
        ctx.set_materialize_grads(False)
        last = turn(ends[:, -1], spin[:, -1].conj())  # W = R(Φ) W̃
        earlier = turn(memories[:, -1], spin[:, -1 - ctx.every].conj())
        return y, last, earlier, energies, sizes

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast, dearlier, *_):
        """Gradients of the first three results -> gradients of every tensor argument."""
        v, eta, spin, ends, memories, *saved = ctx.saved_tensors
        turns = (dlast, spin[:, -1]), (dearlier, spin[:, -1 - ctx.every])
        dlast, dearlier = (None if x is None else turn(x, factor) for x, factor in turns)
        dy = torch.zeros_like(v) if dy is None else dy
        with torch.autocast(dy.device.type, enabled=False):
            rest = v, eta, spin, dy, dlast, dearlier
            return *consolidated_backward(ends, memories, saved, *rest), *[None] * 4


# %% notebooks/06_consolidation.ipynb#stretches
CHUNK = 64  # C, where several stretches are done at once


def stretches(q, k, v, gamma, potential, eta, state, count, basis, config):
    """`count` > 1 whole stretches with a look between two of them, if no look changes a rate.

    Shapes as in :func:`remember`; `state` is that after a look, or empty. Returns y, Γ and the new
    state, or None if the controller would add to Γ.
    """
    dtype, dt = torch.promote_types(q.dtype, torch.float32), config.dt
    rates = [x.to(dtype) for x in (gamma * dt, potential * dt, eta)]
    decay, angle, eta = rates
    options = basis, config, min(CHUNK, config.consolidate_every), count
    tensors = q, k.to(q.dtype), v.to(q.dtype), *rates
    found = ConsolidatedMemory.apply(*tensors, state.fast_weights, *options)
    y, weights, earlier, energies, sizes = found
    with torch.no_grad():
        strength = eta * torch.linalg.vector_norm(v, dim=-1, dtype=dtype)
        bound = torch.cat((state.bound[:, None], sizes[:, 1:]), 1)  # at the starts, (B, S, H)
        incoherent = torch.cat((state.incoherent[:, None], sizes[:, 1:].square()), 1)
        limits = running_bound(
            bound.flatten(0, 1),
            incoherent.flatten(0, 1),
            apart(strength, count),
            apart(decay, count),
        )
        bound, incoherent = (x.unflatten(0, (-1, count)) for x in limits)
        driven = coherence(energies, bound, incoherent)
        if controller(driven[:, :-1], config.gamma_adjust_rate).any():
            return None
    faded, turned = (x[:, -config.consolidate_every :].sum(1) for x in (decay, angle))
    limits = (x[:, -1] for x in (bound, incoherent, sizes.square()))
    rest = state.gamma_shift, state.eta_scale, state.last_key
    state = MemoryState(weights, earlier, faded, turned, *limits, driven[:, -2], *rest)
    return y, gamma, state


# %% notebooks/06_consolidation.ipynb#cut
def stretch_lengths(position, length, every, together):
    """How `length` tokens after the first `position` are cut at multiples of `every`.

    Whole stretches come in groups of up to `together`.
    """
    first = min(length, -position % every)  # the rest of a stretch under way
    whole, rest = divmod(length - first, every)
    groups, left = divmod(whole, together)
    lengths = [first, *[together * every] * groups, left * every, rest]
    return [tokens for tokens in lengths if tokens]


def cut(tensors, mask, position, every, together):
    """The parts of tensors (B, N, …) and of a mask (B, N) or None, one tuple a part."""
    lengths = stretch_lengths(position, tensors[0].shape[1], every, together)
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


# %% notebooks/06_consolidation.ipynb#remember-loop
def pass_through(tensors, mask, state, position, basis, config, together):
    """:func:`remember` with up to `together` stretches at once, if no look changes a rate."""
    outputs, every = [], config.consolidate_every
    for *now, part_mask in cut(tensors, mask, position, every, together):
        ready, count = state, now[0].shape[1] // every
        if position and position % every == 0:
            ready = consolidate(state, basis, config)
            ready = ready if mask is None else choose(part_mask[:, 0], ready, state)
        if count < 2:
            found = stretch(*now, ready, config, part_mask)
        else:
            found = stretches(*now, ready, count, basis, config) if is_quiet(ready) else None
        if found is None:
            found = pass_through(now, part_mask, state, position, basis, config, 1)
        *output, state = found
        outputs.append(output)
        position += now[0].shape[1]
    y, gamma = outputs[0] if len(outputs) == 1 else (torch.cat(x, 1) for x in zip(*outputs))
    return y, gamma, state


# %% notebooks/06_consolidation.ipynb#remember-function
TOGETHER = 8  # stretches at once; a lost bet wastes one forward pass over as many


def is_quiet(state):
    """Are this stretch's rates those that its tokens ask for?"""
    return not state.gamma_shift.any() and bool((state.eta_scale == 1).all())


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
    # several at once: no rate may depend on a look, and chunks must fit into a stretch
    free = mask is None and not config.snr_eta_boost and not torch.compiler.is_compiling()
    fits = config.consolidate_every % min(CHUNK, config.consolidate_every) == 0
    together = TOGETHER if free and fits else 1
    return pass_through(tensors, mask, state, position, basis, config, together)
