"""The model: causal, exact under cutting, padding and packing, strict about its input."""

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from phase2 import Phase2Block, Phase2Config, Phase2IntegratedModel, create_phase2_model
from phase2.consolidation import empty_memory, given_memory
from phase2.decay import DecayPotential, decay_rate, half_life, propagator
from phase2.model import (
    FEW,
    MANY,
    PART,
    PRESETS,
    Linear,
    Phase2State,
    convolved,
    empty_state,
    feed_forward,
    linear,
    linear_back,
    plan,
    shared,
)
from phase2.snr import select

TINY = dict(vocab_size=40, d_model=16, n_layers=2, n_heads=2, consolidate_every=8)


def tiny(**values):
    torch.manual_seed(0)
    return create_phase2_model(config=Phase2Config(**{**TINY, **values}))


def tokens(*shape, seed=0):
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def weigh(logits, seed=1):
    """A fixed random linear function of logits: its gradient sees every one of them."""
    generator = torch.Generator().manual_seed(seed)
    return (logits * torch.randn(logits.shape, generator=generator)).sum()


def test_changing_a_token_changes_no_earlier_logit():
    model, text = tiny().double(), tokens(2, 30)
    logits = model(text)
    for place in (0, 7, 8, 9, 29):
        changed = text.clone()
        changed[:, place] = (text[:, place] + 1) % 40
        difference = (model(changed) - logits).abs().amax((0, 2))
        assert not difference[:place].any() and (difference[place:] > 0).all()


@settings(max_examples=25)
@given(length=st.integers(2, 40), cuts=st.sets(st.integers(1, 39), max_size=4))
def test_cutting_changes_nothing(length, cuts):
    model, text = tiny(), tokens(2, length, seed=length)
    edges = [0, *sorted(c for c in cuts if c < length), length]
    state, parts = None, []
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        logits, state = model(text[:, a:b], state=state, return_state=True)
        parts.append(logits)
    whole, last = model(text, return_state=True)
    got = torch.cat(parts, dim=1)
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)
    for a, b in zip(state.layers, last.layers, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(model, weigh(got)), gradients(model, weigh(whole))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_state_holds_nothing_but_itself():
    model = create_phase2_model(d_model=16, n_layers=2, n_heads=2, consolidate_every=10**6)
    ids = torch.zeros(1, 600, dtype=torch.long)
    for mask in (None, torch.ones_like(ids)):
        _, state = model(ids, attention_mask=mask, return_state=True)
        for layer in state.layers:
            for name, x in layer._asdict().items():
                size = max(x.numel(), 2 * 8 * 8)  # at most a memory, never something of each token
                assert x.untyped_storage().nbytes() <= 4 * size, name


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(0, 25), min_size=2, max_size=4), more=st.integers(0, 20))
def test_padding_changes_nothing(lengths, more):
    """Left padding, then going on from the state: each row as if it were alone."""
    model, width = tiny(), max(lengths) + 3
    text, after = tokens(len(lengths), width, seed=5), tokens(len(lengths), more, seed=6)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    logits, state = model(text, attention_mask=mask.long(), return_state=True)
    second = model(after, state=state)
    assert state.position == tuple(lengths)
    got, wanted = [], []
    for row, length in enumerate(lengths):
        alone = torch.cat((text[row : row + 1, width - length :], after[row : row + 1]), dim=1)
        wanted.append(model(alone)[0])
        got.append(torch.cat((logits[row, width - length :], second[row])))
    got, wanted = torch.cat(got), torch.cat(wanted)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    if len(wanted):
        ours, theirs = gradients(model, weigh(got)), gradients(model, weigh(wanted))
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), before=st.integers(0, 12))
def test_packing_changes_nothing(lengths, before):
    """Documents packed into one row, the first one going on from a state."""
    model = tiny()
    documents = [tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    head = tokens(1, before, seed=9)
    _, state = model(head, return_state=True)
    numbers = torch.cat([torch.full((1, n), i + 1) for i, n in enumerate(lengths)], dim=1)
    packed = torch.cat(documents, dim=1)
    got, last = model(packed, state=state, attention_mask=numbers, return_state=True)
    wanted = [model(torch.cat((head, documents[0]), dim=1))[:, before:]]
    wanted = torch.cat(wanted + [model(d) for d in documents[1:]], dim=1)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(model, weigh(got)), gradients(model, weigh(wanted))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert last.position == (lengths[-1] + (before if len(lengths) == 1 else 0),)


def test_a_call_depends_on_no_earlier_one():
    model, text = tiny(), tokens(2, 20)
    first = model(text)
    model(tokens(3, 9, seed=2))
    assert torch.equal(model(text), first)
    logits, _, _ = model(text, return_diagnostics=True, return_state=True)
    assert torch.equal(logits, first)


def test_final_memory_stays_to_be_looked_at():
    model = tiny()
    assert model.blocks[0].fast_weight_state is None
    _, state = model(tokens(2, 20), return_state=True)
    kept = model.blocks[1].fast_weight_state
    assert not kept.requires_grad and torch.equal(kept, state.layers[1].fast_weights)
    model.reset_state()
    assert model.blocks[1].fast_weight_state is None


def test_length_is_not_limited_by_n_seq():
    assert tiny(n_seq=4)(tokens(1, 50)).shape == (1, 50, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_in_low_precision(dtype):
    model, text = tiny(d_model=32), tokens(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(text[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), text[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3 and all(torch.isfinite(torch.tensor(losses)))


def test_pure_bfloat16_is_close():
    model, text = tiny(d_model=32), tokens(2, 40)
    wanted = model(text)
    half = copy.deepcopy(model).bfloat16()
    logits, state = half(text, return_state=True)
    assert logits.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for layer in state.layers for x in layer)
    assert (logits.float() - wanted).norm() < 0.05 * wanted.norm()
    assert torch.isfinite(half(text, state=state)).all()


@pytest.mark.parametrize("kept, read", [("float", "double"), ("double", "float")])
@pytest.mark.parametrize("length", [1, 12])
@pytest.mark.parametrize("padded", [False, True])
def test_a_state_of_another_precision_is_read(kept, read, length, padded):
    model, text = tiny(consolidate_every=4), tokens(2, 6 + length)
    before, after = (getattr(copy.deepcopy(model), name)() for name in (kept, read))
    mask = torch.ones_like(text[:, 6:])
    mask[0, : length // 2] = 0
    mask[0, :1] = 1 - padded
    mask = mask if padded else None
    _, state = before(text[:, :6], return_state=True)
    logits, state = after(text[:, 6:], state, mask, return_state=True)
    _, whole = model(text[:, :6], return_state=True)
    wanted = model(text[:, 6:], whole, mask)
    torch.testing.assert_close(logits.float(), wanted, atol=1e-5, rtol=1e-4)
    assert logits.dtype == next(after.parameters()).dtype


def test_compiles():
    """Two stretches, so that a consolidation is compiled too."""
    model, text = tiny(n_layers=1), tokens(2, 12)
    model(text)  # the first call also looks for warnings
    compiled = torch.compile(model, backend="aot_eager")
    logits = model(text)
    torch.testing.assert_close(compiled(text), logits, atol=1e-5, rtol=1e-5)
    ours, theirs = (gradients(model, weigh(x)) for x in (compiled(text), logits))
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_compile_to_one_graph(rows):
    """One for tokens, and one for those at which the memories are consolidated."""
    torch.compiler.reset()  # what other tests have compiled
    model, ids, compiled = tiny(consolidate_every=4), tokens(rows, 20), CompileCounter()
    with torch.no_grad():
        _, state = model(ids[:, :1], return_state=True)
        expected = model(ids)[:, 1:]
        # raises if a graph must be cut
        fast, found = torch.compile(model, backend=compiled, fullgraph=True), []
        for t in range(1, 20):
            logits, state = fast(ids[:, t : t + 1], state=state, return_state=True)
            found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-5, rtol=1e-5)
    assert state.position == (20,) * rows
    assert compiled.frame_count == 3  # the first one knows only its own position


def test_diagnostics_have_the_seeds_entries():
    model = tiny()
    _, diagnostics = model(tokens(2, 30), return_diagnostics=True)
    assert set(diagnostics) == {
        "gamma_values", "snr_stats", "resonance_info", "stability_metrics"
    }  # fmt: skip
    assert all(len(layers) == 2 for layers in diagnostics.values())
    assert diagnostics["gamma_values"][0].shape == (2, 30, 2)
    assert {"mean_snr", "std_snr"} <= set(diagnostics["snr_stats"][0])
    assert diagnostics["resonance_info"][0]["diag_energy"].shape == (2, 2, 8)
    assert {"energy", "dE_dt"} <= set(diagnostics["stability_metrics"][0])
    json.dumps([diagnostics["snr_stats"], diagnostics["stability_metrics"]])


@pytest.mark.parametrize(("length", "since"), [(3, 3), (8, 8), (9, 1)])
def test_energy_changes_at_a_rate_since_the_last_consolidation(length, since):
    model = tiny(consolidate_every=8, dt=0.5)
    _, diagnostics, state = model(tokens(1, length), return_diagnostics=True, return_state=True)
    for metrics, layer in zip(diagnostics["stability_metrics"], state.layers, strict=True):
        change = layer.fast_weights.square().sum((-2, -1)) - layer.last_energy
        assert metrics["dE_dt"] == pytest.approx(change.mean().item() / (0.5 * since), rel=1e-4)


def test_an_average_input_is_written_at_the_rate_of_the_configuration():
    for block in tiny().blocks:
        assert block.eta(torch.zeros(16)).eq(0).all()


def test_statistics():
    model = tiny()
    model(tokens(1, 9))
    model.head.requires_grad_(False)
    stats = model.get_statistics()
    assert stats["num_parameters"] == sum(p.numel() for p in model.parameters())
    frozen = stats["num_parameters"] - stats["num_trainable_parameters"]
    assert frozen == model.head.weight.numel()
    assert stats["num_layers"] == len(stats["block_stats"]) == 2
    assert stats["block_stats"][0]["fast_weight_norm"] > 0
    _, gamma = model.blocks[0].potential(torch.zeros(16))
    expected = (math.log(2) / gamma).tolist()
    assert stats["block_stats"][0]["half_life"] == pytest.approx(expected)
    json.dumps(stats)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_not_degenerate(preset):
    """At initialization: half-lives from a few tokens to thousands, no empty memory, no warning."""
    model = create_phase2_model(preset=preset, n_layers=2)
    text = torch.randint(0, 256, (2, 300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, diagnostics = model(text, return_diagnostics=True)
    for gamma in diagnostics["gamma_values"]:
        lives = half_life(gamma).mean((0, 1))
        assert lives.min() > 2 and lives.min() < 20 and lives.max() > 1000
    for info, metrics in zip(
        diagnostics["resonance_info"], diagnostics["stability_metrics"], strict=True
    ):
        assert 0.05 < info["mask"].mean() < 0.95
        assert metrics["energy"] > 1e-3 and metrics["margin"] >= 0


def test_at_birth_the_controller_rests():
    """Nothing is negative, so no two writes are quite unrelated; they must not look driven."""
    model = create_phase2_model(preset="small", n_layers=2)
    source = Path(__file__).read_bytes()[:2048]
    _, state = model(torch.tensor([list(source)]), return_state=True)
    shifts = torch.stack([layer.gamma_shift for layer in state.layers])
    assert not shifts.any()


@pytest.mark.parametrize("half", ["model", "autocast"])
def test_single_tokens_equal_a_sequence_in_bfloat16(half):
    model, text, state, found = tiny(), tokens(2, 20), None, []
    model = model.bfloat16() if half == "model" else model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        whole = model(text).float()
        for t in range(20):
            logits, state = model(text[:, t : t + 1], state=state, return_state=True)
            found.append(logits.float())
    error = (torch.cat(found, 1) - whole).norm() / whole.norm()
    assert error < 0.03


@pytest.mark.parametrize("size", [1e-20, 1e-13, 1e-9])
def test_keys_too_short_to_count_are_those_of_a_sequence(size):
    model, text, state, found = tiny(), tokens(2, 12), None, []
    with torch.no_grad():
        for block in model.blocks:
            block.qkv.weight[16:32] *= size
        whole = model(text)
        for t in range(12):
            logits, state = model(text[:, t : t + 1], state=state, return_state=True)
            found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=0)
    assert state.layers[0].fast_weights.any() == (size == 1e-9)


@pytest.mark.parametrize("length", [1, 5])
def test_what_is_measured_has_no_gradient(length):
    _, state = tiny()(tokens(2, length), return_state=True)
    for layer in state.layers:
        assert layer.fast_weights.requires_grad
        assert not layer.bound.requires_grad and not layer.incoherent.requires_grad


@pytest.fixture
def two_threads(monkeypatch):
    """Of a processor on which PyTorch does not share products of few rows itself."""
    monkeypatch.setattr("phase2.model.INTEL", False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(1,), (2, 3), (0,), (2, 0), (FEW,), (FEW + 1,)])
@pytest.mark.parametrize("laid_out", ["by rows", "by columns"])
def test_threads_share_a_product(two_threads, shape, laid_out):
    x, weight = torch.randn(*shape, 256), torch.randn(256, 320).T
    weight = weight.contiguous() if laid_out == "by rows" else weight
    assert shared(x, weight) == (math.prod(shape) <= FEW)
    inputs, exact = (
        [w.to(dtype).requires_grad_() for w in (x, weight)]
        for dtype in (torch.float32, torch.float64)
    )
    y, expected = linear(*inputs), exact[0] @ exact[1].T
    torch.testing.assert_close(y, expected.float(), atol=1e-4, rtol=1e-5)
    found, wanted = (
        torch.autograd.grad(weigh(out), of) for out, of in ((y, inputs), (expected.float(), exact))
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=1e-4)


def test_products_that_threads_do_not_share(two_threads, monkeypatch):
    x, weight = torch.randn(1, 256), torch.randn(320, 256)
    assert shared(x, weight)
    assert not shared(x, weight[: 5 * PART - 1])  # not in whole parts
    assert not shared(x, weight[:PART])  # too small to be worth it
    assert not shared(x.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not shared(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16
    whole = torch.compile(linear, backend="eager", fullgraph=True)  # raises if it must be cut
    torch.testing.assert_close(whole(x, weight), linear(x, weight), atol=1e-4, rtol=1e-5)
    monkeypatch.setattr("phase2.model.INTEL", True)
    assert not shared(x, weight)
    monkeypatch.setattr("phase2.model.INTEL", False)
    torch.set_num_threads(1)
    assert not shared(x, weight)


@pytest.fixture
def with_avx512(monkeypatch):
    """A processor as AMD makes them, where products are faster as convolutions."""
    monkeypatch.setattr("phase2.model.INTEL", False)
    monkeypatch.setattr("phase2.model.AVX512", True)


@pytest.mark.parametrize("shape", [(90,), (2, 150), (3, 0, 200), (1, 5, 70)])
@pytest.mark.parametrize(("d", "n"), [(256, 320), (300, 1), (1, 3)])
@pytest.mark.parametrize("laid_out", ["by rows", "by columns"])
def test_a_product_is_a_convolution(with_avx512, shape, d, n, laid_out):
    x, weight = torch.randn(*shape, d), torch.randn(d, n).T
    weight = weight.contiguous() if laid_out == "by rows" else weight
    inputs = [w.requires_grad_() for w in (x, weight)]
    assert convolved(x) == (x.numel() > MANY)
    exact = [w.detach().double().requires_grad_() for w in inputs]
    y, expected = linear(*inputs), exact[0] @ exact[1].T
    assert y.shape == (*shape, n) and y.is_contiguous()
    torch.testing.assert_close(y, expected.float(), atol=1e-4, rtol=1e-5)
    dy = torch.randn(*shape, n)
    wanted = [g.float() for g in torch.autograd.grad(expected, exact, dy.double())]
    found = torch.autograd.grad(y, inputs, dy)
    assert found[1].is_contiguous() or laid_out == "by columns"
    by_hand = linear_back(dy.reshape(-1, n), x.detach().reshape(-1, d), weight.detach())
    for one, other, third in zip(found, by_hand, wanted, strict=True):
        torch.testing.assert_close(one, third, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(other.view_as(third), third, atol=1e-3, rtol=1e-4)


def test_products_that_are_no_convolutions(with_avx512, monkeypatch):
    x, weight = torch.randn(300, 256), torch.randn(320, 256)
    assert convolved(x)
    assert not convolved(x[: MANY // 256])  # PyTorch would not leave it to oneDNN
    assert not convolved(torch.randn(FEW, 1024))  # reading the weight is what it costs
    assert not convolved(x.double()) and not convolved(x.bfloat16())
    assert not convolved(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not convolved(x)
        assert linear(x, weight).dtype == torch.bfloat16
    whole = torch.compile(linear, backend="aot_eager", fullgraph=True)  # raises if it must be cut
    weight.requires_grad_()
    found, wanted = (product(x, weight) for product in (whole, linear))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    found, wanted = (torch.autograd.grad(weigh(y), weight)[0] for y in (found, wanted))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    monkeypatch.setattr("phase2.model.AVX512", False)
    assert not convolved(x)
    monkeypatch.undo()
    monkeypatch.setattr("phase2.model.INTEL", True)
    assert not convolved(x)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="not for oneDNN here"
)
@pytest.mark.parametrize("threads", [1, 2])
def test_pytorch_leaves_convolutions_to_onednn(with_avx512, threads):
    x = torch.randn(MANY // 256 + 1, 256, requires_grad=True)
    weight = torch.randn(320, 256, requires_grad=True)
    torch.set_num_threads(threads)
    try:
        with torch.profiler.profile() as seen:
            linear(x, weight).sum().backward()
    finally:
        torch.set_num_threads(1)
    assert "aten::mkldnn_convolution" in {event.key for event in seen.key_averages()}


def test_a_model_is_the_same_with_convolutions(with_avx512, monkeypatch):
    torch.manual_seed(0)
    model = create_phase2_model(d_model=64, n_layers=2, consolidate_every=128)
    text = torch.randint(0, 256, (2, 400))
    logits = model(text)
    found = logits, gradients(model, weigh(logits))
    monkeypatch.setattr("phase2.model.AVX512", False)
    logits = model(text)
    torch.testing.assert_close(found[0], logits, atol=1e-5, rtol=1e-4)
    wanted = gradients(model, weigh(logits))
    assert (found[1] - wanted).norm() < 1e-5 * wanted.norm()
    assert not torch.equal(found[1], wanted)  # they did go another way


def test_single_tokens_equal_a_sequence_with_threads(two_threads):
    model, text, state, found = tiny(d_model=256), tokens(3, 20), None, []
    assert isinstance(model.head, Linear)
    with torch.no_grad():
        for t in range(20):
            logits, state = model(text[:, t : t + 1], state=state, return_state=True)
            found.append(logits)
        torch.testing.assert_close(torch.cat(found, 1), model(text), atol=1e-4, rtol=1e-4)


def test_a_block_can_be_hooked():
    """Nothing is changed in place of what a part of a block has returned."""
    model, seen = tiny(), []
    block = model.blocks[0]
    block.qkv.register_full_backward_hook(lambda *x: seen.append(x[2][0]))
    block.qkv.register_forward_hook(lambda *x: seen.append(x[2]))
    model(tokens(2, 5)).sum().backward()
    assert seen[0].min() < 0 and len(seen) == 2


WIDE = Phase2Config(**TINY | {"d_model": 32})
DEEP = Phase2Config(**TINY | {"n_layers": 3})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.tensor([[1, 40]])), r"from 0 to 39 \(vocab_size 40\), got 40"),
        (lambda m: m(torch.tensor([[-1, 3]])), "got -1"),
        (lambda m: m(torch.tensor([1, 2])), r"shape \(B, N\), got \(2,\)"),
        (lambda m: m(torch.rand(1, 2)), "integers of shape"),
        (lambda m: m(tokens(2, 3), attention_mask=torch.ones(2, 4)), "attention_mask must have"),
        (
            lambda m: m(tokens(2, 3), attention_mask=torch.zeros(2, 3)),
            "must be of bool or integers",
        ),
        (lambda m: m(tokens(2, 3), state=empty_state(m.config, 1)), "state is for a batch of 1"),
        (lambda m: m(tokens(1, 3), state=poisoned(m)), "state must be finite"),
        (lambda m: m(tokens(1, 1), state=poisoned(m)), "state must be finite"),
        (
            lambda m: m(tokens(1, 1), state=poisoned(m, position=m.config.consolidate_every)),
            "state must be finite",
        ),
        (lambda m: m(tokens(1, 1), state=empty_state(WIDE, 1)), "2 layers with 2 heads of width 8"),
        (lambda m: m(tokens(1, 1), state=empty_state(DEEP, 1)), "2 layers with 2 heads of width 8"),
        (lambda m: m(tokens(0, 3), return_diagnostics=True), "got a batch of 0"),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())


def test_a_state_of_another_type_is_refused():
    model = tiny()
    with pytest.raises(TypeError, match="must be a Phase2State, got tuple"):
        model(tokens(1, 3), state=empty_state(model.config, 1).layers)
    state = empty_state(model.config, 1)
    for wrong in (state.positions(), tuple(state.positions()), (0.0,), (-1,), [0]):
        with pytest.raises(TypeError, match="position of a state must be a tuple of ints of at le"):
            model(tokens(1, 3), state=state._replace(position=wrong))


@pytest.mark.parametrize("length", [1, 3])
def test_weights_that_are_no_numbers_are_refused(length):
    model = tiny()
    with torch.no_grad():
        model.blocks[0].qkv.weight[0, 0] = torch.nan
        model.blocks[1].memory_norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="smallest value is nan"):
        model(tokens(1, length))


@pytest.mark.parametrize("length", [0, 1, 20])
def test_a_batch_of_no_rows(length):
    logits, state = tiny()(tokens(0, length), return_state=True)
    assert logits.shape == (0, length, 40) and state.layers[0].fast_weights.shape == (0, 2, 8, 8)


def test_ids_may_be_of_any_integer_type():
    model, text = tiny(), tokens(2, 9)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(model(text.to(dtype)), model(text))


def poisoned(model, position=0):
    state = empty_state(model.config, 1)
    state.layers[1].fast_weights[0, 0, 0, 0] = torch.nan
    return state._replace(position=(position,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_heads": 0}, "n_heads must be an integer of at least 1, got 0"),
        ({"n_layers": 2.0}, "n_layers must be an integer"),
        (
            {"base_decay": 0},
            "base_decay must be a number of at least 1e-12 and at most 1e\\+12, got 0",
        ),
        (
            {"dt": float("nan")},
            "dt must be a number of at least 1e-12 and at most 1e\\+12, got nan",
        ),
        ({"resonance_strength": 2}, "resonance_strength must be .* at most 1"),
        ({"resonance_basis": "wave"}, "resonance_basis must be one of zeta"),
        ({"d_model": 30, "n_heads": 4}, "d_model must be an even multiple of n_heads = 4"),
        ({"hebian_eta": 0.1}, "unknown key 'hebian_eta', did you mean 'hebbian_eta'"),
        ({"snr": 0.1}, "unknown key 'snr', did you mean 'snr_threshold'"),
    ],
)
def test_bad_configurations_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Phase2Config.from_dict({**TINY, **values})


def test_configuration_round_trip_and_factory():
    config = Phase2Config(**TINY)
    assert Phase2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(AttributeError):
        config.d_model = 3
    assert create_phase2_model(preset="small", n_seq=9).config.n_seq == 9
    assert Phase2IntegratedModel(**TINY).config == config
    with pytest.raises(ValueError, match="preset must be one of small, base, large, got 'tiny'"):
        create_phase2_model(preset="tiny")
    with pytest.raises(TypeError, match="config must be a Phase2Config, got dict"):
        create_phase2_model(config=TINY)
    with pytest.raises(ValueError, match="preset or config, not both"):
        create_phase2_model(preset="small", config=config)


def test_numbers_from_numpy_become_plain():
    np = pytest.importorskip("numpy")
    config = Phase2Config(d_model=np.int64(32), base_decay=np.float32(0.5), dt=np.float64(2.0))
    assert [type(config.d_model), type(config.base_decay), type(config.dt)] == [int, float, float]
    assert Phase2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="d_model must be an integer of at least 1"):
        Phase2Config(d_model=np.bool_(True))


def test_warnings_come_once_per_model():
    model = tiny(base_decay=5.0)
    with pytest.warns(UserWarning, match=r"Overdamped system detected: Γ/\|V\| = \d+"):
        model(tokens(1, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(1, 9), return_diagnostics=True)
        tiny(base_decay=0.005)(tokens(1, 9))  # the cure


def test_warnings_of_a_second_model_are_heard_and_name_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as Python has it: a place says a thing once
        for _ in range(2):
            tiny(base_decay=5.0)(tokens(1, 9))
    assert [w.filename for w in caught] == [__file__] * 2


def test_no_cast_rounds_the_bases_and_no_move_loses_them():
    exact = [block.basis for block in tiny().blocks]
    rounded = tiny().bfloat16()
    assert rounded.blocks[0].basis.dtype == torch.float32
    with torch.device("meta"):
        moved = tiny()
    for model in (rounded, rounded.float(), moved.to_empty(device="cpu")):
        for block, basis in zip(model.blocks, exact, strict=True):
            assert torch.equal(block.basis, basis)
    assert tiny().double().blocks[0].basis.dtype == torch.float64


def test_rows_that_are_not_equally_far_along_read_a_token_each():
    """Through consolidations that are due in some rows, in none and in all."""
    model, lengths = tiny(consolidate_every=4), (9, 5, 1, 8)
    texts = [tokens(1, n + 12, seed=n) for n in lengths]
    with torch.no_grad():
        states = [model(text[:, :n], return_state=True)[1] for text, n in zip(texts, lengths)]
        state = Phase2State.cat(states)
        for t in range(12):
            token = torch.cat([text[:, n + t] for text, n in zip(texts, lengths)])
            logits, state = model(token[:, None], state=state, return_state=True)
            for row, text, n in zip(logits, texts, lengths):
                expected = model(text[:, : n + t + 1])[0, -1:]
                torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
    assert state.position == tuple(n + 12 for n in lengths)


def test_rows_of_states_are_selected_and_put_together():
    model, lengths = tiny(consolidate_every=4), (9, 5, 1)
    texts = [tokens(1, n + 6, seed=n) for n in lengths]
    with torch.no_grad():
        states = [model(text[:, :n], return_state=True)[1] for text, n in zip(texts, lengths)]
        rest = torch.cat([text[:, n:] for text, n in zip(texts, lengths)])
        whole = torch.cat([model(text)[:, n:] for text, n in zip(texts, lengths)])
        state = Phase2State.cat(states)
        assert state.position == lengths
        for rows in ([0, 1, 2], [2, 0], [1, 1, 1, 0], [], torch.tensor([2, 1])):
            found = model(rest[rows], state=state.select(rows))
            torch.testing.assert_close(found, whole[rows], atol=1e-5, rtol=1e-5)
        keep = torch.tensor([True, False, True])
        assert state.select(keep).position == (9, 1)
        found = model(rest[keep], state=state.select(keep))
        torch.testing.assert_close(found, whole[keep], atol=1e-5, rtol=1e-5)
    with pytest.raises(IndexError):
        state.select([3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 20])
def test_a_block_alone_begins_with_an_empty_memory(dtype, length):
    block, x = Phase2Block(Phase2Config(**TINY)).to(dtype), torch.randn(2, length, 16, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    y, state, gamma, _ = block(x)
    assert torch.equal(y, block(x, empty_memory(2, 2, 8, dtype=wide), 0)[0])
    assert y.dtype == dtype and gamma.shape == (2, length, 2)
    assert {w.dtype for w in state} == {wide}
    block(x[:, :1], state, length)


def test_documents_of_similar_length_are_read_together(monkeypatch):
    """Many short documents, one long one, one that goes on: as all of them at once."""
    model, text = tiny(consolidate_every=8).double(), tokens(3, 60)
    mask = (torch.arange(60) // 3 + 1).expand(3, -1).clone()
    mask[0], mask[1, :7] = 1, 0
    with torch.no_grad():
        _, state = model(tokens(3, 13, seed=1), return_state=True)
    found, weights = [], torch.randn(3, 60, 40).double()
    for sparse in (10**9, 0, 4):
        monkeypatch.setattr("phase2.model.SPARSE", sparse)
        logits, seen, after = model(text, state, mask, return_diagnostics=True, return_state=True)
        parts = plan(mask, state.positions() % 8).parts
        assert len(parts) == (1 if sparse == 10**9 else 3)  # up to 4, 8 and 128 columns
        slope = gradients(model, (logits * weights).sum() + after.layers[0].fast_weights.sum())
        found.append((logits, slope, *seen["gamma_values"], *after.layers[1], after.positions()))
        assert sum(len(part.target[0]) for part in parts) == (mask != 0).sum()
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_weights_swapped_in_inference_mode_can_be_trained_with():
    model, ids = tiny(), torch.randint(0, 40, (1, 40))
    with torch.inference_mode():
        model.load_state_dict(model.state_dict())
    model(ids).sum().backward()


def test_a_threshold_that_rounding_would_decide_is_refused():
    for threshold in (0, 9e-4, 1.1e6, 1e200):
        with pytest.raises(ValueError, match="snr_threshold must be a number of at least 0.001"):
            Phase2Config(snr_threshold=threshold)
        with pytest.raises(ValueError, match="threshold must be from 0.001 to 1e6"):
            select(torch.randn(1, 1, 4, 4), threshold)
    for threshold in (1e-3, 1e6):
        select(torch.randn(1, 1, 4, 4), Phase2Config(snr_threshold=threshold).snr_threshold)


def test_a_propagator_of_half_precision_rates_has_more_digits():
    rates = torch.tensor([0.3, 0.1], dtype=torch.bfloat16)
    torch.testing.assert_close(propagator(*rates), propagator(*rates.float()), atol=0, rtol=0)


@pytest.mark.parametrize("decay", [90.0, 95.0, 103.0, 200.0, math.inf])
def test_the_gradient_of_a_propagator_that_leaves_next_to_nothing_is_finite(decay):
    rates = torch.ones(1, requires_grad=True), torch.full((1,), decay, requires_grad=True)
    found = torch.view_as_real(propagator(*rates))
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), rates))


def test_a_floor_that_is_not_positive_is_refused():
    for floor in (0.0, -1e-3):
        with pytest.raises(ValueError, match="base_decay must be positive"):
            DecayPotential(8, 2, floor)
        with pytest.raises(ValueError, match="base_decay must be positive"):
            decay_rate(torch.zeros(2), floor)


def test_rates_keep_their_digits_above_a_high_floor():
    layer = DecayPotential(8, 2, base_decay=0.1)
    with torch.no_grad():
        layer.linear.weight.zero_()
        layer.linear.bias.copy_(torch.tensor([1.0, 1.0, -9.0, -8.0]))
    with torch.autocast("cpu", torch.bfloat16):
        potential, gamma = layer(torch.zeros(1, 1, 8))
    exact = torch.nn.functional.softplus(torch.tensor([-9.0, -8.0]))
    torch.testing.assert_close(potential[0, 0], exact, rtol=1e-2, atol=0)
    assert gamma.dtype == torch.float32


def test_a_state_without_its_history_cuts_the_gradient():
    model, ids = tiny(), tokens(1, 20)
    _, state = model(ids, return_state=True)
    cut = state.detach()
    assert cut.position == state.position
    for layer, other in zip(state.layers, cut.layers, strict=True):
        assert all(map(torch.equal, layer, other))
        assert not any(x.requires_grad for x in other) and layer.fast_weights.requires_grad
    for _ in range(2):  # truncated backpropagation through time
        logits, state = model(ids, state=state.detach(), return_state=True)
        logits.sum().backward()


def test_the_bases_of_a_part_of_something_larger_stay_exact():
    weights = {f"0.{name}": weight for name, weight in tiny().state_dict().items()}
    with torch.device("meta"):
        whole = torch.nn.Sequential(tiny())
    whole.load_state_dict(weights, assign=True)
    exact, ids = tiny().blocks[0].basis, tokens(1, 20)
    assert torch.equal(whole[0].blocks[1].basis, exact)
    assert torch.equal(whole(ids), tiny()(ids))
    wide = {name: weight.double() for name, weight in weights.items()}
    whole.load_state_dict(wide, assign=True)
    assert whole[0].blocks[0].basis.dtype == torch.float64
    model = tiny()
    model.blocks.bfloat16(), model.blocks.float()  # the weights are rounded
    assert torch.equal(model.blocks[0].basis, exact)  # the bases are not


@pytest.mark.parametrize("part", ["head", "last network"])
def test_logits_that_are_no_numbers_are_refused_at_the_first_token(part):
    model = tiny()
    with torch.no_grad():
        (model.head.weight if part == "head" else model.blocks[-1].up)[0] = math.nan
    with pytest.raises(ValueError, match="logits must be finite"):
        model(tokens(1, 1))


def test_a_width_without_tabulated_zeros_is_refused_where_it_is_written():
    with pytest.raises(ValueError, match="d_model must be at most 512 times n_heads = 2 with"):
        Phase2Config(d_model=2048, n_heads=2)
    assert Phase2Config(d_model=2048, n_heads=2, resonance_basis="fourier").head_dim == 1024


def test_a_row_that_begins_with_a_memory_depends_on_no_other_row():
    model, text = tiny(), tokens(2, 12)
    with torch.no_grad():
        _, state = model(text[:, :8], return_state=True)  # row 0 stands at the end of a stretch
        given = state._replace(
            layers=tuple(given_memory(layer.fast_weights) for layer in state.layers),
            position=(8, 0),
        )
        alone = given._replace(
            layers=tuple(type(x)(*(t[1:] for t in x)) for x in given.layers),
            position=given.position[1:],
        )
        both = model(text, state=given)
        torch.testing.assert_close(both[1:], model(text[1:], state=alone), atol=1e-5, rtol=0)


def test_a_block_alone_has_weights():
    block, x = Phase2Block(Phase2Config(**TINY)), torch.randn(2, 5, 16)
    state = empty_state(block.config, 2).layers[0]
    y, *_ = block(x, state, 0)
    y.square().sum().backward()
    assert y.isfinite().all() and block.down.grad.any()


def test_bases_have_the_digits_of_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        basis = tiny().blocks[0].basis
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8).double(), atol=1e-12, rtol=0)


def test_a_first_call_without_tokens_leaves_warnings_on():
    model = tiny(base_decay=5.0)
    model(tokens(1, 0))
    with pytest.warns(UserWarning, match="Overdamped"):
        model(tokens(1, 9))


@pytest.mark.parametrize("base_decay", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dt", [1e-12, 1.0, 1e12])
@pytest.mark.filterwarnings("ignore::phase2.decay.OverdampedWarning")
def test_the_ends_of_what_is_allowed_run(base_decay, dt):
    model = tiny(base_decay=base_decay, dt=dt)
    logits = model(tokens(2, 40))
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_autocast_the_network_computes_as_pytorch_would(dtype):
    x, last = torch.randn(2, 5, 16, dtype=dtype), torch.zeros(2, 16, dtype=dtype)
    up, down = torch.randn(64, 16, dtype=dtype), torch.randn(16, 64, dtype=dtype)
    mix = torch.rand(16, dtype=dtype)
    expected, _ = feed_forward(x, mix, up, down, last)
    with torch.autocast("cpu", torch.bfloat16):
        y, end = feed_forward(x, mix, up, down, last)
        assert y.dtype == F.linear(x, down.T).dtype and end.dtype == dtype
    off = 0.02 * expected.abs().max().item() if dtype == torch.float32 else 0
    torch.testing.assert_close(y.to(dtype), expected, atol=off, rtol=0)
