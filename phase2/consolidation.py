# Generated from notebooks/06_consolidation.ipynb; edit the notebook, not this file.
"""Consolidation."""

from typing import NamedTuple

import torch
from torch import Tensor

from phase2.memory import (
    Chunks,
    answers,
    carry,
    check_memory,
    chunk_gradients,
    cumulative_angle,
    decays,
    evolve,
    memory_chunked,
    overlap,
    read_gradients,
    refuse_second_derivative,
    split,
    split_times,
    times,
    to_frame,
    turn,
    with_decays,
)
from phase2.resonance import mode_gate, resonate
from phase2.snr import select, selection
from phase2.stability import coherence, controller, energy, restart, running_bound

__all__ = [
    "MemoryState",
    "empty_memory",
    "given_memory",
    "coherence_of",
    "consolidate",
    "stretch",
    "token",
    "look",
    "apart",
    "chunk_ends",
    "accumulate",
    "write",
    "rewrite",
    "pass_stretches",
    "pass_looks_back",
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
    "is_empty",
    "remember",
]


# %% notebooks/06_consolidation.ipynb#state
class MemoryState(NamedTuple):
    """All that one layer carries from token to token.

    Attributes:
        fast_weights: W, (B, H, D, D), [key index, value index].
        earlier: W after the last consolidation, (B, H, D, D).
        faded: ΣΓ dt since then, (B, H).
        turned: ΣV dt since then, (B, H), rad.
        bound: the largest size W can have, (B, H), see :func:`~phase2.stability.running_bound`.
        incoherent: the energy W would have if the writes since the last consolidation were
            unrelated, (B, H).
        last_energy: ‖W‖² after the last consolidation, (B, H).
        last_coherence: c of the stretch before the last consolidation, (B, H).
        gamma_shift: what the controller adds to Γ during this stretch, (B, H), 1 / time.
        eta_scale: factor on η during this stretch, (B, H).
        last_key: the previous token's key, at which the next one looks back (chapter 7),
            (B, H, D).
        last_input: the previous token's normalized input to the network behind the memory, at
            which that of the next one looks back, (B, H D).
    """

    fast_weights: Tensor
    earlier: Tensor
    faded: Tensor
    turned: Tensor
    bound: Tensor
    incoherent: Tensor
    last_energy: Tensor
    last_coherence: Tensor
    gamma_shift: Tensor
    eta_scale: Tensor
    last_key: Tensor
    last_input: Tensor


# %% notebooks/06_consolidation.ipynb#empty-memory
def empty_memory(batch, heads, dim, device=None, dtype=torch.float32):
    """The state of a memory in which nothing has been written: B, H, D -> MemoryState."""
    ones = torch.ones(batch, heads, device=device, dtype=dtype)

    def zeros(*shape):  # each time a new tensor, for a compiler tells which of them are the same
        return ones.new_zeros(batch, *shape)

    memories = (zeros(heads, dim, dim) for _ in range(2))
    sums = (zeros(heads) for _ in range(7))
    return MemoryState(*memories, *sums, ones, zeros(heads, dim), zeros(heads * dim))


def given_memory(fast_weights):
    """The state of a memory that is given, as if it had just been looked at.

    Args:
        fast_weights: W, (B, H, D, D); for a memory that is learned, say.

    Returns:
        MemoryState.
    """
    batch, heads, dim, _ = fast_weights.shape
    empty = empty_memory(batch, heads, dim, fast_weights.device, fast_weights.dtype)
    bound, incoherent = restart(fast_weights.detach())
    limits = {"bound": bound, "incoherent": incoherent, "last_energy": incoherent}
    return empty._replace(fast_weights=fast_weights, earlier=fast_weights, **limits)


# %% notebooks/06_consolidation.ipynb#coherence-of
def coherence_of(state):
    """:func:`~phase2.stability.coherence` of a memory as it is, without gradient: (B, H)."""
    size = energy(state.fast_weights.detach())
    return coherence(size, state.bound, state.incoherent)


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
    carried = evolve(state.earlier, state.faded, state.turned)
    written = state.fast_weights - carried
    wrote = energy(written) > (64 * torch.finfo(written.dtype).eps) ** 2 * energy(carried)
    written, share = select(written, config.snr_threshold, config.snr_gamma_boost)
    weights = carried + written
    if basis is not None:
        weights = resonate(weights, basis, config.resonance_strength)
    with torch.no_grad():
        alike = coherence_of(state)  # c, (B, H)
        bound, incoherent = restart(weights)
    return state._replace(
        fast_weights=weights,
        earlier=weights,
        faded=torch.zeros_like(bound),
        turned=torch.zeros_like(bound),
        bound=bound,
        incoherent=incoherent,
        last_energy=incoherent,
        last_coherence=alike,
        gamma_shift=controller(alike, config.gamma_adjust_rate),
        eta_scale=1 + config.snr_eta_boost * share * wrote,  # what is but rounding has no share
    )


# %% notebooks/06_consolidation.ipynb#stretch
def stretch(q, k, v, gamma, potential, eta, state, config, mask):
    """The tokens between two consolidations: equation (eq-memory) with this stretch's Γ and η.

    Shapes as in :func:`remember`; returns y, Γ as it was in force, and the new state.
    """
    gamma = gamma + state.gamma_shift[:, None]  # (B, T, H)
    eta, potential = eta * state.eta_scale[:, None], potential.to(gamma.dtype)
    rates, dt = (gamma, potential, eta), config.dt
    y, weights = memory_chunked(q, k, v, *rates, dt, state.fast_weights, mask)
    decay, angle = gamma * dt, potential * dt
    if mask is not None:  # where there is no token, nothing fades, turns or is written
        decay, angle, eta = (x * mask[..., None] for x in (decay, angle, eta))
    with torch.no_grad():
        # of writes, η ‖k‖ ‖v‖ with ‖k‖ = 1; where that is 0 this is above what is written
        strength = eta.abs() * torch.linalg.vector_norm(v, dim=-1, dtype=eta.dtype)  # (B, T, H)
        bound, incoherent = running_bound(state.bound, state.incoherent, strength, decay)
    faded, turned = state.faded + decay.sum(1), state.turned + angle.sum(1)
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
    # dt is 1 as a rule, and a product of a few numbers costs as much as one of many
    decay, angle = (gamma, potential) if dt == 1 else (gamma * dt, potential * dt)
    # equation (eq-memory), as in memory_step
    weights = evolve(state.fast_weights, decay, angle)
    v_eta = eta[..., None] * v
    weights.addcmul_(k[..., None], v_eta[..., None, :])
    y = (weights * q[..., None]).sum(-2)  # not a product, which autocast would round
    kept = torch.exp(-decay.detach())
    strength = torch.linalg.vector_norm(v_eta.detach(), dim=-1)  # η ‖v‖, (B, H)
    bound = torch.addcmul(strength, kept, state.bound)
    incoherent = torch.addcmul(strength * strength, kept * kept, state.incoherent)
    faded, turned = state.faded + decay, state.turned + angle
    now = weights, state.earlier, faded, turned, bound, incoherent
    return y, gamma, MemoryState(*now, *state[len(now) :])


# %% notebooks/06_consolidation.ipynb#look
def look(keep, written, carried, key_basis, basis, resonance_strength):
    """Equation (eq-looks).

    Args:
        keep: P, (B, H, D, D).
        written: what the stretch has written, likewise.
        carried: what is left of W̃ at its start, likewise.
        key_basis: U_s, likewise; not used without a basis.
        basis: see :func:`consolidate`.
        resonance_strength: λ of equation (eq-resonate).

    Returns:
        W̃ at the start of the next stretch, and F or, without a basis, None.
    """
    weights = carried + keep @ written
    if basis is None:
        return weights, None
    modes = key_basis.mT @ weights @ basis
    gate = mode_gate(modes, resonance_strength)
    return key_basis @ (modes * gate) @ basis.mT, gate


# %% notebooks/06_consolidation.ipynb#accumulate
def apart(x, count):
    """(B, S n, …) -> (B S, n, …): each of `count` = S stretches as a row of its own."""
    return x.unflatten(1, (count, -1)).flatten(0, 1)


def chunk_ends(decay, size):
    """`until` and `across` of :func:`phase2.memory.chunk_decays`, of Γ dt (B, N, H)."""
    g = split(decay.double(), size).cumsum(-1)
    until, across = (torch.exp(x.to(decay.dtype)) for x in (g - g[..., -1:], -g[..., -1, None]))
    return until[..., None], across[..., None]


def accumulate(added, across, backwards=False):
    """What :func:`phase2.memory.carry` from nothing leaves at the end.

    Args:
        added, across: (B, n, H, D, D) and (B, n, H, 1, 1).
        backwards: from the last chunk to the first.

    Returns:
        (B, H, D, D).
    """
    order = range(added.shape[1])[:: -1 if backwards else 1]
    total = added[:, order[0]]
    for c in order[1:]:
        total = torch.addcmul(added[:, c], total, across[:, c])
    return total


# %% notebooks/06_consolidation.ipynb#write
def write(k, v_eta, decay, strength):
    """What a stretch of m chunks writes into an empty memory.

    Args:
        k, v_eta: K̃ and V_η, (B, m, H, C, D).
        decay, strength: Γ dt and η ‖v‖, (B, m C, H).

    Returns:
        What each chunk adds, (B, m, H, D, D), and all of them together, (B, H, D, D); f of
        equation (eq-looks), (B, H, 1, 1); `bound` and `incoherent` as in MemoryState.
    """
    until, across = chunk_ends(decay, k.shape[-2])
    added = (times(k, until).mT @ v_eta).to(decay.dtype)
    nothing = decay.new_zeros(len(k), k.shape[2])
    limits = running_bound(nothing, nothing, strength, decay)
    return added, accumulate(added, across), across.prod(1), *limits


def rewrite(s, tokens, found, shift):
    """Stretch s again with `shift`, (B, H), added to its Γ dt, in place.

    Args:
        tokens: arguments of :func:`write`, (B, S, …).
        found: its results, likewise.
    """
    tokens[2][:, s] += shift[:, None]
    for x, new in zip(found, write(*(x[:, s] for x in tokens)), strict=True):
        x[:, s] = new


# %% notebooks/06_consolidation.ipynb#pass-stretches
def pass_stretches(tokens, key_basis, state, basis, config):
    """The looks of S stretches, one after the other, and what they need.

    Args:
        tokens: arguments of :func:`write`, (B, S, …); the controller adds to Γ dt in place.
        key_basis: U_s of each look, (B, S − 1, H, D, D), or None.
        state, basis, config: see :func:`consolidate`; W is at the start of a stretch.

    Returns:
        What each chunk adds, (B, S, m, H, D, D); W̃ at the start of each stretch; what the
        controller adds to its Γ; P and F of its look; and at the end `bound`, `incoherent`,
        `last_energy` and `last_coherence` as in MemoryState.
    """
    weights, shift, gates = state.fast_weights, state.gamma_shift, []
    limits, last = (state.bound, state.incoherent), (state.last_energy, state.last_coherence)
    tokens[2][:, 0] += config.dt * shift[:, None]
    found = [x.unflatten(0, tokens[0].shape[:2]) for x in write(*(x.flatten(0, 1) for x in tokens))]
    keep = selection(found[1][:, :-1], config.snr_threshold, config.snr_gamma_boost)[0]
    memories, shifts, count = [weights], [shift], tokens[0].shape[1]
    for s in range(count):
        if again := s > 0 and bool(shift.any()):  # the controller was not silent
            rewrite(s, tokens, found, config.dt * shift)
        _, written, across, *grown = (x[:, s] for x in found)
        fade = across[..., 0, 0]  # the limits at the end
        limits = fade * limits[0] + grown[0], fade.square() * limits[1] + grown[1]
        if s == count - 1:  # the last stretch is not looked at
            break
        if again:
            keep[:, s] = selection(written, config.snr_threshold, config.snr_gamma_boost)[0]
        carried, at = across * weights, None if basis is None else key_basis[:, s]
        alike = coherence(energy(carried + written), *limits)
        weights, gate = look(keep[:, s], written, carried, at, basis, config.resonance_strength)
        # what the next stretch starts with
        limits, shift = restart(weights), controller(alike, config.gamma_adjust_rate)
        last = limits[1], alike
        memories.append(weights), shifts.append(shift), gates.append(gate)
    return found[0], memories, shifts, keep, gates, (*limits, *last)


# %% notebooks/06_consolidation.ipynb#looks-back
def pass_looks_back(dlast, dreads, across, keep, looks):
    """The gradient of the looks of :func:`pass_stretches`, equation (eq-looks) transposed.

    Args:
        dlast: gradient of W̃ at the end of the last stretch, (B, H, D, D).
        dreads: what reading in a stretch adds to the gradient of W̃ at its start,
            (B, S, H, D, D).
        across: f of each stretch, (B, S, H, 1, 1).
        keep: P of the looks, (B, S − 1, H, D, D).
        looks: U, U_s (B, S − 1, H, D, D) and F of one look after the other; or nothing.

    Returns:
        Gradients, at the end of each stretch, of what it carries and of what it has written,
        (B, S, H, D, D), and that of the first W̃.
    """
    dends = [dlast]
    for s in range(keep.shape[1] - 1, -1, -1):
        dweights = torch.addcmul(dreads[:, s + 1], across[:, s + 1], dends[-1])
        if looks:
            basis, key_basis, *gates = looks
            dmodes = key_basis[:, s].mT @ dweights @ basis
            dweights = key_basis[:, s] @ (gates[s] * dmodes) @ basis.mT
        dends.append(dweights)
    dfirst = torch.addcmul(dreads[:, 0], across[:, 0], dends[-1])
    dcarried = torch.stack(dends[::-1], 1)
    dwritten = torch.cat((keep.mT @ dcarried[:, :-1], dcarried[:, -1:]), 1)
    return dcarried, dwritten, dfirst


# %% notebooks/06_consolidation.ipynb#consolidated-forward
def consolidated_forward(q, k, v, decay, spin, eta, state, basis, config, size, count):
    """Equations (eq-chunk) and (eq-looks) for `count` = S whole stretches.

    Args:
        q, k, v, decay, spin, eta, size: see :func:`phase2.memory.to_chunks`; C divides a stretch.
        state: MemoryState, after a look or empty.
        basis, config: see :func:`consolidate`.

    Returns:
        Y (B, N, H, D); W̃ at the end and at the start of each stretch, (B, S, H, D, D); what
        the controller adds to Γ, (B, S, H); the last result of :func:`pass_stretches`; and what
        the backward pass needs.
    """
    q, k, v_eta = to_frame(q, spin, size), to_frame(k, spin, size), split_times(v, eta, size)
    edges = spin.unflatten(1, (count, -1))[:, :-1, -1]  # at the looks, (B, S − 1, H)
    strength = eta.abs() * torch.linalg.vector_norm(v, dim=-1, dtype=eta.dtype)
    looks = () if basis is None else (basis.to(eta), turn(basis.to(eta), edges))  # U and U_s
    basis, key_basis = looks or (None, None)
    tokens = [x.unflatten(1, (count, -1)) for x in (k, v_eta, decay.clone(), strength)]
    found = pass_stretches(tokens, key_basis, state, basis, config)
    added, memories, shifts, keep, gates, limits = found
    chunks = with_decays(q, k, v_eta, tokens[2].flatten(1, 2))
    memories, shifts = torch.stack(memories, 1), torch.stack(shifts, 1)
    starts, ends = carry(memories.flatten(0, 1), added.flatten(0, 1), apart(chunks.across, count))
    starts = starts.unflatten(0, (-1, count)).flatten(1, 2).to(v.dtype)
    saved = (starts, keep, *chunks._replace(v_eta=None), *looks, *(gates if looks else ()))
    ends = ends.unflatten(0, (-1, count))
    return answers(chunks, starts), ends, memories, shifts, limits, saved


# %% notebooks/06_consolidation.ipynb#consolidated-backward
def consolidated_backward(ends, memories, saved, v, eta, spin, dy, dlast, dearlier):
    """The backward pass of :func:`consolidated_forward`.

    Args:
        ends, memories, saved: from what it returned.
        v, eta, spin: its arguments.
        dy: gradient of Y, (B, N, H, D).
        dlast, dearlier: gradients of W̃ at the end of the last stretch and at its start, or None.

    Returns:
        Gradients of q, k, v, Γ dt, V dt, η and the first W.
    """
    parts, count = len(Chunks._fields), memories.shape[1]
    starts, keep, *saved = saved
    chunks, looks = Chunks(*saved[:parts]), saved[parts:]
    chunks = chunks._replace(v_eta=split_times(v, eta, chunks.q.shape[-2]))
    dy, dy_since, dreads = read_gradients(chunks, dy)
    dreads, fade = (apart(x, count).to(eta.dtype) for x in (dreads, chunks.across))
    dstarts = accumulate(dreads, fade, backwards=True).unflatten(0, (-1, count))
    if dearlier is not None:
        dstarts = torch.cat((dstarts[:, :-1], (dstarts[:, -1] + dearlier)[:, None]), 1)
    dlast = torch.zeros_like(dstarts[:, 0]) if dlast is None else dlast
    across = fade.prod(1).unflatten(0, (-1, count))
    dcarried, dwritten, dfirst = pass_looks_back(dlast, dstarts, across, keep, looks)
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
    def forward(ctx, q, k, v, decay, angle, eta, fast_weights, state, basis, config, size, count):
        """q, k, v, Γ dt, V dt, η, W (that of `state`), … -> Y, the last W, W after the last look;
        without gradient what the controller adds to Γ, and the limits of MemoryState."""
        spin = torch.polar(torch.ones_like(angle), -cumulative_angle(angle))  # e^{−iΦ}
        with torch.autocast(q.device.type, enabled=False):
            rest = eta, state, basis, config, size, count
            y, ends, memories, *found, saved = consolidated_forward(q, k, v, decay, spin, *rest)
        ctx.every = q.shape[1] // count
        ctx.save_for_backward(v, eta, spin, ends, memories, *saved)
        shifts, limits = found
        ctx.mark_non_differentiable(shifts, *limits)
        ctx.set_materialize_grads(False)
        last = turn(ends[:, -1], spin[:, -1].conj())  # W = R(Φ) W̃
        earlier = turn(memories[:, -1], spin[:, -1 - ctx.every].conj())
        # not as views, which could not be changed in place
        return y, last.contiguous(), earlier.contiguous(), shifts, *limits

    @staticmethod
    def backward(ctx, dy, dlast, dearlier, *_):
        """Gradients of the first three results -> gradients of every tensor argument."""
        refuse_second_derivative()
        v, eta, spin, ends, memories, *saved = ctx.saved_tensors
        turns = (dlast, spin[:, -1]), (dearlier, spin[:, -1 - ctx.every])
        dlast, dearlier = (None if x is None else turn(x, factor) for x, factor in turns)
        dy = torch.zeros_like(v) if dy is None else dy
        with torch.autocast(dy.device.type, enabled=False):
            rest = v, eta, spin, dy, dlast, dearlier
            return *consolidated_backward(ends, memories, saved, *rest), *[None] * 5


# %% notebooks/06_consolidation.ipynb#stretches
CHUNK = 64  # C, where several stretches are done at once


def stretches(q, k, v, gamma, potential, eta, state, count, basis, config):
    """`count` > 1 whole stretches with a look between two of them.

    Shapes as in :func:`remember`; `state` is that after a look, or empty. Returns y, Γ as it was
    in force, and the new state.
    """
    dtype, dt, every = torch.promote_types(q.dtype, torch.float32), config.dt, q.shape[1] // count
    gamma, potential, eta = (x.to(dtype) for x in (gamma, potential, eta))
    tensors = q, k.to(q.dtype), v.to(q.dtype), decays(gamma, dt), potential * dt, eta
    state = MemoryState(*(x.to(dtype) for x in state))
    known = MemoryState(*(x.detach() for x in state))
    options = basis, config, min(CHUNK, every), count
    found = ConsolidatedMemory.apply(*tensors, state.fast_weights, known, *options)
    y, weights, earlier, shifts, *limits = found
    gamma = gamma + shifts.repeat_interleave(every, 1)
    faded, turned = (dt * x[:, -every:].sum(1) for x in (gamma, potential))
    rest = shifts[:, -1], state.eta_scale, state.last_key, state.last_input
    return y, gamma, MemoryState(weights, earlier, faded, turned, *limits, *rest)


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
    """:func:`remember` with up to `together` stretches at once."""
    outputs, every = [], config.consolidate_every
    for *now, part_mask in cut(tensors, mask, position, every, together):
        count = now[0].shape[1] // every
        if position and position % every == 0:
            due = consolidate(state, basis, config)
            state = due if mask is None else choose(part_mask[:, 0], due, state)
        if count < 2:
            *output, state = stretch(*now, state, config, part_mask)
        else:
            *output, state = stretches(*now, state, count, basis, config)
        outputs.append(output)
        position += now[0].shape[1]
    y, gamma = outputs[0] if len(outputs) == 1 else (torch.cat(x, 1) for x in zip(*outputs))
    return y, gamma, state


# %% notebooks/06_consolidation.ipynb#remember-function
TOGETHER = 32  # stretches at once: enough to keep a machine busy


def is_empty(state):
    """Is a MemoryState that of :func:`empty_memory`, asked for no gradient?"""
    learned = any(x.requires_grad for x in state)
    return not (learned or state.fast_weights.any() or (state.eta_scale != 1).any())


def remember(q, k, v, gamma, potential, eta, state, position, basis, config, mask=None):
    """A sequence through the memory, with a consolidation between stretches.

    Args:
        q, k, v: (B, N, H, D), keys of unit norm.
        gamma, potential, eta: Γ > 0 (1 / time), V (rad / time) and η, (B, N, H).
        state: MemoryState before the first token; see :func:`given_memory` for one that begins
            with a W.
        position: tokens since the reset, an int, the same for all rows.
        basis: see :func:`consolidate`; it gets no gradient.
        config: see :func:`consolidate`; also `consolidate_every` and `dt`.
        mask: (B, N) bool, False where a row has no token; the tokens of a row are contiguous. All
            columns count as tokens, so a row begins in column 0 or as far along as its stretch is.

    Returns:
        y (B, N, H, D), Γ as it was in force (B, N, H), and the MemoryState after the last token.

    Raises:
        TypeError, ValueError: see :func:`phase2.memory.check_memory`.
    """
    tensors = q, k, v, gamma, potential, eta
    check_memory(*tensors, config.dt, state.fast_weights)
    if not q.shape[1]:
        return torch.empty_like(q), gamma, state
    # several at once: chunks must fit into a stretch, no look may change η, and `earlier` is known
    fits = config.consolidate_every % min(CHUNK, config.consolidate_every) == 0
    free = fits and mask is None and not config.snr_eta_boost and not torch.compiler.is_compiling()
    known = free and (position > 0 or is_empty(state))
    basis = None if basis is None else basis.detach()
    return pass_through(tensors, mask, state, position, basis, config, TOGETHER if known else 1)
