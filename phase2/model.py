# Generated from notebooks/07_model.ipynb; edit the notebook, not this file.
"""The model."""

import difflib
import math
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phase2.consolidation import (
    MemoryState,
    choose,
    coherence_of,
    consolidate,
    empty_memory,
    remember,
    token,
)
from phase2.decay import DecayPotential, half_life, warn_overdamped
from phase2.memory import check_finite, check_positive, refuse_second_derivative
from phase2.resonance import BASES, MAX_ZETA_DIM, resonance_basis, resonance_info
from phase2.snr import snr_stats
from phase2.stability import energy, stability_metrics, violated, warn_unstable

__all__ = [
    "whole",
    "real",
    "one_of",
    "check_value",
    "check_fields",
    "CONFIG_RULES",
    "check_keys",
    "check_heads",
    "Phase2Config",
    "learning_rate",
    "for_products",
    "project",
    "previous",
    "blend",
    "blend_back",
    "SHORTEST",
    "LookBack",
    "row_ends",
    "look_back",
    "PART",
    "FEW",
    "MANY",
    "INTEL",
    "AVX512",
    "foreign",
    "shared",
    "convolved",
    "image",
    "rows_of",
    "linear",
    "linear_back",
    "Linear",
    "FeedForward",
    "network",
    "feed_forward",
    "step",
    "restore_basis",
    "WithBasis",
    "mix_tokens",
    "Phase2Block",
    "Part",
    "Layout",
    "move",
    "move_back",
    "each",
    "enter",
    "leave",
    "SPARSE",
    "similar",
    "plan",
    "part_by_part",
    "Phase2State",
    "empty_state",
    "check_state",
    "check_input",
    "check_token",
    "run_blocks",
    "run",
    "consolidate_where_due",
    "run_laid_out",
    "precision",
    "new_state",
    "cast_state",
    "is_plain",
    "advance",
    "stability_of",
    "diagnose_layers",
    "watch",
    "statistics",
    "PRESETS",
    "initialize",
    "one_or_fields",
    "leave_behind",
    "forget",
    "predict",
    "Phase2IntegratedModel",
    "uncompiled",
    "create_phase2_model",
]


# %% notebooks/07_model.ipynb#rules
def whole(lowest, highest=math.inf):
    """Rule for an integer from `lowest` to `highest`: a predicate, and what it allows in words."""

    def allowed(value):
        if not isinstance(value, Integral) or isinstance(value, bool):
            return False
        return lowest <= value <= highest

    upper = f"of at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
    return allowed, f"an integer {upper}"


def real(lowest, highest=math.inf, above=False):
    """Rule for a finite number from `lowest` (or `above` it) up to `highest`, likewise."""

    def allowed(value):
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        finite = abs(value) < math.inf  # also of an int that is no float
        return finite and lowest <= value <= highest and not (above and value == lowest)

    upper = f" and at most {highest:g}" if highest < math.inf else ""
    return allowed, f"a number {'above' if above else 'of at least'} {lowest:g}{upper}"


def one_of(names):
    """Rule for one of some names, likewise."""
    return lambda value: value in names, "one of " + ", ".join(names)


# %% notebooks/07_model.ipynb#check-value
def check_value(name, value, rule):
    """Refuse a value that a rule does not allow.

    Raises:
        ValueError: naming what it is, the value and what is allowed.
    """
    allowed, meaning = rule
    if not allowed(value):
        raise ValueError(f"{name} must be {meaning}, got {value!r}")


def check_fields(settings, rules):
    """:func:`check_value` for every attribute that has a rule; NumPy's numbers become Python's."""
    for name, rule in rules.items():
        value = getattr(settings, name)
        check_value(name, value, rule)
        if hasattr(value, "item"):
            object.__setattr__(settings, name, value.item())


# %% notebooks/07_model.ipynb#config-rules
CONFIG_RULES = {  # what is allowed in each field of `Phase2Config`
    **dict.fromkeys(["vocab_size", "d_model", "n_layers", "n_heads"], whole(1)),
    **dict.fromkeys(["n_seq", "consolidate_every"], whole(1)),
    **dict.fromkeys(["base_decay", "dt"], real(1e-12, 1e12)),
    "hebbian_eta": real(1e-30, 1e12),
    "snr_threshold": real(1e-3, 1e6),
    **dict.fromkeys(["snr_gamma_boost", "gamma_adjust_rate"], real(0, 1e30)),
    "snr_eta_boost": real(0, 1e12),
    "resonance_strength": real(0, highest=1),
    "resonance_basis": one_of(BASES),
}


def check_keys(keys, known):
    """Refuse a key that is not known, with the nearest one that is.

    Raises:
        ValueError: naming the key.
    """
    for key in keys:
        if key not in known:
            near = [k for k in known if k.startswith(key)] or difflib.get_close_matches(key, known)
            hint = f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"unknown key {key!r}{hint}")


# %% notebooks/07_model.ipynb#check-heads
def check_heads(config):
    """Refuse, with a ValueError, a width that cannot be cut into heads."""
    width, heads = config.d_model, config.n_heads
    if width % (2 * heads):
        need = f"an even multiple of n_heads = {heads}, for heads turn pairs of entries"
        raise ValueError(f"d_model must be {need}; got {width}")
    if config.resonance_basis == "zeta" and width > MAX_ZETA_DIM * heads:
        need = f"at most {MAX_ZETA_DIM} times n_heads = {heads} with resonance_basis 'zeta'"
        raise ValueError(f"d_model must be {need}; got {width}")


# %% notebooks/07_model.ipynb#config
@dataclass(frozen=True)
class Phase2Config:
    """Every choice of a model; `CONFIG_RULES` has what is allowed, ValueError names what is not."""

    vocab_size: int = 256  #: different tokens; 256 for bytes
    d_model: int = 256  #: width of the model
    n_layers: int = 4  #: blocks
    n_heads: int = 4  #: each of width d_model / n_heads, an even number
    n_seq: int = 1024  #: length it is trained at; any length runs
    base_decay: float = 1e-4  #: floor of Γ, 1 / time
    dt: float = 1.0  #: time between two tokens
    hebbian_eta: float = 0.1  #: η at initialization; a token chooses between 0 and twice it
    consolidate_every: int = 256  #: tokens, four times the width of a head of 64
    snr_threshold: float = 2.0  #: in units of the noise
    snr_gamma_boost: float = 1.0  #: Γ · time added to what is noise, at each consolidation
    snr_eta_boost: float = 0.0  #: most that is added to η, relative; off, as it does not help
    resonance_basis: str = "zeta"  #: one of `BASES`
    resonance_strength: float = 0.01  #: most that a mode loses at each consolidation, relative
    gamma_adjust_rate: float = 0.01  #: most that the controller adds to Γ, 1 / time

    def __post_init__(self):
        check_fields(self, CONFIG_RULES)
        check_heads(self)

    @property
    def head_dim(self):
        """Width of a head, D."""
        return self.d_model // self.n_heads

    def to_dict(self):
        """The fields by name, as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        """The inverse of `to_dict`; an unknown key is a ValueError with a suggestion."""
        check_keys(values, cls.__dataclass_fields__)
        return cls(**values)


# %% notebooks/07_model.ipynb#block-functions
def learning_rate(raw, hebbian_eta):
    """η = 2 η_0 sigmoid(raw), between 0 and 2 η_0.

    Args:
        raw: any real tensor.
        hebbian_eta: η_0, the rate at raw = 0.
    """
    return 2 * hebbian_eta * torch.sigmoid(raw)


def for_products(x):
    """x as autocast has it in products: cast once, where several of them read it."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def project(block, h):
    """[q, k, v] = relu(W_qkv h) in heads: (…, d) -> three of (…, H, D)."""
    return block.qkv(h).relu().unflatten(-1, (3, *block.key_mix.shape)).unbind(-3)


# %% notebooks/07_model.ipynb#previous-key
def previous(x, last, first=None):
    """What was before each token: (B, N, …), a new tensor.

    Args:
        x: (B, N, …).
        last: what was before the first token of a row, (B, …).
        first: (B, N, 1 …) bool, the first token of each row, and column 0; None is column 0 alone.
    """
    before = torch.cat((last[:, None], x[:, :-1]), dim=1)
    return before if first is None else torch.where(first, last[:, None], before)


def blend(x, mix, last, first=None):
    """m_t = (1 − μ) x_t + μ x_{t−1}; arguments as for :func:`previous`, `mix` is μ, (…)."""
    return torch.lerp(x, previous(x, last, first), mix)


def blend_back(dmixed, x, mix, last, first):
    """The backward pass of :func:`blend`: dm, which is overwritten -> dx, dμ and d`last`."""
    dmix = previous(x, last, first).sub_(x).mul_(dmixed).sum((0, 1))
    dbefore = dmixed * mix
    dx = dmixed.sub_(dbefore)
    if first is None:
        dlast = dbefore[:, 0]
    else:
        dlast = (dbefore * first).sum(1)
        dbefore.masked_fill_(first, 0)
    dx[:, :-1] += dbefore[:, 1:]
    return dx, dmix, dlast


# %% notebooks/07_model.ipynb#keys
SHORTEST = 1e-12  # a shorter key counts as none


class LookBack(torch.autograd.Function):
    """u = m / ‖m‖ of m = (1 − μ) k_t + μ k_{t−1}: equation (eq-look-back)."""

    @staticmethod
    def forward(ctx, k, mix, last, first):
        """k (B, N, H, D), μ (H, D), and `last` and `first` of :func:`previous` -> u."""
        unit = blend(k, mix, last, first)
        length = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        shortest = max(SHORTEST, torch.finfo(k.dtype).tiny)
        scale = 1 / F.threshold(length, shortest, math.inf)
        ctx.save_for_backward(k, mix, last, first, unit.mul_(scale), scale)
        return unit

    @staticmethod
    def backward(ctx, du):
        """du -> gradients of k, μ and `last`."""
        refuse_second_derivative()
        *inputs, unit, scale = ctx.saved_tensors
        along = (unit * du).sum(-1, keepdim=True)
        dmixed = torch.addcmul(du, unit, along, value=-1).mul_(scale)
        return *blend_back(dmixed, *inputs), None


# %% notebooks/07_model.ipynb#look-back
def row_ends(x, last, mask=None):
    """What looking back needs where a row begins, and leaves where it ends.

    Args:
        x: (B, N, …), N > 0.
        last: what was before the first token of a row, (B, …).
        mask: (B, N) bool, False where a row has no token; the tokens of a row are contiguous.

    Returns:
        `last` in the dtype of x, `first` of :func:`previous`, and the last x of each row, (B, …),
        in float32 or float64.
    """
    before, first, end = last.to(x.dtype), None, x[:, -1]
    if mask is not None:
        ones = (1,) * (x.dim() - 2)
        first = F.pad(mask[:, 1:] & ~mask[:, :-1], (1, 0), value=True).view(*mask.shape, *ones)
        place = torch.arange(x.shape[1], device=x.device) * mask
        end = x[torch.arange(len(x), device=x.device), place.amax(1)]
        end = torch.where(mask.any(1).view(-1, *ones), end, before)
    # a copy, for a view would keep all of x in the state
    return before, first, end.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def look_back(k, mix, last, mask=None):
    """Unit keys that look back one token: k_t ← (1 − μ) k_t + μ k_{t−1}, scaled to length 1.

    Args:
        k: (B, N, H, D).
        mix: μ, (H, D).
        last, mask: the key before the first token, (B, H, D), and see :func:`row_ends`.

    Returns:
        Keys (B, N, H, D) with ‖k‖ = 1 (0 where a mixture is 0), and each row's last raw key.
    """
    if not k.shape[1]:
        return k, last
    before, first, end = row_ends(k, last, mask)
    return LookBack.apply(k, mix.to(k.dtype), before, first), end


# %% notebooks/07_model.ipynb#linear
PART = 64  # rows of a weight that one thread reads at a time
FEW = 64  # rows of x up to which reading the weight is what a product costs
MANY = 20480  # numbers in x above which PyTorch leaves a convolution to oneDNN
# before PyTorch 2.11 nobody says, and then all is left to it
INTEL = "Intel" in getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "Intel")
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def foreign(x):
    """Does `F.linear` leave x to a library that was made for other processors?"""
    return x.is_cpu and x.dtype == torch.float32 and not (INTEL or torch.is_autocast_enabled("cpu"))


def shared(x, weight):
    """Is x Wᵀ better read in parts by all threads?"""
    few = x.numel() <= FEW * x.shape[-1]
    if not (foreign(x) and few) or weight.numel() < 2**16 or weight.shape[0] % PART:
        return False
    # in this order, for a compiler cannot go on where the number of threads is asked for
    return torch.compiler.is_compiling() or torch.get_num_threads() > 1


def convolved(x):
    """Is x Wᵀ faster as a convolution?"""
    return AVX512 and foreign(x) and x.numel() > max(MANY, FEW * x.shape[-1])


def image(x):
    """(…, d) -> (1, d, 1, rows), a picture of one line with d colours; the same memory."""
    return x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)


def rows_of(picture):
    """(1, d, 1, rows) -> (rows, d): undoes :func:`image`."""
    return picture.permute(0, 2, 3, 1).flatten(0, 2)


# %% notebooks/07_model.ipynb#linear-products
def linear(x, weight):
    """x Wᵀ: (…, d) and (n, d) -> (…, n)."""
    n, d = weight.shape
    if convolved(x):  # dilation changes nothing here, but with it one thread takes oneDNN too
        y = rows_of(F.conv2d(image(x), weight[:, :, None, None], dilation=2))
    elif shared(x, weight):
        parts = weight.view(-1, PART, d).mT  # (n / PART, d, PART)
        y = torch.bmm(x.reshape(-1, d).expand(n // PART, -1, -1), parts).transpose(0, 1)
    else:
        return F.linear(x, weight)
    return y.reshape(*x.shape[:-1], n)


def linear_back(dy, x, weight):
    """dy (rows, n) -> gradients of x (rows, d) and W (n, d) in :func:`linear`."""
    if not convolved(x):
        return dy @ weight, dy.T @ x
    window = (1, 1), (0, 0), (2, 2), False, (0, 0), 1  # stride, padding, dilation, and defaults
    tensors = image(dy), image(x), weight[:, :, None, None], None
    dx, dweight, _ = torch.ops.aten.convolution_backward(*tensors, *window, (True, True, False))
    return rows_of(dx), dweight.view_as(weight)


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` without bias, by :func:`linear`."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        """x (…, inputs) -> (…, outputs)."""
        return linear(x, self.weight)


# %% notebooks/07_model.ipynb#activation
class FeedForward(torch.autograd.Function):
    """relu(m W↑ᵀ)² W↓ᵀ with m = (1 − ν) x_t + ν x_{t−1}: equation (eq-network).

    For the backward pass it keeps x and r = relu(m W↑ᵀ), and neither m nor the square of r.
    """

    @staticmethod
    def forward(ctx, x, mix, last, first, up, down):
        """x (B, N, d), ν (d,), `last` and `first` of :func:`previous`, W↑ and W↓ -> (B, N, d)."""
        relu = linear(blend(x, mix, last, first).flatten(0, 1), up).relu_()  # (B N, 4d)
        ctx.save_for_backward(x, mix, last, first, up, down, relu)
        return linear(relu.square(), down).view_as(x)

    @staticmethod
    def backward(ctx, dy):
        """dy -> gradients of x, ν, `last`, W↑ and W↓."""
        refuse_second_derivative()
        *inputs, up, down, relu = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        # the derivative of r² is 2 r; dy is where doubling costs least, and W↓ wants half of that
        dhidden, ddown = linear_back(2 * dy, relu.square(), down)
        dmixed, dup = linear_back(dhidden.mul_(relu), blend(*inputs).flatten(0, 1), up)
        return *blend_back(dmixed.view_as(inputs[0]), *inputs), None, dup, ddown / 2


# %% notebooks/07_model.ipynb#feed-forward
def network(x, up, down):
    """relu(x W↑ᵀ)² W↓ᵀ of single tokens, (…, d)."""
    return linear(linear(x, up).relu_().square(), down)


def feed_forward(x, mix, up, down, last, mask=None):
    """The network of equation (eq-network), which looks back one token.

    Args:
        x: (B, N, d).
        mix: ν, (d,).
        up, down: W↑ (4d, d) and W↓ (d, 4d).
        last, mask: the x before the first token, (B, d), and see :func:`row_ends`.

    Returns:
        (B, N, d), in half precision under autocast (but for float64), and each row's last x.
    """
    if not x.shape[1]:
        return x, last
    x, up, down = (for_products(w) for w in (x, up, down))
    before, first, end = row_ends(x, last, mask)
    weights = mix.to(x.dtype), before, first, up, down
    with torch.autocast(x.device.type, enabled=False):
        return FeedForward.apply(x, *weights), end


# %% notebooks/07_model.ipynb#step
def step(block, x, state, position):
    """What :meth:`Phase2Block.forward` does with a single token, (B, 1, d_model), unchecked.

    Returns:
        x, state, Γ and V (B, 1, H), as there.
    """
    config, wide = block.config, torch.promote_types(x.dtype, torch.float32)
    h, x = block.memory_norm(x)[:, 0], x[:, 0]  # (B, d)
    q, k, v = (x.to(wide) for x in project(block, h))  # (B, H, D)
    potential, gamma = block.potential(h)  # (B, H)
    eta = learning_rate(block.eta(h).to(wide), config.hebbian_eta)
    if position and position % config.consolidate_every == 0:
        state = consolidate(state, block.basis, config)
    key = torch.lerp(k, state.last_key, block.key_mix.to(wide))
    key = key / F.threshold(torch.linalg.vector_norm(key, dim=-1, keepdim=True), SHORTEST, math.inf)
    y, gamma, state = token(q, key, v, gamma, potential, eta, state, config.dt)
    y = F.layer_norm(y, y.shape[-1:]).to(x.dtype)
    x = x + block.out(y.flatten(1))
    f = block.mlp_norm(x)
    mixed = torch.lerp(f, state.last_input.to(f.dtype), block.mlp_mix.to(f.dtype))
    x = x + network(mixed, block.up, block.down)
    state = state._replace(last_key=k, last_input=f.to(wide))
    return x[:, None], state, gamma[:, None], potential[:, None]


# %% notebooks/07_model.ipynb#restore-basis
def restore_basis(module, *_):
    """Make the basis of a :class:`WithBasis` anew, where its parameters are."""
    config, like = module.config, next(module.parameters())
    dtype = torch.promote_types(like.dtype, torch.float32)
    with torch.inference_mode(False):  # a basis of that mode could not be trained with
        basis = resonance_basis(config.resonance_basis, config.head_dim, dtype)
        module.basis = basis.to(like.device)


class WithBasis(torch.nn.Module):
    """A module with a `config` and its `basis`, which no cast rounds and no move from `meta` loses.

    The basis is no weight and not part of a saved model.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        basis = resonance_basis(config.resonance_basis, config.head_dim, dtype)
        self.register_buffer("basis", basis, persistent=False)
        self.register_load_state_dict_post_hook(restore_basis)  # with assign=True weights can move

    def _apply(self, fn, recurse=True):
        """What `to` and its like do to every tensor."""
        super()._apply(fn, recurse)
        restore_basis(self)
        return self


# %% notebooks/07_model.ipynb#mix-tokens
def mix_tokens(block, x, state, position, mask=None):
    """The first half of a :class:`Phase2Block`: what its memory adds to x.

    Args:
        block: Phase2Block.
        x, state, position, mask: see its `forward`.

    Returns:
        W_o norm(memory(norm(x))), (B, N, d_model); MemoryState, Γ and V (B, N, H).
    """
    h = for_products(block.memory_norm(x))
    q, k, v = project(block, h)  # (B, N, H, D)
    wide = torch.promote_types(x.dtype, torch.float32)  # rates need more digits
    potential, gamma = block.potential(h)  # (B, N, H)
    eta = learning_rate(block.eta(h).to(wide), block.config.hebbian_eta)
    keys, last_key = look_back(k, block.key_mix, state.last_key, mask)
    rest = state, position, block.basis, block.config, mask
    y, gamma, state = remember(q, keys, v, gamma, potential, eta, *rest)
    y = block.out(F.layer_norm(y, y.shape[-1:]).flatten(2))
    return y, state._replace(last_key=last_key), gamma, potential


# %% notebooks/07_model.ipynb#block
class Phase2Block(WithBasis):
    """Memory, then a two-layer network that adds nothing in a new block: equation (eq-block).

    Attributes:
        fast_weight_state: W after the model's last call, detached, (B, H, D, D), or None.
    """

    def __init__(self, config):
        super().__init__(config)
        d, heads, self.fast_weight_state = config.d_model, config.n_heads, None
        self.memory_norm = torch.nn.LayerNorm(d)
        self.qkv = Linear(d, 3 * d)
        self.potential = DecayPotential(d, heads, config.base_decay, config.dt)
        self.eta = torch.nn.Linear(d, heads)
        self.key_mix = torch.nn.Parameter(torch.full((heads, d // heads), 0.5))
        self.out = Linear(d, d)
        self.mlp_norm = torch.nn.LayerNorm(d)
        self.mlp_mix = torch.nn.Parameter(torch.full((d,), 0.5))
        # a network that adds nothing at first; `initialize` draws those of a model
        self.up = torch.nn.Parameter(torch.eye(4 * d, d))
        self.down = torch.nn.Parameter(torch.zeros(d, 4 * d))

    def forward(self, x, state=None, position=0, mask=None):
        """x (B, N, d_model), and the others as in :func:`~phase2.consolidation.remember`; no state
        is :func:`~phase2.consolidation.empty_memory` -> x, MemoryState, Γ and V (B, N, H)."""
        if state is None:
            heads, width = self.key_mix.shape
            wide = torch.promote_types(x.dtype, torch.float32)
            state = empty_memory(len(x), heads, width, x.device, wide)
        if x.shape[1] == 1 and mask is None:
            return step(self, x, state, position)
        y, state, gamma, potential = mix_tokens(self, x, state, position, mask)
        x = x + y
        weights = self.mlp_mix, self.up, self.down
        y, last_input = feed_forward(self.mlp_norm(x), *weights, state.last_input, mask)
        return x + y, state._replace(last_input=last_input), gamma, potential


# %% notebooks/07_model.ipynb#layout
class Part(NamedTuple):
    """Some documents of a batch, each in a row of its own.

    Attributes:
        source: row of the batch and position in it, two (T,) indices, for the T tokens of them.
        target: row of the document and position in it, two (T,) indices.
        shape: (rows, length) of these documents.
    """

    source: tuple
    target: tuple
    shape: tuple


class Layout(NamedTuple):
    """Where each token of a padded or packed batch goes. Documents are numbered part by part.

    Attributes:
        parts: Part after Part, together all documents.
        rows: the rows of the batch that hold a token, (R,).
        first: the first document of each of them, (R,).
        last: the last document of each of them, (R,).
        length: tokens in the last document of each of them, (R,).
    """

    parts: list
    rows: Tensor
    first: Tensor
    last: Tensor
    length: Tensor


# %% notebooks/07_model.ipynb#layout-move
def move(x, part):
    """(B, N, …) -> (rows, length, …), zero where there is no token."""
    return x.new_zeros(*part.shape, *x.shape[2:]).index_put(part.target, x[part.source])


def move_back(xs, layout, like):
    """What :func:`move` gave of each part -> (B, N, …), the shape of `like`, zero at padding."""
    values = torch.cat([x[part.target] for x, part in zip(xs, layout.parts, strict=True)])
    source = [torch.cat(index) for index in zip(*(part.source for part in layout.parts))]
    return values.new_zeros(*like.shape, *values.shape[1:]).index_put(source, values)


def each(function, states, others):
    """Apply a function to each pair of tensors in two tuples of MemoryState."""
    pairs = zip(states, others, strict=True)
    return tuple(MemoryState(*map(function, state, other)) for state, other in pairs)


def enter(states, layout, empty):
    """States (B, …) -> states of the documents: a row's first one continues, others are new."""

    def take(x, new):
        return new.index_copy(0, layout.first, x[layout.rows])

    return each(take, states, empty)


def leave(states, layout, before):
    """States of the documents -> states (B, …): that of a row's last document."""

    def take(x, old):
        return old.index_copy(0, layout.rows, x[layout.last])

    return each(take, states, before)


# %% notebooks/07_model.ipynb#layout-plan
SPARSE = 4  # cells for each token, above which documents of similar length are read together


def similar(size):
    """The group of each document: one for all, or one for each power of two of its length."""
    if not len(size) or len(size) * size.max() <= SPARSE * size.sum():
        return torch.zeros_like(size)
    return size.double().log2().ceil().long()


def plan(attention_mask, offsets):
    """Plan the move of a padded or packed batch.

    Args:
        attention_mask: (B, N) int, 0 for padding, else the number of the document.
        offsets: (B,) how far each row already is in its current stretch.

    Returns:
        Layout.
    """
    rows, columns = attention_mask.nonzero(as_tuple=True)  # in reading order
    number = attention_mask[rows, columns]
    fresh = torch.ones_like(rows, dtype=torch.bool)  # does this token start a document?
    fresh[1:] = (rows[1:] != rows[:-1]) | (number[1:] != number[:-1])
    document = fresh.cumsum(0) - 1
    starts = fresh.nonzero().squeeze(1)
    owner = rows[starts]  # row of the batch that each document comes from
    held, count = owner.unique_consecutive(return_counts=True)
    last = count.cumsum(0) - 1
    first = last - count + 1
    begin = torch.zeros_like(owner)  # a document that continues starts inside its stretch
    begin[first] = offsets.to(owner.device)[held]
    place = torch.arange(len(rows), device=rows.device) - starts[document] + begin[document]
    length = torch.bincount(document, minlength=len(owner))
    parts, rank = part_by_part((rows, columns), document, place, length + begin)
    return Layout(parts, held, rank[first], rank[last], length[last])


# %% notebooks/07_model.ipynb#layout-parts
def part_by_part(source, document, place, size):
    """The parts of a Layout.

    Args:
        source: of all tokens, see Part.
        document, place: of each token, its document and position in the row of that, (T,).
        size: how long that row is, (documents,).

    Returns:
        A list of Part, and the number of each document when they are counted part by part.
    """
    group = similar(size)
    rank = group.argsort(stable=True).argsort()
    parts, before = [], 0
    for number in group.unique() if len(group) else [0]:
        mine = group == number
        inside = mine[document]
        target = (rank[document][inside] - before, place[inside])
        shape = (int(mine.sum()), int(size[mine].max()) if len(size) else 0)
        parts.append(Part(tuple(index[inside] for index in source), target, shape))
        before += shape[0]
    return parts, rank


# %% notebooks/07_model.ipynb#model-state
class Phase2State(NamedTuple):
    """All that a model carries from one call to the next, of the same size however much was read.

    :func:`~phase2.checkpoints.save_state` keeps it in a file.

    Attributes:
        layers: one MemoryState a layer.
        position: tokens that each row has read of its present document, a tuple of B ints.
    """

    layers: tuple
    position: tuple

    def map(self, function):
        """The same state with a function applied to each tensor of its memories, not to rows."""
        layers = (MemoryState(*map(function, layer)) for layer in self.layers)
        return self._replace(layers=tuple(layers))

    def detach(self):
        """The same state without its history: for training on one piece of a text after another."""
        return self.map(Tensor.detach)

    def positions(self):
        """`position` as a tensor, (B,), on the CPU."""
        return torch.tensor(self.position, dtype=torch.long, device="cpu")

    def select(self, rows):
        """The state of some rows, in this order: indices, or a (B,) mask of bool."""
        rows = torch.as_tensor(rows)
        rows = (rows.nonzero().flatten() if rows.dtype == torch.bool else rows).tolist()
        position = tuple(self.position[row] for row in rows)
        return self.map(lambda x: x[rows])._replace(position=position)

    @staticmethod
    def cat(states):
        """The state of a batch of the rows of several states, one after the other."""
        layers, positions = zip(*states, strict=True)
        layers = (MemoryState(*map(torch.cat, zip(*layer))) for layer in zip(*layers))
        return Phase2State(tuple(layers), sum(positions, ()))


# %% notebooks/07_model.ipynb#empty-state
def empty_state(config, batch, device=None, dtype=torch.float32):
    """The state of a model that has read nothing: Phase2Config, B -> Phase2State."""
    shape = (batch, config.n_heads, config.head_dim)
    layers = (empty_memory(*shape, device, dtype) for _ in range(config.n_layers))
    return Phase2State(tuple(layers), (0,) * batch)


# %% notebooks/07_model.ipynb#check-state
def check_state(state, batch, config):
    """Refuse what is no state (TypeError), or one for another model or batch (ValueError)."""
    if not isinstance(state, Phase2State):
        raise TypeError(f"state must be a Phase2State, got {type(state).__name__}")
    position = state.position
    if not isinstance(position, tuple) or any(type(x) is not int or x < 0 for x in position):
        raise TypeError(
            f"position of a state must be a tuple of ints of at least 0, got {position}"
        )
    if len(state.position) != batch:
        raise ValueError(f"state is for a batch of {len(state.position)}, got {batch} rows")
    dim = config.head_dim
    expected = [(batch, config.n_heads, dim, dim)] * config.n_layers
    found = [tuple(layer.fast_weights.shape) for layer in state.layers]
    if found != expected:
        model = f"{config.n_layers} layers with {config.n_heads} heads of width {dim}"
        raise ValueError(f"state must be of {model}, got memories of shapes {found}")


# %% notebooks/07_model.ipynb#check-input
def check_input(input_ids, state, attention_mask, config):
    """Refuse a call that cannot mean anything, before anything is computed.

    Raises:
        TypeError: `input_ids` or the mask is no tensor, or the state no Phase2State.
        ValueError: wrong rank or type of `input_ids`, an id outside the vocabulary, a mask or a
            state that does not fit; see :func:`check_state`.
    """
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    for name, value in given.items():
        if not torch.is_tensor(value) and (value is not None or name == "input_ids"):
            hint = "; tokenizer.encode(text)[None] makes one" if isinstance(value, str) else ""
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{hint}")
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        got = f"{tuple(input_ids.shape)} of {input_ids.dtype}"
        raise ValueError(f"input_ids must be integers of shape (B, N), got {got}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        got, want = tuple(attention_mask.shape), tuple(input_ids.shape)
        raise ValueError(f"attention_mask must have the shape of input_ids, {want}, got {got}")
    if attention_mask is not None and attention_mask.is_floating_point():
        got = f"{attention_mask.dtype} (one that is added to scores has no meaning here)"
        raise ValueError(f"attention_mask must be of bool or integers, 0 for padding, got {got}")
    if state is not None:
        check_state(state, len(input_ids), config)
    if input_ids.numel() and not torch.compiler.is_compiling():
        # not every unsigned type has a minimum
        low, high = (x.item() for x in input_ids.long().aminmax())
        if low < 0 or high >= config.vocab_size:
            wrong, size = low if low < 0 else high, config.vocab_size
            raise ValueError(
                f"input_ids must be from 0 to {size - 1} (vocab_size {size}), got {wrong}"
            )


# %% notebooks/07_model.ipynb#check-token
def check_token(logits, layers, gammas, states):
    """What :func:`phase2.memory.check_memory` says of values, for single tokens, afterwards.

    Every element of a memory is read, so one that is not finite shows in the logits.

    Args:
        logits: of a single token, (B, 1, vocab_size).
        layers, states: MemoryState of each layer before and after it.
        gammas: Γ of each layer, (B, 1, H).

    Raises:
        ValueError: a memory that is not finite, Γ that is no number, or logits that are none.
    """
    if torch.compiler.is_compiling():  # looking at values would break the graph
        return
    if not math.isfinite(logits.sum(dtype=torch.float64).item()):
        for before, gamma, after in zip(layers, gammas, states, strict=True):
            check_finite(before.fast_weights)
            check_positive(gamma)
            check_finite(after.fast_weights)
        raise ValueError("logits must be finite, they hold NaN or infinity (are the weights?)")


# %% notebooks/07_model.ipynb#run
def run_blocks(model, input_ids, layers, position, mask=None):
    """Tokens through embedding, blocks and output layer.

    Returns:
        Logits (B, N, vocab_size), the new states, and Γ and V of every layer, (B, N, H).
    """
    x, states, gammas, potentials = model.embedding(input_ids), [], [], []
    for block, state in zip(model.blocks, layers, strict=True):
        x, state, gamma, potential = block(x, state, position, mask)
        states.append(state), gammas.append(gamma), potentials.append(potential)
    logits = model.head(model.norm(x))
    if input_ids.shape[1] == 1:
        check_token(logits, layers, gammas, states)
    return logits, tuple(states), gammas, potentials


def run(model, input_ids, state, attention_mask):
    """:func:`run_blocks` for any batch: one that is padded or packed is laid out first.

    Returns:
        Logits, the new Phase2State, and Γ and V of every layer.
    """
    (batch, length), layers, position = input_ids.shape, state.layers, state.position
    if is_plain(attention_mask, position):
        start = position[0] if batch else 0
    elif attention_mask is None and length == 1:  # a token of each, where they are
        layers, start = consolidate_where_due(model, state), 0
    else:
        return run_laid_out(model, input_ids, state, attention_mask)
    logits, layers, *rates = run_blocks(model, input_ids, layers, start)
    return logits, Phase2State(layers, tuple(read + length for read in position)), *rates


# %% notebooks/07_model.ipynb#run-laid-out
def consolidate_where_due(model, state):
    """The memories of a Phase2State, consolidated in the rows that are at the end of a stretch."""
    position, config = state.positions(), model.config
    due = (position > 0) & (position % config.consolidate_every == 0)
    if not due.any():
        return state.layers
    due, pairs = due.to(model.embedding.weight.device), zip(model.blocks, state.layers, strict=True)
    return tuple(choose(due, consolidate(x, block.basis, config), x) for block, x in pairs)


def run_laid_out(model, input_ids, state, attention_mask):
    """:func:`run` with each document in a row of its own."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    layout = plan(attention_mask, state.positions() % model.config.consolidate_every)
    sizes = [part.shape[0] for part in layout.parts]
    looked = consolidate_where_due(model, state)
    start = enter(looked, layout, new_state(model, sum(sizes)).layers)
    found, layers = [], [zip(*(x.split(sizes) for x in layer), strict=True) for layer in start]
    for part, *states in zip(layout.parts, *layers, strict=True):
        mask = move(torch.ones_like(input_ids, dtype=torch.bool), part)
        states = [MemoryState(*x) for x in states]
        found.append(run_blocks(model, move(input_ids, part), states, 0, mask))
    logits, layers, *rates = zip(*found, strict=True)
    logits = move_back(logits, layout, input_ids)
    rates = [[move_back(x, layout, input_ids) for x in zip(*rate)] for rate in rates]
    ends = [MemoryState(*map(torch.cat, zip(*layer))) for layer in zip(*layers)]
    state = Phase2State(leave(ends, layout, state.layers), advance(state.positions(), layout))
    return logits, state, *rates


# %% notebooks/07_model.ipynb#run-helpers
def precision(model):
    """The dtype of a model's memories: float32, or float64 if the model is."""
    return torch.promote_types(model.embedding.weight.dtype, torch.float32)


def new_state(model, batch):
    """:func:`empty_state` on the device and in the precision of a model."""
    return empty_state(model.config, batch, model.embedding.weight.device, precision(model))


def cast_state(state, model):
    """A state in the precision of a model."""
    dtype = precision(model)
    if state.layers[0].fast_weights.dtype == dtype:
        return state
    return state.map(lambda x: x.to(dtype))


def is_plain(attention_mask, position):
    """Does every row of the batch hold one document without padding, all equally far along?"""
    if any(read != position[0] for read in position):
        return False
    if attention_mask is None or not attention_mask.numel():
        return True
    first = attention_mask[:, :1]
    return bool(((attention_mask == first) & (first != 0)).all())


def advance(position, layout):
    """`position` after the call, that of each row's last document; given as a tensor, (B,)."""
    rows, one = layout.rows.cpu(), (layout.first == layout.last).cpu()
    began = torch.where(one, position[rows], 0)
    return tuple(position.index_copy(0, rows, began + layout.length.cpu()).tolist())


# %% notebooks/07_model.ipynb#stability-of
def stability_of(state, elapsed):
    """:func:`~phase2.stability.stability_metrics`, `elapsed` (B,) after the last consolidation."""
    now = energy(state.fast_weights)
    metrics = (elapsed[:, None], state.bound, coherence_of(state), state.gamma_shift)
    return stability_metrics(now, state.last_energy, *metrics)


# %% notebooks/07_model.ipynb#diagnose
def diagnose_layers(model, state, gammas):
    """What each layer's memory looks like after a call.

    Returns:
        dict of lists, one entry a layer: `gamma_values` (B, N, H), and the dicts of
        :func:`~phase2.snr.snr_stats`, :func:`~phase2.resonance.resonance_info` and
        :func:`~phase2.stability.stability_metrics` as `snr_stats`, `resonance_info` and
        `stability_metrics`.

    Raises:
        ValueError: there is no row to look at.
    """
    if not len(state.position):
        raise ValueError("diagnostics need at least one row, got a batch of 0")
    config, every = model.config, model.config.consolidate_every
    elapsed = ((state.positions() - 1).clamp(min=0) % every + 1) * config.dt
    elapsed = elapsed.to(model.embedding.weight.device)
    pairs = list(zip(model.blocks, (s.fast_weights.detach() for s in state.layers), strict=True))
    return {
        "gamma_values": [gamma.detach() for gamma in gammas],
        "snr_stats": [snr_stats(w, config.snr_threshold) for _, w in pairs],
        "resonance_info": [resonance_info(w, block.basis) for block, w in pairs],
        "stability_metrics": [stability_of(s, elapsed) for s in state.layers],
    }


# %% notebooks/07_model.ipynb#watch
def watch(model, gammas, potentials, state):
    """Warn, once per model and cause, of memories that are overdamped or driven.

    Looking costs a synchronization with the device, so a model looks at its first call and whenever
    diagnostics are asked for.
    """
    model.watched = gammas[0].numel() > 0  # a call without tokens shows nothing
    if "overdamped" not in model.warned and model.watched:
        gamma, potential = (torch.stack(x).detach() for x in (gammas, potentials))
        if warn_overdamped(gamma, potential):
            model.warned.add("overdamped")
    for layer in state.layers if "unstable" not in model.warned else ():
        now = energy(layer.fast_weights.detach())
        unstable = violated(now, layer.last_energy, coherence_of(layer), layer.last_coherence)
        if warn_unstable(unstable, now, model.config.gamma_adjust_rate):
            model.warned.add("unstable")
            return


# %% notebooks/07_model.ipynb#statistics
def statistics(model):
    """Sizes of a model and of what its memories hold.

    Returns:
        dict with `num_parameters`, `num_trainable_parameters`, `num_layers` and `block_stats`, for
        each block `num_parameters`, the Frobenius `fast_weight_norm` after the last call (None
        before any), and the `half_life` of each head where the input is 0, that of its bias alone,
        in units of time.
    """
    parameters = list(model.parameters())
    blocks = []
    for block in model.blocks:
        state, zero = block.fast_weight_state, torch.zeros_like(block.memory_norm.weight)
        lives = half_life(block.potential(zero)[1]).tolist()
        norm = None if state is None else state.float().norm().item()
        size = sum(p.numel() for p in block.parameters())
        blocks.append({"num_parameters": size, "fast_weight_norm": norm, "half_life": lives})
    return {
        "num_parameters": sum(p.numel() for p in parameters),
        "num_trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "num_layers": len(blocks),
        "block_stats": blocks,
    }


# %% notebooks/07_model.ipynb#initialize
PRESETS = {
    "small": Phase2Config(d_model=256, n_layers=4, n_heads=4, n_seq=512),
    "base": Phase2Config(d_model=512, n_layers=8, n_heads=8, n_seq=1024),
    "large": Phase2Config(d_model=1024, n_layers=24, n_heads=16, n_seq=2048),
}


def initialize(model):
    """Weights of a new model: unit embedding, branches of 3/4 its size together, a faint output."""
    depth = 2 * len(model.blocks)
    with torch.no_grad():
        for block in model.blocks:
            block.up.normal_(std=(3 * block.up.shape[1]) ** -0.5)
            for branch in (block.out.weight, block.down):
                branch.normal_(std=(depth * branch.shape[1]) ** -0.5)
            block.eta.weight.normal_(std=0.1 * block.eta.in_features**-0.5)
            block.eta.bias.zero_()
        model.head.weight.normal_(std=0.5 * model.head.in_features**-0.5)


def one_or_fields(kind, name, given, values):
    """A dataclass `kind`: the one given as `name`, or one of its fields by name, but not both.

    Raises:
        TypeError: what is given is no `kind`.
        ValueError: both are given, or a field that is unknown or not allowed.
    """
    if given is None:
        check_keys(values, kind.__dataclass_fields__)
        return kind(**values)
    if values:
        raise ValueError(f"give {name} or its fields, not both; got {name} and {', '.join(values)}")
    if not isinstance(given, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(given).__name__}")
    return given


# %% notebooks/07_model.ipynb#leave-behind
def leave_behind(model, state):
    """Keep the final memories, detached, on the blocks: there to be looked at, never read again."""
    for block, layer in zip(model.blocks, state.layers, strict=True):
        block.fast_weight_state = layer.fast_weights.detach()


def forget(model):
    """Clear what the last call left behind."""
    for block in model.blocks:
        block.fast_weight_state = None


# %% notebooks/07_model.ipynb#predict
def predict(
    model, input_ids, state=None, attention_mask=None, return_diagnostics=False, return_state=False
):
    """Logits of the next token at every position, (B, N, vocab_size): a model's `forward`.

    Args:
        model: Phase2IntegratedModel.
        input_ids: (B, N) integers below vocab_size; any N.
        state: Phase2State to go on from; None is an empty memory. Gradients flow through it, unless
            it is `state.detach()`.
        attention_mask: (B, N) bool or integers, of these tokens alone; 0 for padding, other numbers
            tell packed documents apart, of which the first in a row goes on from `state`.
        return_diagnostics: also return :func:`diagnose_layers`; changes no logit.
        return_state: also return the Phase2State after the last token.

    Returns:
        Logits; then the diagnostics and the state, if asked for.

    Raises:
        TypeError, ValueError: see :func:`check_input`; rates or memories that are not finite; or
            diagnostics of a batch of 0.
    """
    check_input(input_ids, state, attention_mask, model.config)
    input_ids = input_ids.long()  # a tokenizer may save space
    state = new_state(model, len(input_ids)) if state is None else cast_state(state, model)
    logits, state, gammas, potentials = run(model, input_ids, state, attention_mask)
    leave_behind(model, state)
    if return_diagnostics or not model.watched:
        watch(model, gammas, potentials, state)
    diagnostics = (diagnose_layers(model, state, gammas),) if return_diagnostics else ()
    extra = (*diagnostics, state) if return_state else diagnostics
    return (logits, *extra) if extra else logits


# %% notebooks/07_model.ipynb#model
class Phase2IntegratedModel(torch.nn.Module):
    """A language model whose memory is written by association, and forgets.

    Called with token ids it is :func:`predict`; `get_statistics` is :func:`statistics`, and
    `reset_state` is :func:`forget`.

    Args:
        config: Phase2Config; or give its fields by name.

    Raises:
        TypeError, ValueError: see :func:`create_phase2_model`.
    """

    def __init__(self, config=None, **values):
        super().__init__()
        self.config = config = one_or_fields(Phase2Config, "config", config, values)
        self.embedding = torch.nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = torch.nn.ModuleList(Phase2Block(config) for _ in range(config.n_layers))
        self.norm = torch.nn.LayerNorm(config.d_model)
        self.head = Linear(config.d_model, config.vocab_size)
        self.warned, self.watched = set(), False
        initialize(self)

    forward = predict
    get_statistics = statistics
    reset_state = forget


def uncompiled(model):
    """A model without what torch.compile puts around it; TypeError if it is none of ours."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, Phase2IntegratedModel):
        kind = type(model).__name__
        raise TypeError(f"model must be a Phase2IntegratedModel, compiled or not, got {kind}")
    return model


# %% notebooks/07_model.ipynb#create
def create_phase2_model(preset=None, config=None, **values):
    """A new model from a preset, from a configuration, or from fields by name.

    Args:
        preset: "small", "base" or "large"; `values` then replace single fields of it.
        config: Phase2Config, given alone.
        values: fields of Phase2Config.

    Returns:
        Phase2IntegratedModel.

    Raises:
        ValueError: an unknown preset or field, a value that is not allowed, or preset and config.
        TypeError: config is no Phase2Config.
    """
    if preset is None:
        return Phase2IntegratedModel(config, **values)
    if config is not None:
        raise ValueError("give preset or config, not both")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    check_keys(values, Phase2Config.__dataclass_fields__)
    return Phase2IntegratedModel(replace(PRESETS[preset], **values))
