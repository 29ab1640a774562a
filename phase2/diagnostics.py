# Generated from notebooks/10_diagnostics.ipynb; edit the notebook, not this file.
"""Diagnostics."""

import base64
import html
import io
import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from phase2.decay import window
from phase2.inference import as_ids, text_ids
from phase2.memory import cumulative_angle, rotate
from phase2.model import Phase2State, check_value, look_back, project, real, whole
from phase2.stability import energy
from phase2.training import need

__all__ = [
    "observe",
    "snapshot",
    "numbers",
    "over_time",
    "effective_rank",
    "decaying_rank",
    "halved",
    "equally_driven",
    "distances",
    "forgetting",
    "measured_window",
    "doubling",
    "Traces",
    "traces",
    "Recall",
    "recall",
    "check_recall",
    "votes",
    "Report",
    "save",
    "plain",
    "SNAPSHOTS",
    "diagnose",
    "PLACES",
    "REACH",
    "is_place",
    "measure_windows",
    "compile_report",
    "number",
    "columns",
    "mean",
    "table",
    "layer_color",
    "by_layer",
    "heat_map",
    "draw_gamma",
    "draw_snr",
    "draw_energy",
    "draw_resonance",
    "draw_stable",
    "draw_memory",
    "PANELS",
    "plot",
    "PAGE",
    "page",
]


# %% notebooks/10_diagnostics.ipynb#observe
@torch.no_grad()
def observe(model, ids, piece):
    """Read a text in pieces and take a snapshot of the memories after each.

    Args:
        model: Phase2IntegratedModel.
        ids: token ids, a list, a 1-D tensor or array.
        piece: tokens between two snapshots.

    Returns:
        Iterator of the number of tokens read so far, the diagnostics of
        :func:`phase2.model.diagnose_layers` and the Phase2State.

    Raises:
        TypeError, ValueError: `ids` are none of those, or `piece` is below 1.
    """
    check_value("piece", piece, whole(1))
    state, device = None, model.embedding.weight.device
    for start in range(0, len(ids), piece):
        part = as_ids(ids[start : start + piece], device)[None]  # (1, ≤ piece)
        _, seen, state = model(part, state, return_diagnostics=True, return_state=True)
        yield start + part.shape[1], seen, state


# %% notebooks/10_diagnostics.ipynb#snapshot
def snapshot(seen, state):
    """One snapshot of every layer, in plain numbers.

    Args:
        seen, state: from :func:`observe`, of one row.

    Returns:
        A dict for each layer, with the names of `seen`: `gamma_values` has the mean Γ of each head
        over the piece, `stability_metrics` also `energy_by_head` and `energy_bound_by_head`,
        E and the most it can be.
    """
    snapshots = []
    for layer, memory in enumerate(state.layers):
        taken = {name: numbers(seen[name][layer]) for name in seen if name != "gamma_values"}
        taken["gamma_values"] = seen["gamma_values"][layer][0].mean(0).tolist()
        taken["stability_metrics"]["energy_by_head"] = energy(memory.fast_weights)[0].tolist()
        taken["stability_metrics"]["energy_bound_by_head"] = memory.bound[0].square().tolist()
        snapshots.append(taken)
    return snapshots


def numbers(values):
    """The entries of a dict that are single numbers."""
    return {name: value for name, value in values.items() if isinstance(value, float)}


def over_time(snapshots):
    """[{a: x}, {a: y}, …] -> {a: [x, y, …]}, within dicts as well."""
    if not isinstance(snapshots[0], dict):
        return snapshots
    return {name: over_time([one[name] for one in snapshots]) for name in snapshots[0]}


# %% notebooks/10_diagnostics.ipynb#rank
def effective_rank(fast_weights):
    """How many directions a memory uses: equation (eq-effective-rank).

    The exponential of the entropy of the normalized singular values.

    Args:
        fast_weights: W, (..., D, D).

    Returns:
        r, (...), from 1 to D, in float32; 0 for an empty memory, NaN for one that is not finite.
    """
    finite = fast_weights.isfinite().all((-2, -1), keepdim=True)
    s = torch.linalg.svdvals(torch.where(finite, fast_weights.float(), 0.0))  # (..., D)
    total = s.sum(-1)
    # p_i = s_i / Σ s_j;  r = exp(−Σ p_i ln p_i)
    p = s / total[..., None]
    rank = torch.where(total > 0, torch.exp(torch.special.entr(p).sum(-1)), 0.0)
    return torch.where(finite[..., 0, 0], rank, torch.nan)


# %% notebooks/10_diagnostics.ipynb#decaying-rank
def decaying_rank(gamma):
    """Effective rank of a memory of orthogonal writes that decay: equation (eq-decaying-rank).

    Args:
        gamma: Γ dt > 0 of one token.

    Raises:
        ValueError: gamma is not positive.
    """
    check_value("gamma", gamma, real(0, above=True))
    kept, lost = math.exp(-gamma), -math.expm1(-gamma)  # κ and 1 − κ
    # ln r = −ln(1 − κ) − κ ln κ / (1 − κ)
    return math.exp(-math.log(lost) + gamma * kept / lost)


# %% notebooks/10_diagnostics.ipynb#forgetting
def halved(state):
    """A batch from one row: row 0 as it is, row 1 + l with half the memory of layer l."""
    rows, layers = 1 + len(state.layers), []
    for layer, memory in enumerate(state.layers):
        memory = type(memory)(*(x.repeat(rows, *[1] * (x.dim() - 1)) for x in memory))
        for x in (memory.fast_weights, memory.earlier):
            x[1 + layer] *= 0.5
        layers.append(memory)
    return Phase2State(tuple(layers), state.position * rows)


def equally_driven(state):
    """All rows with the coherence of row 0: the stability controller then treats them alike."""
    layers = []
    for memory in state.layers:
        size = energy(memory.fast_weights)  # (rows, H)
        share = torch.where(size[0] > 0, size / size[0], 1.0)
        limits = {
            "bound": memory.bound[0] * share.sqrt(),
            "incoherent": memory.incoherent[0] * share,
        }
        layers.append(memory._replace(**limits))
    return state._replace(layers=tuple(layers))


# %% notebooks/10_diagnostics.ipynb#forgetting-run
def distances(state):
    """‖ΔW‖ between row 0 and row 1 + l in layer l, (layers, H)."""
    memories = (layer.fast_weights for layer in state.layers)
    missing = (w[0] - w[1 + layer] for layer, w in enumerate(memories))
    return torch.stack([x.norm(dim=(-2, -1)) for x in missing])


@torch.no_grad()
def forgetting(model, state, ids, lags):
    """How much of each memory is left after reading on: ‖ΔW‖ of equation (eq-window).

    Args:
        model, state: Phase2IntegratedModel and the Phase2State of one row.
        ids: token ids that are read from there on, 1-D tensor.
        lags: increasing numbers of tokens, at most len(ids).

    Returns:
        ‖ΔW‖ after each of `lags`, relative to that before, (lags, layers, H); NaN if it was empty.
    """
    every, state = model.config.consolidate_every, halved(state)
    first, sizes = distances(state), []
    looks = range(-state.position[0] % every, lags[-1], every)
    # read up to each look, so that the controller finds equal coherences there
    for start, stop in pairwise(sorted({0, *lags, *looks})):
        part = ids[None, start:stop].expand(len(state.position), -1)
        _, state = model(part, equally_driven(state), return_state=True)
        if stop in lags:
            sizes.append(distances(state))
    return torch.stack(sizes) / first


# %% notebooks/10_diagnostics.ipynb#window
def measured_window(lags, depth):
    """Tokens until a memory has fallen to 1/e: equation (eq-window).

    Args:
        lags: increasing numbers of tokens.
        depth: −ln of what is left after each.

    Returns:
        m, interpolated between lags, or extrapolated from the last one if even then more is left;
        infinite if nothing has been lost or `depth` is NaN, as for an empty memory.
    """
    before, height = 0, 0.0
    for lag, value in zip(lags, depth, strict=True):
        if value >= 1:
            return before + (lag - before) * (1 - height) / (value - height)
        before, height = lag, value
    return before / height if height > 0 else math.inf


def doubling(most):
    """1, 2, 4, … up to and including `most`."""
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]


# %% notebooks/10_diagnostics.ipynb#traces
class Traces(NamedTuple):
    """What one layer asked and wrote while it read N tokens, and the memory that came of it.

    Attributes:
        q: queries, (N, H, D).
        k: keys, turned to where they stand after the last token, (N, H, D).
        v: values, (N, H, D).
        fast_weights: W after the last token, (H, D, D).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    fast_weights: Tensor


@torch.no_grad()
def traces(model, ids, layer):
    """Read a text (N,) from an empty memory and keep what a layer asked and wrote: Traces."""
    block, seen = model.blocks[layer], []
    handle = block.memory_norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        _, state = model(ids[None], return_state=True)
    finally:
        handle.remove()
    q, k, v = project(block, seen[0])  # (1, N, H, D)
    k, _ = look_back(k, block.key_mix, torch.zeros_like(k[:, 0]))
    potential, _ = block.potential(seen[0])
    angle = cumulative_angle(potential.double() * model.config.dt)  # Φ, (1, N, H)
    turned = rotate(k, (angle[:, -1:] - angle).to(k.dtype))  # R(Φ_N − Φ_s) k_s
    return Traces(q[0], turned[0], v[0], state.layers[layer].fast_weights[0])


# %% notebooks/10_diagnostics.ipynb#recall-answer
class Recall(NamedTuple):
    """What a memory answers to a key.

    Attributes:
        answer: y = Wᵀ k, (D,).
        positions: tokens of the text whose values are most similar to it, most similar first.
        similarity: their cosines.
        votes: probability of each token if this answer alone decided, (vocab_size,).
    """

    answer: Tensor
    positions: Tensor
    similarity: Tensor
    votes: Tensor


# %% notebooks/10_diagnostics.ipynb#recall
@torch.no_grad()
def recall(model, text, layer, head, key=None, top=5):
    """Read a text, ask one memory for one key, and say what comes back: equation (eq-votes).

    Args:
        model: Phase2IntegratedModel.
        text: a text, a file or token ids, see :func:`phase2.inference.text_ids`, read from an empty
            memory.
        layer, head: which memory, from 0.
        key: a vector (D,); or a position in the text, for the key written there; None asks what the
            model asks after the last token.
        top: how many positions to name.

    Returns:
        Recall.

    Raises:
        TypeError, ValueError: the text is empty, or no integers of the vocabulary; a layer, head,
            position or key does not exist; `top` is below 1.
    """
    ids = text_ids(model, text).to(model.embedding.weight.device)
    check_recall(model.config, len(ids), layer, head, key, top)
    trace = traces(model, ids, layer)
    if not torch.is_tensor(key):  # the model's own question, or a position
        key = trace.q[-1, head] if key is None else trace.k[key, head]
    memory = trace.fast_weights[head]
    answer = memory.mT @ key.to(memory)  # (D,)
    similarity = torch.cosine_similarity(answer, trace.v[:, head].to(memory), dim=-1)  # (N,)
    similarity, positions = similarity.topk(min(top, len(ids)))
    return Recall(answer, positions, similarity, votes(model, layer, head, answer))


# %% notebooks/10_diagnostics.ipynb#recall-helpers
def check_recall(config, length, layer, head, key, top):
    """Refuse a memory or a key that does not exist.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    if not length:
        raise ValueError("text must hold at least one token, got none")
    dim = config.head_dim
    wanted = {"layer": (layer, config.n_layers), "head": (head, config.n_heads)}
    if isinstance(key, Integral):
        wanted["key"] = (key, length)
    elif key is not None and not (torch.is_tensor(key) and key.shape == (dim,)):
        got = f"one of {tuple(key.shape)}" if torch.is_tensor(key) else type(key).__name__
        raise ValueError(f"key must be a position, None or a tensor of shape ({dim},), got {got}")
    for name, (value, limit) in wanted.items():
        check_value(name, value, whole(0, highest=limit - 1))
    check_value("top", top, whole(1))


def votes(model, layer, head, answer):
    """The prediction that one answer (D,) would make alone: equation (eq-votes), (vocab_size,)."""
    block, dim = model.blocks[layer], len(answer)
    y = torch.nn.functional.layer_norm(answer, (dim,)).to(model.embedding.weight.dtype)
    alone = y.new_zeros(model.config.d_model)  # what `out` is given if the other heads are silent
    alone[head * dim : (head + 1) * dim] = y
    return torch.softmax(model.head(model.norm(block.out(alone))).float(), dim=-1)


# %% notebooks/10_diagnostics.ipynb#report
@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`diagnose` found; prints as a table.

    Attributes:
        model_config: the configuration, by field.
        model_statistics: `num_parameters` and `num_layers`.
        tokens: tokens read before each snapshot.
        diagnostics: lists, an entry a layer, named as the model's own: over snapshots, but for
            `diag_energy` and `mask` at the end, (H, D). `gamma_values` (means over a piece),
            `energy_by_head` and `energy_bound_by_head` have a number for each head.
        memory: for each layer, lists over heads: `effective_rank` at the end, and in tokens
            `window` from Γ and `measured_window`, and over how many tokens that was `followed`.
    """

    model_config: dict
    model_statistics: dict
    tokens: list
    diagnostics: dict
    memory: list

    def __repr__(self):
        return table(self)

    def plot(self):
        """A Matplotlib figure: Γ, SNR, energy, resonance, stable ratio, memories."""
        return plot(self)

    def to_json(self, path=None):
        """The report as JSON text, written to `path` if given; what is not finite is null."""
        return save(json.dumps(asdict(self), indent=2, allow_nan=False), path)

    def to_html(self, path=None):
        """The report as one HTML page that needs nothing else, written to `path` if given."""
        return save(page(self), path)


# %% notebooks/10_diagnostics.ipynb#report-helpers
def save(text, path):
    """Write a text to a file, if one is named, and return it."""
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def plain(value):
    """Nested dicts and lists of numbers, with None for what is not finite."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# %% notebooks/10_diagnostics.ipynb#diagnose
SNAPSHOTS = 128  # about as many as a figure can show


def diagnose(model, text, piece=None):
    """Read a text and report what happens in the memories.

    Args:
        model: Phase2IntegratedModel.
        text: a text, a file or token ids, see :func:`phase2.inference.text_ids`; at least two.
        piece: tokens between two snapshots, at most half of the text; None takes 16, or a 128th of
            a long text.

    Returns:
        Report.

    Raises:
        TypeError, ValueError: see :func:`phase2.inference.text_ids`; less than two tokens, or a
            `piece` below 1.
    """
    ids = text_ids(model, text).to(model.embedding.weight.device)
    if len(ids) < 2:
        raise ValueError(f"text must be at least two tokens, got {len(ids)}")
    if piece is not None:
        check_value("piece", piece, whole(1))
    piece = min(piece or max(16, -(-len(ids) // SNAPSHOTS)), -(-len(ids) // 2))  # two at least
    snapshots, places = {}, {}
    for read, seen, state in observe(model, ids, piece):
        snapshots[read] = snapshot(seen, state)
        if is_place(read, piece, len(ids)):
            places[read] = state
    lost = measure_windows(model, places, ids)
    return compile_report(model, snapshots, seen, state, lost)


# %% notebooks/10_diagnostics.ipynb#places
PLACES = 4  # where forgetting is followed
REACH = 512  # tokens over which it is


def is_place(read, piece, length):
    """Is this snapshot the first after one of the places, spread over the first half of a text?"""
    before, now = (min(2 * PLACES * n // length, PLACES) for n in (read - piece, read))
    return now > before and read < length


def measure_windows(model, places, ids):
    """The window of every memory, equation (eq-window), averaged over places of a text.

    Args:
        model: Phase2IntegratedModel.
        places: Phase2State after so many tokens of the text, by that number.
        ids: the text, (N,).

    Returns:
        For each layer a list over heads, in tokens; and over how many tokens it was followed, what
        is longer is extrapolated.
    """
    lags = doubling(min(REACH, len(ids) - max(places)))
    left = [forgetting(model, state, ids[read:], lags) for read, state in places.items()]
    left = torch.stack(left)
    left = left.clamp(min=torch.finfo(left.dtype).eps)  # below that rounding is all there is
    depth = -left.log().mean(0).permute(1, 2, 0)  # (layers, H, lags)
    return [[measured_window(lags, head) for head in layer] for layer in depth.tolist()], lags[-1]


# %% notebooks/10_diagnostics.ipynb#compile
def compile_report(model, snapshots, seen, state, windows):
    """The Report of a text that was read.

    Args:
        model: Phase2IntegratedModel.
        snapshots: a :func:`snapshot` by the number of tokens read before it.
        seen, state: the last diagnostics and Phase2State.
        windows: what :func:`measure_windows` returns.
    """
    windows, followed = windows
    pieces = torch.tensor([0, *snapshots]).diff().float()  # tokens between two snapshots
    layers = [over_time(list(layer)) for layer in zip(*snapshots.values(), strict=True)]
    diagnostics = {name: [layer[name] for layer in layers] for name in seen}
    memory = []
    for layer, held in enumerate(state.layers):
        info = seen["resonance_info"][layer]
        ends = {name: info[name][0].tolist() for name in ("diag_energy", "mask")}
        diagnostics["resonance_info"][layer].update(ends)
        gamma = pieces @ torch.tensor(diagnostics["gamma_values"][layer]) / pieces.sum()  # (H,)
        memory.append(
            {
                "effective_rank": effective_rank(held.fast_weights)[0].tolist(),
                "window": window(gamma * model.config.dt).tolist(),
                "measured_window": windows[layer],
                "followed": followed,
            }
        )
    statistics = model.get_statistics()
    sizes = {name: statistics[name] for name in ("num_parameters", "num_layers")}
    found = plain({"diagnostics": diagnostics, "memory": memory})
    return Report(model.config.to_dict(), sizes, list(snapshots), **found)


# %% notebooks/10_diagnostics.ipynb#table
def number(x):
    """A number in three digits, or all before the point; what is no float as it is."""
    if not isinstance(x, float):
        return str(x)
    return f"{x:,.0f}" if 999.5 <= abs(x) < 1e9 else f"{x:.3g}"


def columns(header, rows):
    """Rows of numbers and words under their names, as lines of text; None is a dash."""
    cells = [["—" if x is None else number(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    return ["  ".join(x.rjust(width) for x, width in zip(row, widths)) for row in (header, *cells)]


def mean(values):
    """The mean of those that are not None, or None."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def table(report):
    """A Report as text: a line for each memory, then one for each layer."""
    found, memories, layers = report.diagnostics, [], []
    for layer, memory in enumerate(report.memory):
        stability = found["stability_metrics"][layer]
        ends = [stability[f"{name}_by_head"][-1] for name in ("energy", "energy_bound")]
        followed, windows = memory["followed"], memory["measured_window"]
        windows = [f"~ {number(x)}" if x and x > followed else x for x in windows]
        rows = zip(memory["window"], windows, memory["effective_rank"], *ends)
        memories += [(layer, head, *row) for head, row in enumerate(rows)]
        resonant = found["resonance_info"][layer]["resonant_share"][-1]
        stable, alike = mean(stability["stable_ratio"]), mean(stability["coherence"])
        layers.append((layer, found["snr_stats"][layer]["mean_snr"][-1], resonant, stable, alike))
    size = report.model_statistics["num_parameters"]
    title = f"{len(layers)} layers, {size} parameters, {report.tokens[-1]} tokens read"
    names = "layer, head, window from Γ, measured, effective rank, energy, energy bound".split(", ")
    more = ("layer", "mean SNR", "resonant share", "stable ratio", "largest coherence")
    note = f"~ extrapolated: a memory is followed over {followed} tokens"
    return "\n".join([title, "", *columns(names, memories), note, "", *columns(more, layers)])


# %% notebooks/10_diagnostics.ipynb#panels
def layer_color(layer, layers):
    """From dark (the first layer) to light (the last)."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.1 + 0.75 * layer / max(layers - 1, 1))


def by_layer(axes, report, series, **style):
    """One line over the text for each layer; series(layer) is a list over snapshots."""
    layers = len(report.memory)
    for layer in range(layers):
        values = [math.nan if value is None else value for value in series(layer)]
        label = f"layer {layer}" if layers <= 8 and "ls" not in style else None
        axes.plot(report.tokens, values, color=layer_color(layer, layers), label=label, **style)
    axes.set_xlabel("tokens read")


def heat_map(axes, report, rows, label, **style):
    """Rows (one a memory) as a heat map, with the layers marked."""
    rows = [[math.nan if value is None else value for value in row] for row in rows]
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis", **style)
    axes.figure.colorbar(image, ax=axes, label=label)
    heads = len(rows) // len(report.memory)
    step = -(-len(report.memory) // 8)
    axes.set_yticks([heads * layer - 0.5 for layer in range(0, len(report.memory), step)])
    axes.set_yticklabels(range(0, len(report.memory), step))
    axes.set_ylabel("layer, a row a head")
    axes.grid(False)


# %% notebooks/10_diagnostics.ipynb#panels-time
def draw_gamma(axes, report):
    """Γ of every head over the text."""
    from matplotlib.colors import LogNorm

    rows = [row for layer in report.diagnostics["gamma_values"] for row in zip(*layer, strict=True)]
    edges = {"extent": (0, report.tokens[-1], len(rows) - 0.5, -0.5)}
    heat_map(axes, report, rows, "Γ, 1 / time", norm=LogNorm(), **edges)
    axes.set_xlabel("tokens read")


def draw_snr(axes, report):
    """Mean SNR of each layer over the text."""
    by_layer(axes, report, lambda layer: report.diagnostics["snr_stats"][layer]["mean_snr"])
    axes.set_ylabel("mean SNR")


def draw_energy(axes, report):
    """Energy of each layer, and the most it could be."""

    def total(name):
        looks = [layer[f"{name}_by_head"] for layer in report.diagnostics["stability_metrics"]]
        return lambda layer: [None if None in look else sum(look) for look in looks[layer]]

    by_layer(axes, report, total("energy"))
    by_layer(axes, report, total("energy_bound"), ls="--", lw=1)
    axes.set(yscale="log", ylabel="energy; dashed: bound")


# %% notebooks/10_diagnostics.ipynb#panels-end
def draw_resonance(axes, report):
    """diag_energy of every memory at the end, relative to the mean of that memory."""
    infos = (info["diag_energy"] for info in report.diagnostics["resonance_info"])
    rows = [
        [x / (mean(row) or 1) if x is not None else None for x in row]
        for info in infos
        for row in info
    ]
    heat_map(axes, report, rows, "energy / mean", vmin=0, vmax=4)
    axes.set_xlabel("mode")


def draw_stable(axes, report):
    """Share of snapshots at which a memory has no more energy than after its last look."""
    layers = report.diagnostics["stability_metrics"]
    ratios = [mean(layer["stable_ratio"]) or 0 for layer in layers]
    colors = [layer_color(layer, len(layers)) for layer in range(len(layers))]
    axes.bar(range(len(layers)), ratios, color=colors)
    axes.set(
        xlabel="layer",
        ylabel="stable ratio",
        ylim=(0, 1),
        xticks=range(0, len(layers), -(-len(layers) // 8)),
    )


def draw_memory(axes, report):
    """Effective rank of every memory against its measured window."""
    for layer, memory in enumerate(report.memory):
        color = layer_color(layer, len(report.memory))
        points = zip(memory["measured_window"], memory["effective_rank"], strict=True)
        known = [point for point in points if None not in point]
        axes.plot([x for x, _ in known], [y for _, y in known], "o", color=color)
    axes.margins(y=0.1)  # whole dots
    axes.set(xscale="log", xlabel="window, tokens", ylabel="effective rank")
    axes.set_ylim(bottom=0)


# %% notebooks/10_diagnostics.ipynb#plot
PANELS = {
    "Decay rate": draw_gamma,
    "Signal over noise": draw_snr,
    "Energy and its bound": draw_energy,
    "Resonance": draw_resonance,
    "Stable ratio": draw_stable,
    "Memories": draw_memory,
}


def plot(report):
    """See :meth:`Report.plot`. ImportError without Matplotlib."""
    figure, grid = need("matplotlib.pyplot").subplots(3, 2, figsize=(10, 10), layout="constrained")
    for axes, (title, draw) in zip(grid.flat, PANELS.items(), strict=True):
        draw(axes, report)
        axes.set_title(title)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    return figure


# %% notebooks/10_diagnostics.ipynb#html
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Phase 2 diagnostics</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff }}
body {{ max-width: 64rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ overflow: auto; background: #f5f6f7; padding: 1rem }}
div {{ overflow: auto }}
img {{ width: 100%; min-width: 44rem; border-radius: 0.5rem }}
@media (prefers-color-scheme: dark) {{
  body {{ color: #dde1e6; background: #14181c }}
  pre {{ background: #1f252b }}
}}
</style>
</head>
<body>
<h1>Phase 2 diagnostics</h1>
<pre>{table}</pre>
<div><img alt="{alt}" src="data:image/png;base64,{png}"></div>
<details><summary>All numbers, as JSON</summary><pre>{json}</pre></details>
</body>
</html>
"""


# %% notebooks/10_diagnostics.ipynb#html-page
def page(report):
    """See :meth:`Report.to_html`. ImportError without Matplotlib."""
    figure, png = plot(report), io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    need("matplotlib.pyplot").close(figure)
    return PAGE.format(
        table=html.escape(table(report)),
        alt=html.escape("; ".join(draw.__doc__.rstrip(".") for draw in PANELS.values())),
        png=base64.b64encode(png.getvalue()).decode(),
        json=html.escape(report.to_json()),
    )
