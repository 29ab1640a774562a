"""The chunked memory equals its definition, whatever it is fed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from phase2.memory import as_complex, evolve, memory_chunked, memory_recurrent, times


def inputs(batch, length, heads, dim, dtype, seed, fastest=1.0):
    """Random q, k, v, Γ, V, η and a state; V turns by several rad a token, Γ reaches `fastest`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    q, k, v = (draw(batch, length, heads, dim) for _ in range(3))
    gamma = 1e-4 + fastest * draw(batch, length, heads).abs()
    potential, eta = 3 * draw(batch, length, heads), draw(batch, length, heads).abs()
    state = draw(batch, heads, dim, dim)
    return [q, torch.nn.functional.normalize(k, dim=-1), v, gamma, potential, eta, state]


def outcome(memory, tensors, dt, **options):
    """y, W and the gradient of every input of a fixed linear function of both."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    y, last = memory(*tensors[:6], dt=dt, state=tensors[6], **options)
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in (y, last)
    )
    return [y.detach(), last.detach(), *torch.autograd.grad(loss, tensors)]


def assert_equal(got, wanted, tolerance):
    names = ["y", "W", "dq", "dk", "dv", "dΓ", "dV", "dη", "dW"]
    for name, a, b in zip(names, got, wanted, strict=True):
        assert torch.isfinite(a).all(), name
        assert (a - b).norm() <= tolerance * b.norm().clamp(min=1), name


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    heads=st.integers(1, 3),
    half=st.integers(1, 5),
    chunk=st.integers(1, 80),
    dt=st.sampled_from([0.1, 1.0, 2.5]),
    fastest=st.sampled_from([0.01, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_chunked_equals_recurrence(batch, length, heads, half, chunk, dt, fastest, seed):
    tensors = inputs(batch, length, heads, 2 * half, torch.float64, seed, fastest)
    fast = outcome(memory_chunked, tensors, dt, chunk_size=chunk)
    assert_equal(fast, outcome(memory_recurrent, tensors, dt), 1e-10)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_float32(length):
    tensors = inputs(2, length, 2, 32, torch.float32, seed=length, fastest=0.2)
    wanted = outcome(memory_recurrent, tensors, 1.0)
    assert_equal(outcome(memory_chunked, tensors, 1.0), wanted, 1e-5)


def test_angle_of_a_long_sequence_is_exact():
    """A float32 sum of V dt would be off by radians after 200 000 tokens."""
    length = 200_000
    ones = torch.ones(1, length, 1)
    k = torch.zeros(1, length, 1, 2)
    k[:, 0, :, 0] = 1.0  # one write, then only turning
    eta = torch.zeros(1, length, 1)
    eta[:, 0] = 1.0
    _, W = memory_chunked(k, k, k, 1e-9 * ones, 3.0 * ones, eta)
    angle = torch.atan2(W[0, 0, 1, 0], W[0, 0, 0, 0])
    wanted = torch.remainder(torch.tensor(3.0 * (length - 1), dtype=torch.float64), 2 * torch.pi)
    assert abs(torch.remainder(angle.double() - wanted + torch.pi, 2 * torch.pi) - torch.pi) < 1e-3


@pytest.mark.parametrize("length", [30, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, length):
    """Products in half precision cost its digits, and no more in a long sequence."""
    tensors = inputs(1, length, 2, 16, torch.float32, seed=0, fastest=0.1)
    half = [x.to(dtype) for x in tensors[:3]] + tensors[3:]
    got = outcome(memory_chunked, half, 1.0)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    wanted = outcome(memory_recurrent, [x.float() for x in half], 1.0)
    slow = outcome(memory_recurrent, half, 1.0)
    assert slow[0].dtype == dtype and slow[1].dtype == torch.float32
    for found in (got, slow):
        assert_equal([x.float() for x in found], wanted, 2 * torch.finfo(dtype).eps)


def test_a_long_memory_of_half_precision_writes_is_summed_in_float32():
    tensors = inputs(1, 4096, 1, 32, torch.float32, seed=0, fastest=1e-4)
    half = [x.bfloat16() for x in tensors[:3]] + tensors[3:6]
    _, W = memory_chunked(*half)
    _, wanted = memory_chunked(*(x.float() for x in half))
    assert (W - wanted).norm() < 0.005 * wanted.norm()  # of each write, and not of their sum
    assert evolve(W.bfloat16(), *torch.ones(2, 1, 1)).dtype == torch.bfloat16


def test_a_factor_is_rounded_with_bfloat16_alone():
    x, factor = torch.randn(3, 4, 5), torch.rand(3, 4, 1)
    assert torch.equal(times(x.bfloat16(), factor), x.bfloat16() * factor.bfloat16())
    half = x.half()  # whose range is too small for a learning rate
    assert torch.equal(times(half, factor), (half.float() * factor).half())
    assert times(torch.zeros(2).half(), torch.tensor([1e5, 1.0])).isfinite().all()
    assert torch.equal(times(x, factor), x * factor)


def test_autocast_costs_no_digits():
    tensors = inputs(1, 100, 2, 16, torch.float32, seed=0, fastest=0.1)
    wanted = outcome(memory_chunked, tensors, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outcome(memory_chunked, tensors, 1.0)
    assert_equal(got, wanted, 1e-6)


def test_mask_hides_tokens():
    tensors = inputs(2, 40, 2, 8, torch.float64, seed=3)
    mask = torch.arange(40) < torch.tensor([[25], [40]])
    y, W = memory_chunked(*tensors[:6], state=tensors[6], mask=mask)
    short, state = memory_chunked(*(x[:1, :25] for x in tensors[:6]), state=tensors[6][:1])
    torch.testing.assert_close(y[:1, :25], short)
    torch.testing.assert_close(W[:1], state)


@pytest.mark.parametrize("memory", [memory_chunked, memory_recurrent])
@pytest.mark.parametrize("length", [0, 3])
def test_the_memory_is_never_left_in_half_precision(memory, length):
    tensors = inputs(1, 3, 2, 8, torch.bfloat16, seed=0)
    y, W = memory(*(x[:, :length] for x in tensors[:6]), state=tensors[6])
    assert y.dtype == torch.bfloat16 and W.dtype == torch.float32


def test_no_tokens():
    tensors = inputs(2, 3, 2, 8, torch.float32, seed=0)
    for memory in (memory_recurrent, memory_chunked):
        y, W = memory(*(x[:, :0] for x in tensors[:6]), state=tensors[6])
        assert y.shape == (2, 0, 2, 8) and torch.equal(W, tensors[6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles(dtype):
    tensors = inputs(1, 100, 2, 8, torch.float32, seed=0, fastest=0.1)
    tensors[:3] = (x.to(dtype) for x in tensors[:3])
    compiled = torch.compile(lambda *x: memory_chunked(*x), backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors[:6])[0], memory_chunked(*tensors[:6])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(q=x["q"][0]), r"q must have shape \(B, N, H, D\), got \(6, 2, 4\)"),
        (lambda x: x.update({n: x[n][..., :3] for n in "qkv"}), "D must be even .* got D = 3"),
        (lambda x: x.update(gamma=x["gamma"] * 0), "gamma must be positive .* value is 0$"),
        (lambda x: x.update(gamma=x["gamma"] * 0 - 2), "gamma must be positive .* value is -2$"),
        (lambda x: x.update(gamma=x["gamma"] * torch.nan), r"value is nan \(are the weights"),
        (lambda x: x.update(eta=x["eta"][:, :2]), r"eta must have shape \(1, 6, 2\), got"),
        (lambda x: x.update(state=x["state"] * torch.nan), "state must be finite"),
        (lambda x: x.update(state=x["state"][:, :1]), r"state must have shape \(1, 2, 4, 4\)"),
        (lambda x: x.update(v=x["v"].long()), "v must be of floating point, got torch.int64"),
        (lambda x: x.update(q=[1.0]), "q must be a tensor, got list"),
        (lambda x: x.update(eta=0.1), "eta must be a tensor, got float"),
        (lambda x: x.update(state=1.0), "state must be a tensor, got float"),
        (lambda x: x.update(dt=-1.0), "dt must be a positive number, got -1.0"),
        (lambda x: x.update(dt=torch.inf), "dt must be a positive number, got inf"),
    ],
)
@pytest.mark.parametrize("memory", [memory_recurrent, memory_chunked])
def test_bad_input(memory, change, message):
    names = ["q", "k", "v", "gamma", "potential", "eta", "state"]
    arguments = dict(zip(names, inputs(1, 6, 2, 4, torch.float32, seed=0), strict=True))
    change(arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        memory(**arguments)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT,
    "every other": lambda x: x[..., ::2],
    "odd offset": lambda x: x[..., 1:7],
    "odd stride": lambda x: x.flatten()[:21].view(3, 7)[:, :4],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pairs_are_complex_numbers_in_any_layout(layout):
    x = layout(torch.randn(8, 8))
    pairs = as_complex(x)
    assert torch.equal(pairs.real, x[..., 0::2]) and torch.equal(pairs.imag, x[..., 1::2])


def test_evolving_takes_half_precision():
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(2, 3, 8, 8, generator=generator)
    decay, angle = torch.rand(2, 2, 3, generator=generator)
    half = evolve(*(x.bfloat16() for x in (memory, decay, angle)))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), evolve(memory, decay, angle), atol=0.05, rtol=0.05)


def test_a_second_derivative_is_refused():
    """Rather than being silently wrong: the backward pass is written by hand."""
    *tensors, state = inputs(1, 6, 1, 4, torch.float64, seed=0)
    q = tensors[0].requires_grad_()
    y, _ = memory_chunked(*tensors, state=state)
    for loss in (y.sum(), y.square().sum()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, q, create_graph=True)


def test_messages_speak_of_shapes_as_tuples():
    *tensors, state = inputs(1, 6, 1, 4, torch.float64, seed=0)
    with pytest.raises(ValueError, match=r"shape \(1, 1, 4, 4\), got \(1, 1, 4, 3\)"):
        memory_chunked(*tensors, state=state[..., :3])


def test_a_contiguous_tensor_that_begins_at_an_odd_place():
    buffer = torch.randn(2 * 8 * 2 * 4 + 1)
    q = buffer[1:].view(2, 8, 2, 4)
    k, v = F.normalize(torch.randn(2, 8, 2, 4), dim=-1), torch.randn(2, 8, 2, 4)
    rates = 0.1 * torch.rand(2, 8, 2) + 0.01, torch.randn(2, 8, 2), torch.rand(2, 8, 2)
    y, _ = memory_chunked(q, k, v, *rates, chunk_size=4)
    torch.testing.assert_close(y, memory_recurrent(q, k, v, *rates)[0], atol=1e-5, rtol=1e-4)


def test_a_large_half_precision_state_is_finite():
    tokens = torch.randn(3, 1, 4, 16, 64)
    rates = torch.full((3, 1, 4, 16), 0.1)
    memory_chunked(*tokens, *rates, state=torch.ones(1, 16, 64, 64).half())


def test_a_mask_of_another_shape_is_refused():
    tokens, rates = torch.randn(3, 2, 4, 1, 8), torch.full((3, 2, 4, 1), 0.1)
    with pytest.raises(
        ValueError, match=r"mask must have shape \(2, 4\) of torch.bool, got \(4,\)"
    ):
        memory_chunked(*tokens, *rates, mask=torch.ones(4, dtype=torch.bool))


def test_a_token_that_erases_everything_costs_its_neighbors_no_digits():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 64, 1, 16)
    k = F.normalize(k, dim=-1)
    gamma = 0.01 + 0.2 * torch.rand(1, 64, 1)
    for gone in (1e3, 1e6, torch.inf):
        gamma[:, 5] = gone
        rates = gamma, torch.randn(1, 64, 1), torch.rand(1, 64, 1)
        y, _ = memory_chunked(q, k, v, *rates)
        expected, _ = memory_recurrent(q, k, v, *rates)
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_autocast_leaves_the_definition_as_it_is():
    tokens, rates = torch.randn(3, 2, 9, 1, 8), 0.1 + torch.rand(3, 2, 9, 1)
    expected, _ = memory_recurrent(*tokens, *rates)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(memory_recurrent(*tokens, *rates)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_a_memory_turns_without_complex_numbers(dtype):
    """Which a compiler leaves as they are, one operation after the other."""
    codes = []

    def backend(graph, _):
        codes.append(graph.code)
        return graph

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, 4, 4, generator=generator).to(dtype)
    decay, angle = torch.rand(2, 2, 3, generator=generator, dtype=torch.float64)
    found = torch.compile(evolve, backend=backend, fullgraph=True)(weights, decay, 3 * angle)
    assert codes and "complex" not in codes[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found, evolve(weights, decay, 3 * angle))


def test_several_chunks_compile_without_a_break():
    tokens, rates = torch.randn(3, 2, 70, 2, 8), 0.1 + torch.rand(3, 2, 70, 2)
    compiled = torch.compile(memory_chunked, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(*tokens, *rates), memory_chunked(*tokens, *rates)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [0, -1])
def test_a_chunk_size_below_one_is_refused(size):
    *tensors, state = inputs(1, 6, 1, 4, torch.float64, seed=0)
    with pytest.raises(
        ValueError, match=f"chunk_size must be an integer of at least 1, got {size}"
    ):
        memory_chunked(*tensors, state=state, chunk_size=size)


def test_a_mask_of_numbers_and_a_size_that_is_none_are_refused():
    tokens, rates = torch.randn(3, 1, 4, 1, 8), torch.full((3, 1, 4, 1), 0.1)
    with pytest.raises(ValueError, match="of torch.bool, got .* of torch.int64"):
        memory_chunked(*tokens, *rates, mask=torch.full((1, 4), 2))
    with pytest.raises(ValueError, match="chunk_size must be an integer of at least 1, got 2.5"):
        memory_chunked(*tokens, *rates, chunk_size=2.5)


def test_rates_of_half_precision_are_multiplied_by_dt_with_all_digits():
    tensors = inputs(1, 128, 2, 16, torch.float32, seed=3, fastest=0.01)
    tensors[3:6] = (x.bfloat16() for x in tensors[3:6])
    (y, last), (y_wanted, wanted) = (
        memory(*tensors[:6], dt=10.0, state=tensors[6])
        for memory in (memory_chunked, memory_recurrent)
    )
    assert (y - y_wanted).norm() < 1e-5 * y_wanted.norm()
    assert (last - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("rate", [5.0, 100.0, 1e6])
def test_tokens_that_forget_much_leave_the_rest_of_their_chunk_exact(rate):
    tensors = inputs(1, 64, 2, 16, torch.float32, seed=5)
    tensors[3] = torch.full_like(tensors[3], 1e-4)
    tensors[3][:, :56] = rate
    (y, last), (y_wanted, wanted) = (
        memory(*tensors[:6], state=tensors[6]) for memory in (memory_chunked, memory_recurrent)
    )
    assert (y - y_wanted)[:, 56:].norm() < 2e-6 * y_wanted[:, 56:].norm()
    assert (last - wanted).norm() < 2e-6 * wanted.norm()


@pytest.mark.parametrize("memory", [memory_chunked, memory_recurrent])
def test_the_last_memory_can_be_changed_in_place(memory):
    tensors = [x.requires_grad_() for x in inputs(2, 6, 2, 4, torch.float32, seed=0)]
    _, last = memory(*tensors[:6], state=tensors[6])
    last[0] = 0  # a row begins anew
    (gradient,) = torch.autograd.grad(last.sum(), tensors[6])
    assert gradient[0].eq(0).all() and gradient[1].ne(0).any()


def test_a_chunk_size_may_be_any_integer():
    tensors = inputs(1, 6, 2, 4, torch.float32, seed=0)
    memory_chunked(*tensors[:6], chunk_size=np.int64(4))
