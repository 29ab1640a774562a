# Generated from notebooks/02_memory.ipynb; edit the notebook, not this file.
"""Hebbian memory."""

import itertools
import math
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "rotate",
    "in_pairs",
    "as_complex",
    "as_real",
    "turn",
    "evolve",
    "memory_step",
    "check_positive",
    "check_finite",
    "check_memory",
    "memory_recurrent",
    "split",
    "join",
    "cumulative_angle",
    "times",
    "split_times",
    "join_times",
    "GONE",
    "decays",
    "chunk_decays",
    "carry",
    "products",
    "Chunks",
    "to_frame",
    "with_decays",
    "to_chunks",
    "writes",
    "answers",
    "chunked_forward",
    "overlap",
    "rate_gradients",
    "turn_back",
    "read_gradients",
    "chunk_gradients",
    "chunked_backward",
    "refuse_second_derivative",
    "ChunkedMemory",
    "pad",
    "check_chunks",
    "memory_chunked",
    "retrieval_snr",
    "capacity",
    "lag_snr",
    "best_decay",
]


# %% notebooks/02_memory.ipynb#rotate
def rotate(x, angle):
    """Turn the last index of x by an angle, in planes (0, 1), (2, 3), …: R(θ) of (eq-memory).

    Args:
        x: real tensor (..., D), D even.
        angle: θ, shape of `x` without its last dimension (or broadcastable to it), rad.

    Returns:
        R(θ) x, of the shape of `x`.
    """
    real, imag = x[..., 0::2], x[..., 1::2]
    cos, sin = torch.cos(angle)[..., None], torch.sin(angle)[..., None]
    return torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1).flatten(-2)


# %% notebooks/02_memory.ipynb#complex
def in_pairs(pairs):
    """Can (…, 2) be seen as complex numbers where it lies?"""
    *steps, last = pairs.stride()
    return last == 1 and not any(step % 2 for step in (*steps, pairs.storage_offset()))


def as_complex(x):
    """Pairs of entries as complex numbers: (…, D) -> (…, D / 2), a view where x allows it.

    Half precision becomes complex64.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = x.view(*x.shape[:-1], x.shape[-1] // 2, 2)
    if torch.compiler.is_compiling() or not in_pairs(pairs):  # a compiler does not see the layout
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(pairs)


def as_real(x):
    """The inverse of :func:`as_complex`."""
    return torch.view_as_real(x).flatten(-2)


# %% notebooks/02_memory.ipynb#turn
def turn(fast_weights, factor):
    """Each plane of a memory times a complex number: (…, D, D) and (…), broadcast."""
    return as_real(as_complex(fast_weights.mT) * factor[..., None, None]).mT


def evolve(fast_weights, decay, angle):
    """What becomes of a memory to which nothing is written: e^{−Γ dt} R(V dt) W of (eq-memory).

    Args:
        fast_weights: W, (B, H, D, D), D even.
        decay: Γ dt, (B, H); over several tokens, its sum.
        angle: V dt, (B, H), rad; over several tokens, its sum.

    Returns:
        (B, H, D, D).
    """
    wide = torch.promote_types(fast_weights.dtype, torch.float32)
    decay, angle = decay.to(wide), angle.to(wide)
    if torch.compiler.is_compiling():  # a compiler fuses operations of real numbers alone
        turned = rotate(fast_weights.to(wide).mT, angle[..., None])
        return (turned * torch.exp(-decay)[..., None, None]).mT.to(fast_weights.dtype)
    factor = torch.exp(torch.complex(-decay, angle))  # e^{−Γ dt + iV dt}, as in chapter 1
    return turn(fast_weights, factor).to(fast_weights.dtype)


# %% notebooks/02_memory.ipynb#step
def memory_step(q, k, v, gamma, potential, eta, dt, fast_weights):
    """One token of the memory: equation (eq-memory).

    Args:
        q, k, v: query, key (unit norm) and value, (B, H, D).
        gamma, potential, eta: Γ (1 / time), V (rad / time) and learning rate, (B, H).
        dt: time between two tokens.
        fast_weights: W, (B, H, D, D), [key index, value index].

    Returns:
        y (B, H, D) and the new W (B, H, D, D).
    """
    # W_t = e^{-Γ_t dt} R(V_t dt) W_{t-1} + η_t k_t v_tᵀ
    kept = evolve(fast_weights, gamma * dt, potential * dt)
    fast_weights = torch.addcmul(kept, (eta[..., None] * k)[..., :, None], v[..., None, :])
    with torch.autocast(q.device.type, enabled=False):
        y = (q[..., None, :] @ fast_weights).squeeze(-2)  # y_t = W_tᵀ q_t
    return y, fast_weights


# %% notebooks/02_memory.ipynb#checks
def check_positive(gamma):
    """Refuse Γ ≤ 0 and NaN with a ValueError."""
    if gamma.numel() and not (lowest := gamma.min().item()) > 0:
        why = " (are the weights finite?)" if math.isnan(lowest) else ""
        message = f"gamma must be positive everywhere, its smallest value is {lowest:.4g}"
        raise ValueError(message + why)


def check_finite(fast_weights):
    """Refuse a memory that holds NaN or infinity with a ValueError."""
    if not math.isfinite(fast_weights.sum(dtype=torch.float64).item()):
        raise ValueError("state must be finite, it holds NaN or infinity")


# %% notebooks/02_memory.ipynb#check-memory
def check_memory(q, k, v, gamma, potential, eta, dt, fast_weights=None):
    """Refuse inputs that the memory is not defined for, before anything is computed.

    Raises:
        TypeError: an argument is no tensor, or q, k or v are not of floating point.
        ValueError: a wrong rank or shape, an odd head dimension, Γ ≤ 0, dt ≤ 0, or a state that
            is not finite; the message names the argument, its value and what is allowed.
    """
    tokens, rates = {"q": q, "k": k, "v": v}, {"gamma": gamma, "potential": potential, "eta": eta}
    states = {} if fast_weights is None else {"state": fast_weights}
    for name, value in (tokens | rates | states).items():
        if not torch.is_tensor(value):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    for name, value in tokens.items():
        if not value.is_floating_point():
            raise TypeError(f"{name} must be of floating point, got {value.dtype}")
    if not 0 < dt < math.inf:
        raise ValueError(f"dt must be a positive number, got {dt}")
    if q.dim() != 4:
        raise ValueError(f"q must have shape (B, N, H, D), got {tuple(q.shape)}")
    batch, _, heads, dim = q.shape
    if dim % 2:
        raise ValueError(
            f"the head dimension D must be even (R(V dt) turns pairs of entries), got D = {dim}"
        )
    shapes = ((tokens, q.shape), (rates, q.shape[:3]), (states, (batch, heads, dim, dim)))
    for named, expected in shapes:
        for name, value in named.items():
            if value.shape != expected:
                got = tuple(value.shape)
                raise ValueError(f"{name} must have shape {tuple(expected)}, got {got}")
    if not torch.compiler.is_compiling():  # looking at values would break the graph
        check_positive(gamma)
        if fast_weights is not None:
            check_finite(fast_weights)


# %% notebooks/02_memory.ipynb#recurrent
def memory_recurrent(q, k, v, gamma, potential, eta, dt=1.0, state=None):
    """The memory over a sequence, token by token: the definition, equation (eq-memory).

    Args:
        q, k, v: query, key (unit norm) and value, (B, N, H, D), D even. Tokens come before heads,
            other than in PyTorch's attention.
        gamma: decay rate Γ > 0, (B, N, H), 1 / time.
        potential: V, (B, N, H), rad / time.
        eta: learning rate η, (B, N, H).
        dt: time between two tokens.
        state: W before the first token, (B, H, D, D); None is an empty memory. One W for all rows:
            `W.expand(B, -1, -1, -1)`.

    Returns:
        y (B, N, H, D) in the dtype of `q` and W after the last token (B, H, D, D), in float32 or
        float64.

    Raises:
        TypeError, ValueError: see :func:`check_memory`.
    """
    check_memory(q, k, v, gamma, potential, eta, dt, state)
    batch, _, heads, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    fast_weights = q.new_zeros(batch, heads, dim, dim) if state is None else state
    fast_weights, outputs = fast_weights.to(wide), []
    # not x[:, t]: the gradient of a slice is as long as the whole sequence
    tokens = (x.to(wide).unbind(1) for x in (q, k, v, gamma, potential, eta))
    for token in zip(*tokens, strict=True):
        y, fast_weights = memory_step(*token, dt, fast_weights)
        outputs.append(y.to(q.dtype))
    return torch.stack(outputs, dim=1) if outputs else torch.empty_like(q), fast_weights


# %% notebooks/02_memory.ipynb#frame
def split(x, size):
    """(B, N, H, …) -> (B, N / size, H, size, …): cut the token axis into chunks; a view."""
    return x.unflatten(1, (-1, size)).transpose(2, 3)


def join(x):
    """(B, n, H, C, …) -> (B, n C, H, …): the inverse of :func:`split`."""
    return x.transpose(2, 3).flatten(1, 2)


# %% notebooks/02_memory.ipynb#angle
def cumulative_angle(angle):
    """Φ_t = Σ V dt up to and including token t, wrapped to [0, 2π]: equation (eq-rotating-frame).

    Args:
        angle: V dt, (B, N, H), rad.

    Returns:
        Φ, (B, N, H), rad, in the dtype of `angle`; summed in float64, because float32 loses the
        angle of a long sequence.
    """
    return torch.remainder(angle.double().cumsum(1), 2 * math.pi).to(angle.dtype)


def times(x, factor):
    """x times factor, as a new contiguous tensor: what matrix products want.

    The factor of a bfloat16 x is rounded to bfloat16.
    """
    if x.dtype == torch.bfloat16:  # on a CPU, two types in a product are two more passes over x
        factor = factor.to(x.dtype)
    if torch.compiler.is_compiling():
        return (x * factor).to(x.dtype).contiguous()  # a compiler does not keep the layout of `out`
    return torch.mul(x, factor, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def split_times(x, factor, size):
    """:func:`split` of x_t factor_t: (B, N, H, D) and (B, N, H) -> (B, N / size, H, size, D)."""
    return times(split(x, size), split(factor, size)[..., None])


def join_times(x, factor, size):
    """:func:`join` of x_t factor_t: (B, n, H, C, D) and (B, n C, H) -> (B, n C, H, D)."""
    factor = factor.unflatten(1, (-1, size))[..., None]
    return times(x.transpose(2, 3), factor).flatten(1, 2)


# %% notebooks/02_memory.ipynb#decays
GONE = 700.0  # e^{−700} is next to the smallest number of float64


def decays(gamma, dt):
    """Γ dt, (B, N, H), at most `GONE`: in a running sum a huge one would round the others away."""
    return (gamma * dt).clamp(max=GONE)


def chunk_decays(decay, size):
    """The four decays of equation (eq-chunk), none above 1.

    Args:
        decay: Γ dt, (B, N, H).
        size: chunk length C.

    Returns:
        `within` M = e^{−(g_t − g_s)} for s ≤ t and 0 above the diagonal, (B, n, H, C, C);
        `since` e^{−g_t}, from the start of the chunk to a token, (B, n, H, C, 1);
        `until` e^{−(g_C − g_t)}, from a token to the end of the chunk, (B, n, H, C, 1);
        `across` e^{−g_C}, the whole chunk, (B, n, H, 1, 1).
    """
    # in half-lives: e^{−g} = 2^{−g / ln 2}; in float64, or a token that forgets much would round
    # away what the others of its chunk forget
    g = split(decay.double() / math.log(2), size).cumsum(-1)
    later = decay.new_full((size, size), -torch.inf).triu(1)  # 2^{−∞} = 0
    within = (g[..., None, :] - g[..., :, None]).to(decay.dtype).add_(later).exp2_()
    since, until = (torch.exp2(x.to(decay.dtype)) for x in (-g, g - g[..., -1:]))
    return within, since[..., None], until[..., None], since[..., -1, None, None]


# %% notebooks/02_memory.ipynb#carry
def carry(first, added, across, backwards=False):
    """Hand a memory from chunk to chunk: x_{c+1} = across_c x_c + added_c.

    Args:
        first: x_0, (B, H, D, D).
        added, across: (B, n, H, D, D) and (B, n, H, 1, 1); summed in the dtype of `first`.
        backwards: from the last chunk to the first, x_{c−1} = across_c x_c + added_c.

    Returns:
        x that every chunk is given, (B, n, H, D, D), and what the last one in this order leaves,
        (B, H, D, D).
    """
    added, order = added.to(first.dtype), range(added.shape[1])
    order = order[::-1] if backwards else order
    if torch.compiler.is_compiling():  # a compiler does not write into a part of a tensor
        found = [first]
        for now in order:
            found.append(torch.addcmul(added[:, now], found[-1], across[:, now]))
        return torch.stack(found[-2::-1] if backwards else found[:-1], 1), found[-1]
    given = torch.empty_like(added)
    given[:, order[0]] = first
    for now, then in itertools.pairwise(order):
        torch.addcmul(added[:, now], given[:, now], across[:, now], out=given[:, then])
    end = order[-1]
    return given, torch.addcmul(added[:, end], given[:, end], across[:, end])


def products(a, b, c, d):
    """a @ b + c @ d for stacks of matrices, without an extra pass over the result."""
    first = a.flatten(0, 2) @ b.flatten(0, 2)
    return first.baddbmm_(c.flatten(0, 2), d.flatten(0, 2)).unflatten(0, a.shape[:3])


# %% notebooks/02_memory.ipynb#chunks
class Chunks(NamedTuple):
    """A sequence in chunks, in the rotating frame: the terms of equation (eq-chunk).

    Attributes:
        q: Q̃, (B, n, H, C, D).
        k: K̃, likewise.
        v_eta: V_η, likewise.
        scores: Q̃ K̃ᵀ ⊙ M, (B, n, H, C, C).
        within: M, likewise.
        since: e^{−g}, (B, n, H, C, 1).
        until: e^{−(g_C − g)}, likewise.
        across: e^{−g_C}, (B, n, H, 1, 1).
    """

    q: Tensor
    k: Tensor
    v_eta: Tensor
    scores: Tensor
    within: Tensor
    since: Tensor
    until: Tensor
    across: Tensor


# %% notebooks/02_memory.ipynb#to-chunks
def to_frame(x, spin, size):
    """R(−Φ) x in chunks: (B, N, H, D) and e^{−iΦ} (B, N, H) -> (B, n, H, C, D)."""
    return as_real(split_times(as_complex(x), spin, size)).to(x.dtype)


def with_decays(q, k, v_eta, decay):
    """Chunks of Q̃, K̃ and V_η, (B, n, H, C, D), and Γ dt, (B, N, H)."""
    within, *others = chunk_decays(decay, q.shape[-2])
    within = within.to(q.dtype)
    return Chunks(q, k, v_eta, (q @ k.mT).mul_(within), within, *others)


def to_chunks(q, k, v, decay, spin, eta, size):
    """Cut a sequence into chunks and turn it: what equation (eq-chunk) needs but the memory.

    Args:
        q, k, v: (B, N, H, D), N a multiple of `size`; their dtype is that of the products.
        decay: Γ dt, (B, N, H).
        spin: e^{−iΦ}, complex (B, N, H).
        eta: η, (B, N, H).
        size: chunk length C.

    Returns:
        Chunks.
    """
    return with_decays(
        to_frame(q, spin, size), to_frame(k, spin, size), split_times(v, eta, size), decay
    )


# %% notebooks/02_memory.ipynb#forward
def writes(chunks):
    """What each chunk adds to the memory, (e^{−(g_C − g)} ⊙ K̃)ᵀ V_η: (B, n, H, D, D)."""
    return times(chunks.k, chunks.until).mT @ chunks.v_eta


def answers(chunks, starts):
    """Y of equation (eq-chunk), (B, N, H, D), given each chunk's W̃_0, (B, n, H, D, D)."""
    return join(products(chunks.scores, chunks.v_eta, times(chunks.q, chunks.since), starts))


def chunked_forward(q, k, v, decay, spin, eta, fast_weights, size):
    """Equation (eq-chunk) for every chunk at once.

    Args:
        fast_weights: W before the first token, (B, H, D, D).
        q, k, v, decay, spin, eta, size: see :func:`to_chunks`.

    Returns:
        Y (B, N, H, D), the last W̃ (B, H, D, D), each chunk's W̃_0 (B, n, H, D, D), and the Chunks.
    """
    chunks = to_chunks(q, k, v, decay, spin, eta, size)
    starts, last = carry(fast_weights, writes(chunks), chunks.across)
    starts = starts.to(v.dtype)
    return answers(chunks, starts), last, starts, chunks


# %% notebooks/02_memory.ipynb#rate-gradients
def overlap(a, b):
    """⟨a, b⟩ of two memories, over the planes and the values: (…, D, D) -> complex (…)."""
    a, b = (x.unflatten(-2, (-1, 2)) for x in (a, b))  # (…, D / 2, 2, D)
    imag = a[..., 0, :] * b[..., 1, :] - a[..., 1, :] * b[..., 0, :]
    return torch.complex((a * b).sum((-3, -2, -1)), imag.sum((-2, -1)))


def rate_gradients(cq, ck, handed_on):
    """Gradients of Γ dt and V dt: equation (eq-complex-gradient).

    Args:
        cq, ck: c^q and c^k of each token, complex, (B, n, H, C).
        handed_on: ⟨dW̃_C, W̃_C⟩ at the end of each chunk, complex, (B, n, H).

    Returns:
        d(Γ dt) and d(V dt), (B, N, H).
    """
    later = (ck - cq.conj()).flip(-1).cumsum(-1).flip(-1)  # Σ over s ≥ t
    total = join(later - handed_on[..., None])
    return total.real, total.imag


def turn_back(x, dx, spin, size):
    """Leave the rotating frame: x̃ and dx̃, (B, n, H, C, D), and e^{−iΦ}, (B, N, H).

    dx̃ is overwritten.

    Returns:
        ⟨dx̃, x̃⟩ of each token, complex (B, n, H, C), and dx, (B, N, H, D).
    """
    dtype, dx = x.dtype, as_complex(dx)
    turned = as_real(join_times(dx, spin.conj(), size)).to(dtype)
    return dx.conj_physical_().mul_(as_complex(x)).sum(-1), turned


# %% notebooks/02_memory.ipynb#read-gradients
def read_gradients(chunks, dy):
    """What reading adds to the gradient of each W̃_0: the last term of equation (eq-backward).

    Args:
        chunks: Chunks.
        dy: gradient of Y, (B, N, H, D).

    Returns:
        dY in chunks and e^{−g} ⊙ dY, (B, n, H, C, D), and Q̃ᵀ (e^{−g} ⊙ dY), (B, n, H, D, D).
    """
    dy = split(dy, chunks.q.shape[-2]).contiguous()
    dy_since = times(dy, chunks.since)
    return dy, dy_since, chunks.q.mT @ dy_since


# %% notebooks/02_memory.ipynb#chunk-gradients
def chunk_gradients(chunks, starts, dends, handed_on, dy, dy_since, v, eta, spin):
    """Equations (eq-backward) and (eq-complex-gradient), given the gradients of the memories.

    Args:
        chunks, starts: Chunks, and each chunk's W̃_0, (B, n, H, D, D).
        dends: gradient of each chunk's W̃_C, (B, n, H, D, D).
        handed_on: ⟨dW̃_C, W̃_C⟩, complex, (B, n, H).
        dy, dy_since: the first two results of :func:`read_gradients`, (B, n, H, C, D).
        v, eta, spin: see :func:`to_chunks`.

    Returns:
        Gradients of q, k, v, Γ dt, V dt and η.
    """
    q, k, v_eta, scores, within, _, until, _ = chunks
    size, dends = q.shape[-2], dends.to(q.dtype)
    ds = (dy @ v_eta.mT).mul_(within)
    cq, dq = turn_back(q, products(ds, k, dy_since, starts.mT), spin, size)
    ck, dk = turn_back(k, products(ds.mT, q, times(v_eta, until), dends.mT), spin, size)
    dv_eta = products(scores.mT, dy, times(k, until), dends)
    deta = join((dv_eta * split(v, size)).sum(-1, dtype=eta.dtype))
    return dq, dk, join_times(dv_eta, eta, size), *rate_gradients(cq, ck, handed_on), deta


# %% notebooks/02_memory.ipynb#backward
def chunked_backward(chunks, starts, last, v, eta, spin, dy, dlast):
    """The backward pass of :func:`chunked_forward`.

    Args:
        chunks, starts, last: what it returned.
        v, eta, spin: its arguments.
        dy, dlast: gradients of Y (B, N, H, D) and of the last W̃ (B, H, D, D).

    Returns:
        Gradients of q, k, v, Γ dt, V dt, η and the first W.
    """
    dy, dy_since, dreads = read_gradients(chunks, dy)
    # the gradient of the memory, carried from the last chunk to the first
    dends, dfirst = carry(dlast, dreads, chunks.across, backwards=True)
    inner, outer = overlap(dends[:, :-1], starts[:, 1:]), overlap(dlast, last)  # ⟨dW̃_C, W̃_C⟩
    handed_on = torch.cat((inner, outer[:, None]), dim=1)
    return *chunk_gradients(chunks, starts, dends, handed_on, dy, dy_since, v, eta, spin), dfirst


# %% notebooks/02_memory.ipynb#function
def refuse_second_derivative():
    """Say that a backward pass by hand has none, rather than being silently wrong."""
    if torch.is_grad_enabled():  # which a backward pass is only for create_graph=True
        raise RuntimeError(
            "the chunked memory and a block have no second derivative; memory_recurrent has one"
        )


class ChunkedMemory(torch.autograd.Function):
    """:func:`chunked_forward` and :func:`chunked_backward` as one differentiable operation.

    Its products are in the dtype of q, k and v, and autocast does not change that; the memory it
    hands on, the decays and the angles are in that of the rates.
    """

    @staticmethod
    def forward(ctx, q, k, v, decay, angle, eta, fast_weights, size):
        """q, k, v, Γ dt, V dt, η, W, C -> Y and the last W."""
        spin = torch.polar(torch.ones_like(angle), -cumulative_angle(angle))  # e^{−iΦ}
        with torch.autocast(q.device.type, enabled=False):
            y, last, starts, chunks = chunked_forward(q, k, v, decay, spin, eta, fast_weights, size)
        # V_η is made again from v, which is kept anyway
        ctx.save_for_backward(*chunks._replace(v_eta=None), starts, last, v, eta, spin)
        # W_N = R(Φ_N) W̃_N; not a view, which could not be changed in place
        return y, turn(last, spin[:, -1].conj()).contiguous()

    @staticmethod
    def backward(ctx, dy, dlast):
        """Gradients of Y and the last W -> gradients of every tensor argument."""
        refuse_second_derivative()
        *chunks, starts, last, v, eta, spin = ctx.saved_tensors
        dlast = turn(dlast, spin[:, -1])
        with torch.autocast(dy.device.type, enabled=False):
            chunks = Chunks(*chunks)._replace(v_eta=split_times(v, eta, chunks[0].shape[-2]))
            return *chunked_backward(chunks, starts, last, v, eta, spin, dy, dlast), None


# %% notebooks/02_memory.ipynb#chunked
def pad(x, extra):
    """(B, N, …) -> (B, N + extra, …): zeros at the end of the token axis."""
    return torch.cat((x, x.new_zeros(x.shape[0], extra, *x.shape[2:])), dim=1) if extra else x


def check_chunks(q, mask, chunk_size):
    """Refuse, with a ValueError, a mask of another shape or type, or what is no chunk size."""
    if mask is not None and (mask.shape != q.shape[:2] or mask.dtype != torch.bool):
        got = f"{tuple(mask.shape)} of {mask.dtype}"
        raise ValueError(f"mask must have shape {tuple(q.shape[:2])} of torch.bool, got {got}")
    if not isinstance(chunk_size, Integral) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size}")


# %% notebooks/02_memory.ipynb#chunked-memory
def memory_chunked(q, k, v, gamma, potential, eta, dt=1.0, state=None, mask=None, chunk_size=64):
    """The memory over a sequence, chunk by chunk: equation (eq-chunk).

    Equal to :func:`memory_recurrent`, outputs and gradients, to rounding (but not for `torch.func`,
    which needs that one). In half precision the gradients of Γ and V are rounded as those of q and
    k are, which is coarse for Γ dt above 1; in float32 it is so above 10, where they are next to
    nothing.

    Args:
        q, k, v, gamma, potential, eta, dt, state: as for :func:`memory_recurrent`.
        mask: (B, N) bool, False where there is no token: nothing is forgotten, turned or written
            there, and y means nothing. All arguments must be finite there too, and Γ > 0.
        chunk_size: C ≥ 1, tokens handled by one matrix product; changes the speed, not the result.

    Returns:
        y (B, N, H, D) in the dtype of `q` and W after the last token (B, H, D, D), in float32 or
        float64.

    Raises:
        TypeError, ValueError: see :func:`check_memory` and :func:`check_chunks`.
    """
    check_memory(q, k, v, gamma, potential, eta, dt, state)
    check_chunks(q, mask, chunk_size)
    batch, length, heads, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        state = q.new_zeros(batch, heads, dim, dim)
    state = state.to(wide)
    if not length:
        return torch.empty_like(q), state
    gamma, potential, eta = (x.to(wide) for x in (gamma, potential, eta))
    if mask is not None:
        gamma, potential, eta = (x * mask[..., None] for x in (gamma, potential, eta))
    size = min(chunk_size, length)
    extra = -length % size
    narrow = (pad(x.to(q.dtype), extra) for x in (q, k, v))
    rates = (pad(x, extra) for x in (decays(gamma, dt), potential * dt, eta))
    y, last = ChunkedMemory.apply(*narrow, *rates, state, size)
    return y[:, :length], last


# %% notebooks/02_memory.ipynb#capacity
def retrieval_snr(pairs, dim):
    """Signal over crosstalk of one answer, random unit keys: equation (eq-retrieval-snr).

    Args:
        pairs: P > 1, associations stored.
        dim: d, key dimension.

    Returns:
        √(d / (P − 1)), a float.
    """
    return math.sqrt(dim / (pairs - 1))


def capacity(key_dim, value_dim):
    """Largest P with 2 P ln P ≤ d_k d_v: equation (eq-capacity).

    Args:
        key_dim, value_dim: d_k and d_v.

    Returns:
        P, an int: about how many associations can be told apart by the best match.
    """
    pairs = 1
    while 2 * (pairs + 1) * math.log(pairs + 1) <= key_dim * value_dim:
        pairs += 1
    return pairs


# %% notebooks/02_memory.ipynb#lag
def lag_snr(lag, gamma, dim):
    """Retrieval SNR, in a decaying memory, of what was written `lag` tokens ago: (eq-lag-snr).

    Args:
        lag: m ≥ 0, tokens; a float or a tensor.
        gamma: Γ dt > 0, per token; a float or a tensor.
        dim: d, key dimension.

    Returns:
        A tensor of the shape that both broadcast to.
    """
    lag, gamma = torch.as_tensor(lag), torch.as_tensor(gamma)
    return torch.exp(-gamma * lag) * torch.sqrt(-dim * torch.expm1(-2 * gamma))


def best_decay(lag):
    """The Γ dt at which what was written `lag` tokens ago is read best: (eq-lag-snr), ≈ 1 / 2m.

    Args:
        lag: m > 0, tokens.

    Returns:
        Γ dt per token, exact: the zero of d SNR / dΓ, ln(1 + 1/m) / 2.
    """
    return math.log1p(1 / lag) / 2
