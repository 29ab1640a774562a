"""The report says what is in the memories, and looking changes nothing."""

import copy
import json
import math
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from phase2.diagnostics import (
    PLACES,
    SNAPSHOTS,
    decaying_rank,
    diagnose,
    doubling,
    draw_gamma,
    draw_memory,
    draw_stable,
    effective_rank,
    forgetting,
    is_place,
    layer_color,
    mean,
    measured_window,
    number,
    observe,
    over_time,
    recall,
    snapshot,
    traces,
)
from phase2.memory import memory_recurrent
from phase2.model import Phase2Config, create_phase2_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_phase2_model(d_model=32, n_layers=2, n_heads=2, consolidate_every=16)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (500,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def report(model, ids):
    return diagnose(model, ids)


def orthonormal(dim):
    return torch.linalg.qr(torch.randn(dim, dim)).Q


@pytest.mark.parametrize("n", [1, 3, 8])
def test_effective_rank_counts_equal_directions_whatever_their_size(n):
    u, v = orthonormal(8), orthonormal(8)
    memory = torch.stack([s * u[:, :n] @ v[:n] for s in (1e-6, 1.0, 1e6)])
    assert effective_rank(memory).tolist() == pytest.approx([n] * 3, rel=1e-3)


def test_effective_rank_of_an_empty_memory_and_bounds():
    assert effective_rank(torch.zeros(2, 3, 8, 8)).eq(0).all()
    ranks = effective_rank(torch.randn(100, 8, 8))
    assert (ranks > 1).all() and (ranks < 8).all()


@pytest.mark.parametrize("gamma", [0.3, 1.0, 3.0])
def test_effective_rank_of_a_decaying_memory_of_orthogonal_writes(gamma):
    dim = 64
    k, v = (orthonormal(dim)[None, :, None] for _ in range(2))
    one = torch.ones(1, dim, 1)
    _, memory = memory_recurrent(k, k, v, gamma * one, 0 * one, one)
    assert effective_rank(memory).item() == pytest.approx(decaying_rank(gamma), rel=0.01)


def test_rank_of_a_slow_memory_is_e_over_gamma():
    assert decaying_rank(1e-4) == pytest.approx(math.e / 1e-4, rel=1e-3)


@pytest.mark.parametrize("gamma", [0.01, 0.3, 1.0, 5.0])
def test_window_of_an_exponential_is_one_over_gamma(gamma):
    for most in (1, 7, 1000):  # within reach, or extrapolated
        lags = doubling(most)
        assert lags[-1] == most and lags == sorted(set(lags))
        assert measured_window(lags, [gamma * lag for lag in lags]) == pytest.approx(1 / gamma)


def test_window_of_what_is_not_lost_or_lost_at_once():
    assert measured_window([1, 2], [0.0, 0.0]) == math.inf
    assert measured_window([1, 2], [math.inf, math.inf]) == 0
    assert measured_window([1, 2], [math.nan, math.nan]) == math.inf


def test_memories_are_forgotten_by_gamma_alone_without_consolidation(ids):
    model = create_phase2_model(d_model=32, n_layers=2, n_heads=2, consolidate_every=10_000)
    with torch.no_grad():
        _, state = model(ids[None, :100], return_state=True)
        _, seen = model(ids[None, 100:164], state=state, return_diagnostics=True)
    lags = [1, 2, 30, 64]
    left = forgetting(model, state, ids[100:], lags)  # (lags, layers, H)
    total = torch.stack(seen["gamma_values"])[:, 0].cumsum(1)  # (layers, N, H)
    expected = torch.exp(-total[:, [lag - 1 for lag in lags]]).transpose(0, 1)
    torch.testing.assert_close(left, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("length, piece", [(2, 1), (500, 16), (1000, 500), (10_000, 79)])
def test_forgetting_is_followed_from_a_few_places_of_the_first_half(length, piece):
    places = [read for read in range(piece, length, piece) if is_place(read, piece, length)]
    wanted = [-(-length * n // (2 * PLACES)) for n in range(1, PLACES + 1)]
    assert places == sorted({-(-place // piece) * piece for place in wanted})  # the next snapshot


def test_forgetting_leaves_the_state_as_it_was(model, ids):
    with torch.no_grad():
        _, state = model(ids[None, :100], return_state=True)
    before = [x.clone() for layer in state.layers for x in layer]
    forgetting(model, state, ids[100:], [4])
    assert all(torch.equal(a, b) for a, b in zip(before, (x for y in state.layers for x in y)))


def test_reading_in_pieces_is_reading(model, ids):
    *_, (read, seen, state) = observe(model, ids, piece=64)
    assert read == 500
    _, whole, end = model(ids[None], return_diagnostics=True, return_state=True)
    for a, b in zip(state.layers, end.layers):
        torch.testing.assert_close(a.fast_weights, b.fast_weights, atol=1e-5, rtol=1e-4)
    for a, b in zip(seen["stability_metrics"], whole["stability_metrics"]):
        assert a["energy"] == pytest.approx(b["energy"], rel=1e-3)


def test_looking_changes_no_logit_and_no_gradient(model, ids):
    logits = model(ids[None, :100])
    seen, _ = model(ids[None, :100], return_diagnostics=True)
    assert torch.equal(logits, seen)
    weight = model.embedding.weight
    gradients = [torch.autograd.grad(x.square().sum(), weight) for x in (logits, seen)]
    assert torch.equal(gradients[0][0], gradients[1][0])


def test_snapshots_become_series(model, ids):
    looks = [snapshot(seen, state) for _, seen, state in observe(model, ids[:100], piece=30)]
    series = over_time([look[1] for look in looks])
    assert len(series["stability_metrics"]["energy"]) == len(series["gamma_values"]) == 4
    assert over_time([{"a": {"b": 1}}, {"a": {"b": 2}}]) == {"a": {"b": [1, 2]}}


def test_report_has_the_shapes_it_says(report, model):
    looks, layers, heads, dim = len(report.tokens), 2, 2, 16
    assert report.tokens[-1] == 500 and looks <= SNAPSHOTS + 1
    assert Phase2Config.from_dict(report.model_config) == model.config
    statistics = model.get_statistics()
    assert report.model_statistics == {x: statistics[x] for x in ("num_parameters", "num_layers")}
    names = {"gamma_values", "snr_stats", "resonance_info", "stability_metrics"}
    assert set(report.diagnostics) == names
    for name in names:
        assert len(report.diagnostics[name]) == layers
    for layer in range(layers):
        gammas = torch.tensor(report.diagnostics["gamma_values"][layer])
        assert gammas.shape == (looks, heads) and (gammas > 0).all()
        assert len(report.diagnostics["snr_stats"][layer]["mean_snr"]) == looks
        info = report.diagnostics["resonance_info"][layer]
        assert torch.tensor(info["diag_energy"]).shape == (heads, dim)
        memory = report.memory[layer]
        for name in ("effective_rank", "window", "measured_window"):
            assert len(memory[name]) == heads
        assert 250 - 16 <= memory["followed"] < 500  # from the first snapshot after the middle


def test_energy_stays_below_its_bound_in_every_head_at_every_look(report):
    for layer in report.diagnostics["stability_metrics"]:
        energies, bounds = (torch.tensor(layer[f"{x}_by_head"]) for x in ("energy", "energy_bound"))
        assert (energies > 0).all() and (energies <= 1.0001 * bounds).all()
        assert (bounds / energies).max() > 2  # and not because the two are the same


def test_report_agrees_with_the_model(report, model, ids):
    _, seen, state = model(ids[None], return_diagnostics=True, return_state=True)
    for layer, memory in enumerate(report.memory):
        ranks = effective_rank(state.layers[layer].fast_weights[0])
        torch.testing.assert_close(torch.tensor(memory["effective_rank"]), ranks, rtol=1e-3, atol=0)
        rates = 1 / seen["gamma_values"][layer][0].mean(0)
        torch.testing.assert_close(torch.tensor(memory["window"]), rates, rtol=0.05, atol=0)


@pytest.mark.parametrize("dt", [1.0, 0.25])
def test_windows_are_those_of_the_rates_without_consolidation(ids, dt):
    model = create_phase2_model(d_model=32, n_layers=2, n_heads=2, consolidate_every=10_000, dt=dt)
    for memory in diagnose(model, ids).memory:
        assert memory["measured_window"] == pytest.approx(memory["window"], rel=0.1)


def test_consolidation_only_shortens_windows(ids):
    off = {"snr_gamma_boost": 0.0, "resonance_strength": 0.0}
    windows = []
    for changes in (off, {}):
        torch.manual_seed(0)
        model = create_phase2_model(
            d_model=32, n_layers=2, n_heads=2, consolidate_every=16, **changes
        )
        memory = diagnose(model, ids).memory
        windows.append(torch.tensor([layer["measured_window"] for layer in memory]))
        rates = torch.tensor([layer["window"] for layer in memory])
        assert (windows[-1] < 1.2 * rates).all()
    without, with_it = windows
    assert (without > 0.8 * rates).all()  # the window from the rates is nearly right ...
    assert (with_it < 1.02 * without).all()  # ... and consolidation only takes away,
    assert (with_it < 0.95 * without).any()  # from slow memories


def test_json_is_the_report_and_valid(report, tmp_path):
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == text

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == asdict(report)


def test_page_needs_nothing_from_elsewhere(report, tmp_path):
    text = report.to_html(str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,iVBOR")
    assert "http" not in text.replace(sources[0], "") and "<script" not in text
    assert "effective rank" in text and "base_decay" in text


def test_page_in_a_browser_asks_for_nothing(report, tmp_path, browser):
    report.to_html(tmp_path / "report.html")
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    width = page.evaluate("document.images[0].naturalWidth")
    page.close()
    assert width > 500
    assert [url for url in asked if not url.startswith("data:")] == [
        (tmp_path / "report.html").as_uri()
    ]


def test_plot_has_a_panel_for_each_thing_and_says_units(report):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    figure = report.plot()
    titles = {axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")} - {""}
    assert len(titles) == 6
    for axes in figure.axes:
        assert axes.get_ylabel() and (axes.get_xlabel() or axes.get_label() == "<colorbar>")
    energy = next(axes for axes in figure.axes if "bound" in axes.get_ylabel())
    assert len(energy.lines) == 4  # energy and bound of two layers
    memories = next(axes for axes in figure.axes if axes.get_ylabel() == "effective rank")
    assert memories.get_xlabel() == "window, tokens"
    for line, memory in zip(memories.lines, report.memory, strict=True):
        assert [*line.get_xdata()] == memory["measured_window"]
        assert [*line.get_ydata()] == memory["effective_rank"]
    plt.close(figure)


def test_pages_leave_no_figure_open(report):
    plt = pytest.importorskip("matplotlib.pyplot")
    before = plt.get_fignums()
    report.to_html()
    assert plt.get_fignums() == before


def test_table_has_a_line_for_each_memory_and_layer(report):
    _, memories, layers = str(report).split("\n\n")
    header, *rows, _ = memories.splitlines()
    names = ["layer", "head", "window from Γ", "measured", "effective rank"]
    names += ["energy", "energy bound"]
    assert re.split("  +", header.strip()) == names
    assert len({len(line) for line in (header, *rows)}) == 1  # columns are aligned
    expected = []
    for layer, memory in enumerate(report.memory):
        stability = report.diagnostics["stability_metrics"][layer]
        ends = [stability[f"{name}_by_head"][-1] for name in ("energy", "energy_bound")]
        columns = memory["window"], memory["measured_window"], memory["effective_rank"], *ends
        expected += [(layer, head, *row) for head, row in enumerate(zip(*columns))]
    shown = [[float(x.replace(",", "")) for x in row.replace("~", "").split()] for row in rows]
    three_digits = {"rtol": 0.005, "atol": 0}
    torch.testing.assert_close(torch.tensor(shown), torch.tensor(expected), **three_digits)
    assert len(layers.splitlines()) == 1 + 2


@pytest.mark.parametrize("length", [2, 3, 15, 16, 17, 31, 33, 100])
def test_short_texts_are_reported_too(model, ids, length):
    report = diagnose(model, ids[:length].tolist())
    assert report.tokens[-1] == length
    assert all(x > 0 for memory in report.memory for x in memory["measured_window"])
    json.loads(report.to_json())


def test_a_file_and_the_name_of_a_file(model, tmp_path):
    path = tmp_path / "my.txt"
    path.write_text("Γ decays " * 9, encoding="utf-8")
    assert asdict(diagnose(model, path)) == asdict(
        diagnose(model, path.read_text(encoding="utf-8"))
    )
    with pytest.raises(ValueError, match="give a Path"):
        diagnose(model, str(path))
    with pytest.raises(ValueError, match=r"shape \(N,\), got \(1, 7\)"):
        diagnose(model, torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one token"):
        recall(model, [], 0, 0)
    one, *others = (recall(model, text, 0, 1).answer for text in ("two", b"two", list(b"two")))
    assert all(torch.equal(one, other) for other in others)


def test_what_is_extrapolated_is_marked(model, ids):
    report = diagnose(model, ids[:40])
    (followed,) = {memory["followed"] for memory in report.memory}
    marked = re.findall(r"~ (\d\S*)", str(report))
    windows = [x for memory in report.memory for x in memory["measured_window"]]
    longer = [f"{x:.3g}" for x in windows if x > followed]
    assert marked == longer and 0 < len(longer) < len(windows)


def test_strings_go_through_the_tokenizer(model):
    as_text = diagnose(model, "Γ decays " * 9)
    as_ids = diagnose(model, list("Γ decays ".encode()) * 9)
    assert asdict(as_text) == asdict(as_ids)
    by_hand = diagnose(model, [ord(x) for x in "abcd"])
    assert by_hand.tokens[-1] == 4


def test_what_is_not_finite_is_null_and_is_still_drawn(ids):
    model = create_phase2_model(d_model=32, n_layers=2, n_heads=2)
    with torch.no_grad():
        model.blocks[1].eta.bias.fill_(-100.0)  # writes nothing: an empty memory
    report = diagnose(model, ids[:200])
    assert report.memory[1]["effective_rank"] == [0.0, 0.0]
    assert report.memory[1]["measured_window"] == [None, None]
    assert "—" in str(report)
    json.loads(report.to_json())
    assert "data:image/png" in report.to_html()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "a"}, "text must be at least two tokens, got 1"),
        ({"text": []}, "text must be at least two tokens, got 0"),
        ({"text": [0.5, 1.5]}, "text must be integers"),
        ({"text": "abc", "piece": 0}, "piece must be an integer of at least 1, got 0"),
        ({"text": [1, 256]}, "from 0 to 255"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_diagnosed(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        diagnose(model, **arguments)


def test_recall_of_the_last_query_is_what_the_model_read(model, ids):
    """y of the last token, from the model itself, against the answer of `recall`."""
    block, read = model.blocks[1], []
    handle = block.out.register_forward_hook(lambda module, inputs, out: read.append(inputs[0]))
    with torch.no_grad():
        model(ids[None, :90])
    handle.remove()
    for head in range(2):
        answer = recall(model, ids[:90], layer=1, head=head).answer
        y = torch.nn.functional.layer_norm(answer, (16,))
        expected = read[0][0, -1].unflatten(0, (2, 16))[head]
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dt", [1.0, 0.25])
def test_keys_stand_where_the_memory_has_turned_them(ids, dt):
    """Without consolidation W is the sum of what was written: Σ η e^{−Σ Γ dt} R k vᵀ."""
    model = create_phase2_model(d_model=32, n_layers=1, n_heads=2, consolidate_every=1000, dt=dt)
    trace = traces(model, ids[:60], layer=0)
    with torch.no_grad():
        _, seen = model(ids[None, :60], return_diagnostics=True)
        h = model.blocks[0].memory_norm(model.embedding(ids[:60]))
        eta = 0.2 * torch.sigmoid(model.blocks[0].eta(h))
    total = dt * seen["gamma_values"][0][0].cumsum(0)  # (N, H)
    left = eta * torch.exp(total - total[-1])
    expected = torch.einsum("nh,nhi,nhj->hij", left, trace.k, trace.v)
    torch.testing.assert_close(trace.fast_weights, expected, atol=1e-5, rtol=1e-4)


def test_a_memory_of_one_thing_answers_with_it(model, ids):
    found = recall(model, ids[:1], layer=0, head=1, key=0)
    assert found.positions.tolist() == [0] and found.similarity.item() == pytest.approx(1, abs=1e-5)
    for key in (0, -traces(model, ids[:1], 0).k[0, 1]):
        found = recall(model, ids[:1].tolist(), layer=0, head=1, key=key)
        assert found.votes.shape == (256,)
        assert found.votes.sum().item() == pytest.approx(1, abs=1e-5)
    assert found.similarity.item() == pytest.approx(-1, abs=1e-5)  # the opposite key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 2}, "layer must be an integer from 0 to 1, got 2"),
        ({"head": -1}, "head must be an integer from 0 to 1, got -1"),
        ({"key": 50}, "key must be an integer from 0 to 49, got 50"),
        ({"key": torch.zeros(3)}, r"key must be .* of shape \(16,\), got one of \(3,\)"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_recall_of_what_is_not_there(model, ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        recall(model, ids[:50], **{"layer": 0, "head": 0} | arguments)


def test_recall_of_a_float64_model_and_of_nothing(model, ids):
    found = recall(copy.deepcopy(model).double(), ids[:50], 0, 0)
    torch.testing.assert_close(found.answer.float(), recall(model, ids[:50], 0, 0).answer)
    for key, top in (([0.0] * 16, 5), (None, 0)):
        with pytest.raises(ValueError, match="must be"):
            recall(model, ids[:50], 0, 0, key=key, top=top)


def test_a_file_is_read_as_bytes(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café ".encode("latin1") * 20)
    small = create_phase2_model(d_model=16, n_layers=1, n_heads=1)
    assert diagnose(small, path).tokens[-1] == 100


def test_a_panel_without_a_window():
    plt = pytest.importorskip("matplotlib.pyplot")
    _, axes = plt.subplots()
    memory = {"measured_window": [None], "effective_rank": [1.0]}
    draw_memory(axes, SimpleNamespace(memory=[memory]))
    assert len(axes.lines[0].get_xdata()) == 0
    plt.close("all")


def test_votes_see_an_adapter(model, ids):
    class Adapted(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + x.flip(-1)

    adapted = copy.deepcopy(model)
    for block in adapted.blocks:
        block.out, block.qkv = Adapted(block.out), torch.nn.Sequential(block.qkv)
    one, other = (recall(m, ids[:40], 1, 0).votes for m in (model, adapted))
    assert (one - other).abs().max() > 1e-4
    adapted.get_statistics()


def test_a_window_of_almost_nothing_is_not_zero():
    model = create_phase2_model(d_model=16, n_layers=1, n_heads=2, base_decay=40.0)
    found = diagnose(model, torch.randint(0, 256, (300,))).memory[0]["measured_window"]
    assert all(0 < window < 1 for window in found)


def test_the_mean_rate_of_a_text_weighs_pieces_by_their_tokens(model, ids):
    report, (_, seen) = diagnose(model, ids[:33]), model(ids[None, :33], return_diagnostics=True)
    assert report.tokens == [16, 32, 33]
    for memory, gamma in zip(report.memory, seen["gamma_values"], strict=True):
        torch.testing.assert_close(torch.tensor(memory["window"]), 1 / gamma[0].mean(0))


def test_a_rank_that_there_is_none_of():
    assert effective_rank(torch.full((4, 4), torch.nan)).isnan()
    somewhere = torch.eye(4)
    somewhere[2, 3] = torch.inf
    assert effective_rank(somewhere).isnan()
    found = effective_rank(torch.stack((torch.eye(4), torch.full((4, 4), torch.inf))))
    assert found[0] == pytest.approx(4) and found[1].isnan()
    for gamma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"gamma must be a number above 0"):
            decaying_rank(gamma)
    assert decaying_rank(1e-20) == pytest.approx(math.e * 1e20)


def test_no_pieces_of_nothing(model, ids):
    for piece in (0, -1):
        with pytest.raises(ValueError, match="piece must be an integer of at least 1"):
            next(observe(model, ids, piece))


def test_indices_from_numpy(model, ids):
    np = pytest.importorskip("numpy")
    one = recall(model, ids, layer=np.int64(1), head=np.int32(0), key=np.int64(3))
    assert torch.equal(one.answer, recall(model, ids, layer=1, head=0, key=3).answer)


@pytest.mark.parametrize(
    ("x", "shown"),
    [(0.1234, "0.123"), (999.4, "999"), (999.5, "1,000"), (1234.5, "1,234"), (1e30, "1e+30")],
)
def test_numbers_in_three_digits(x, shown):
    assert number(x) == shown


def test_a_long_text_has_no_more_snapshots_than_a_figure_shows(model):
    long = torch.randint(0, 256, (20 * SNAPSHOTS + 1,))
    assert SNAPSHOTS // 2 < len(diagnose(model, long).tokens) <= SNAPSHOTS


def test_the_mean_of_what_there_is():
    assert mean([1.0, None, 3.0]) == 2.0
    assert mean([None]) is None


@pytest.mark.parametrize("layers", [1, 2, 20])
def test_figures_tell_layers_apart(layers):
    figures = pytest.importorskip("matplotlib.figure")
    assert len({layer_color(layer, layers) for layer in range(layers)}) == layers
    gammas = [[[0.1, 0.2]] * 3] * layers  # three snapshots of two heads
    stable = [{"stable_ratio": [1.0, 0.0, None]}] * layers
    diagnostics = {"gamma_values": gammas, "stability_metrics": stable}
    report = SimpleNamespace(diagnostics=diagnostics, memory=[None] * layers, tokens=[10, 20, 30])
    heat, bars = figures.Figure().subplots(2)
    draw_gamma(heat, report), draw_stable(bars, report)
    step = -(-layers // 8)
    assert heat.images[0].get_extent() == [0, 30, 2 * layers - 0.5, -0.5]
    assert heat.get_yticks().tolist() == [2 * layer - 0.5 for layer in range(0, layers, step)]
    assert bars.get_xticks().tolist() == list(range(0, layers, step))
    assert [bar.get_height() for bar in bars.patches] == [0.5] * layers


def test_figures_have_a_legend(report):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = report.plot()
    assert any(axes.get_legend() for axes in figure.axes)
    pyplot.close(figure)
