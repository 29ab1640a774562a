"""Stretches done together equal stretches done one by one, whatever their number and length."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase2 import Phase2Config
from phase2.consolidation import (
    coherence_of,
    consolidate,
    empty_memory,
    given_memory,
    pass_through,
    remember,
    stretch,
    stretch_lengths,
    stretches,
    token,
)
from phase2.resonance import (
    discrete_response,
    in_basis,
    resonance_basis,
    resonance_info,
    resonance_mask,
    resonate,
)
from phase2.snr import noise_scale, select, snr_stats

DIM = 8


def setting(**values):
    return SimpleNamespace(**{**Phase2Config().to_dict(), "resonance_strength": 0.2, **values})


def sequence(length, seed=0, driven=0.0, dtype=torch.float64):
    """q, k, v, Γ, V, η of two rows; a share `driven` of the tokens writes one and the same pair."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, length, 2, DIM, dtype=dtype, generator=generator)
    same = torch.rand(length, generator=generator) < driven
    k[:, same], v[:, same] = k[:, :1].clone(), v[:, :1].clone()
    k = torch.nn.functional.normalize(k, dim=-1)
    gamma, eta = 1e-3 + 0.05 * torch.rand(2, 2, length, 2, dtype=dtype, generator=generator)
    potential = torch.randn(2, length, 2, dtype=dtype, generator=generator)
    return [q, k, v, gamma, potential * (1 - driven), eta]


def grown(state, config, basis):
    """A state that has read 13 tokens and been looked at: not empty, and at a boundary."""
    *_, state = remember(*sequence(13, seed=99), state, 0, None, config)
    return consolidate(state, basis, config)


def everything(inputs, state, basis, config, together):
    """Outputs, state and the gradients of a random function of all of them."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    weights = state.fast_weights.clone().requires_grad_()
    state = state._replace(fast_weights=weights, earlier=weights)
    y, gamma, last = pass_through(inputs, None, state, 0, basis, config, together)
    generator, loss = torch.Generator().manual_seed(1), 0
    for x in (y, *last[:4]):
        loss = loss + (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
    return y, gamma, *last, *torch.autograd.grad(loss, [*inputs, weights])


@settings(max_examples=60)
@given(
    every=st.sampled_from([1, 2, 5, 8, 64, 128]),
    count=st.integers(2, 5),
    more=st.integers(0, 7),
    driven=st.sampled_from([0.0, 1.0]),
    kind=st.sampled_from([None, "zeta", "identity"]),
    start=st.booleans(),
    dt=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_together_is_one_by_one(every, count, more, driven, kind, start, dt, seed):
    config = setting(consolidate_every=every, dt=dt)
    basis = kind and resonance_basis(kind, DIM, torch.float64)
    state = empty_memory(2, 2, DIM, dtype=torch.float64)
    state = grown(state, config, basis) if start else state
    inputs = sequence(every * count + more, seed, driven)
    found = [everything(inputs, state, basis, config, together) for together in (1, 3, 8)]
    for a, b, c in zip(*found, strict=True):
        torch.testing.assert_close(b, a, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(c, a, atol=1e-9, rtol=1e-9)


def test_a_memory_that_answers_in_no_mode_has_none_picked_by_rounding():
    """Rectified keys and values can share no index; turned there and back, energies are 1e-17."""
    basis, config = resonance_basis("identity", DIM, torch.float64), setting(snr_gamma_boost=0.0)
    q, k, v, *rates = sequence(1)
    even = torch.arange(DIM) % 2 == 0
    q, k, v = q, k * even, v * ~even
    empty = empty_memory(2, 2, DIM, dtype=torch.float64)
    *_, chunked = remember(q, k, v, *rates, empty, 0, basis, config)
    *_, alone = token(*(x[:, 0] for x in (q, k, v, *rates)), empty, config.dt)
    for state in (chunked, alone):
        assert in_basis(state.fast_weights, basis).diagonal(dim1=-2, dim2=-1).abs().max() < 1e-15
    weights = [consolidate(state, basis, config).fast_weights for state in (chunked, alone)]
    torch.testing.assert_close(*weights, atol=1e-15, rtol=1e-12)
    infos = [resonance_info(state.fast_weights, basis) for state in (chunked, alone)]
    assert all(torch.equal(info["mask"], torch.full((2, 2, DIM), 0.5).double()) for info in infos)


def test_the_controller_acts_between_stretches_done_together():
    config, basis = setting(consolidate_every=16), resonance_basis("zeta", DIM, torch.float64)
    empty = empty_memory(2, 2, DIM, dtype=torch.float64)
    for driven, acts in ((0.0, False), (1.0, True)):
        inputs = sequence(64, driven=driven)
        _, gamma, _ = stretches(*inputs, empty, 4, basis, config)
        added = (gamma - inputs[3]).unflatten(1, (4, 16))
        assert not added[:, 0].any() and bool((added[:, 1:] > 0.005).all()) == acts
        torch.testing.assert_close(added, added[:, :, :1].expand_as(added), atol=1e-12, rtol=0)


def test_gradient_of_looks_that_change_nothing():
    """Against finite differences, through three looks whose matrices do not depend on the input."""
    off = {"snr_gamma_boost": 0.0, "resonance_strength": 0.0, "gamma_adjust_rate": 0.0}
    config, basis = setting(consolidate_every=3, **off), resonance_basis("zeta", 4, torch.float64)
    inputs = [x[:1, :, :1, ..., :4] if x.dim() == 4 else x[:1, :, :1] for x in sequence(12)]
    inputs = [x.clone().requires_grad_() for x in inputs]
    empty = empty_memory(1, 1, 4, dtype=torch.float64)

    def outputs(*x):
        y, _, state = remember(*x, empty, 0, basis, config)
        return y, *state[:4]

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("which", ["y", "fast_weights", "earlier"])
def test_any_result_alone_has_a_gradient(which):
    config, basis = setting(consolidate_every=4), resonance_basis("zeta", DIM, torch.float64)
    empty = empty_memory(2, 2, DIM, dtype=torch.float64)

    def gradient(together):
        inputs = [x.requires_grad_() for x in sequence(12)]
        y, _, state = pass_through(inputs, None, empty, 0, basis, config, together)
        loss = (y if which == "y" else getattr(state, which)).square().sum()
        return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)

    for a, b in zip(gradient(1), gradient(8), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_bfloat16_stays_close():
    config, basis = setting(consolidate_every=64), resonance_basis("zeta", DIM)
    empty, inputs = empty_memory(2, 2, DIM), sequence(256, dtype=torch.float32)
    half = [x.bfloat16() for x in inputs[:3]] + inputs[3:]
    y, _, state = remember(*half, empty, 0, basis, config)
    wanted, _, last = remember(*inputs, empty, 0, basis, config)
    assert y.dtype == torch.bfloat16 and state.fast_weights.dtype == torch.float32
    assert (y.float() - wanted).norm() < 0.02 * wanted.norm()
    assert (state.fast_weights - last.fast_weights).norm() < 0.02 * last.fast_weights.norm()


@given(st.integers(0, 50), st.integers(1, 200), st.integers(1, 20), st.integers(1, 9))
def test_lengths_end_at_boundaries(position, length, every, together):
    lengths = stretch_lengths(position, length, every, together)
    assert sum(lengths) == length and min(lengths) > 0
    for tokens in lengths[:-1]:
        position += tokens
        assert position % every == 0
    assert max(lengths) <= together * every


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_rounded_basis_does_no_more_harm_together(dtype):
    """As in a model that was converted: UᵀU is 1 only to the precision of the model."""
    config = setting(consolidate_every=8)
    basis = resonance_basis("zeta", DIM).to(dtype)
    inputs = sequence(64, dtype=torch.promote_types(dtype, torch.float32))
    empty = empty_memory(2, 2, DIM, dtype=inputs[0].dtype)
    one, eight = (pass_through(inputs, None, empty, 0, basis, config, n)[2] for n in (1, 8))
    error = (one.fast_weights - eight.fast_weights).norm() / one.fast_weights.norm()
    assert error < (1e-12 if dtype == torch.float64 else 5e-3)


def test_a_memory_in_the_middle_of_a_stretch_is_not_taken_for_one_at_its_start():
    config, basis = setting(consolidate_every=8), resonance_basis("zeta", DIM, torch.float64)
    empty, inputs = empty_memory(2, 2, DIM, dtype=torch.float64), sequence(32)
    *_, state = remember(*sequence(13, seed=1), empty, 0, basis, config)
    whole, _, _ = remember(*inputs, state, 0, basis, config)
    parts = []
    for at in range(0, 32, 8):
        y, _, state = remember(*(x[:, at : at + 8] for x in inputs), state, at, basis, config)
        parts.append(y)
    torch.testing.assert_close(whole, torch.cat(parts, 1), atol=1e-10, rtol=0)


def test_queries_and_state_of_different_precision():
    config, basis = setting(consolidate_every=8), resonance_basis("zeta", DIM, torch.float64)
    empty = empty_memory(2, 2, DIM, dtype=torch.float64)
    q, *rest = sequence(32, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for together in (1, 8):
            inputs = [q.to(dtype), *rest]
            y, _, state = pass_through(inputs, None, empty, 0, basis, config, together)
            assert y.dtype == dtype and state.fast_weights.dtype == torch.float32


def test_a_second_derivative_is_refused():
    config, basis = setting(consolidate_every=8), resonance_basis("zeta", DIM, torch.float64)
    q, *rest = sequence(32)
    y, _, _ = remember(
        q.requires_grad_(), *rest, empty_memory(2, 2, DIM, dtype=q.dtype), 0, basis, config
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), q, create_graph=True)


@pytest.mark.parametrize("strength", [0.0, 1e3])
def test_selection_costs_no_digits_under_autocast(strength):
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(1, 1, 32, 32, generator=generator)
    memory = memory + strength * torch.outer(memory[0, 0, 0], memory[0, 0, 1])
    wanted = select(memory)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(select(memory)[0], wanted)


def test_arguments_are_checked_together_as_one_by_one():
    basis = resonance_basis("zeta", DIM, torch.float64)
    empty = empty_memory(2, 2, DIM, dtype=torch.float64)
    for wrong in ({"snr_threshold": -1.0}, {"snr_gamma_boost": -1.0}, {"resonance_strength": 2.0}):
        for together in (1, 8):
            config = setting(consolidate_every=8, **{"resonance_strength": 0.1, **wrong})
            with pytest.raises(ValueError, match="must be"):
                pass_through(sequence(32), None, empty, 0, basis, config, together)


def test_what_the_memory_is_not_defined_for_is_refused():
    config, basis = setting(consolidate_every=8), resonance_basis("zeta", DIM, torch.float64)
    empty = empty_memory(2, 2, DIM, dtype=torch.float64)
    q, k, v, gamma, *rest = sequence(32)
    with pytest.raises(ValueError, match="gamma must be positive"):
        remember(q, k, v, -gamma, *rest, empty, 0, basis, config)
    with pytest.raises(ValueError, match="k must have shape"):
        remember(q, k[:, :5], v, gamma, *rest, empty, 0, basis, config)


@pytest.mark.parametrize("gone", [1e4, 1e6, torch.inf])
def test_a_token_that_erases_everything_between_looks(gone):
    """As in float64, one token after the other, though a stretch sums its decays."""
    config, basis = setting(consolidate_every=16), None
    inputs = sequence(48, dtype=torch.float32)
    inputs[3][:, 21] = gone
    state = empty_memory(2, 2, DIM)
    y, _, last = pass_through(inputs, None, state, 0, basis, config, together=3)
    wide = [x.double() for x in inputs]
    state = empty_memory(2, 2, DIM, dtype=torch.float64)
    for t in range(48):
        one = [x[:, t : t + 1] for x in wide]
        expected, _, state = pass_through(one, None, state, t, basis, config, together=1)
        torch.testing.assert_close(y[:, t].double(), expected[:, 0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(last.bound.double(), state.bound, atol=0, rtol=1e-4)


@pytest.mark.parametrize("gone", [1.0, 95.0, 103.0, torch.inf])
def test_a_single_token_that_leaves_next_to_nothing_has_a_gradient(gone):
    """In float32 e^−95 has lost digits, and e^−104 is 0."""
    config, empty = setting(), empty_memory(2, 2, DIM)
    state = empty._replace(fast_weights=torch.ones_like(empty.fast_weights))
    inputs = [x.requires_grad_() for x in sequence(1, dtype=torch.float32)]
    inputs[3].data.fill_(gone)
    y, _, last = stretch(*inputs, state, config, None)
    wanted = torch.autograd.grad(y.sum() + last.fast_weights.sum(), inputs)
    y, _, last = token(*(x[:, 0] for x in inputs), state, config.dt)
    found = torch.autograd.grad(y.sum() + last.fast_weights.sum(), inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_coherence_of_a_state_has_no_gradient():
    weights = torch.ones(1, 1, 4, 4, requires_grad=True)
    assert not coherence_of(empty_memory(1, 1, 4)._replace(fast_weights=weights)).requires_grad


def test_a_given_memory_is_one_just_looked_at():
    basis, config = resonance_basis("zeta", DIM, torch.float64), setting()
    looked = grown(empty_memory(2, 2, DIM, dtype=torch.float64), config, basis)
    given = given_memory(looked.fast_weights)
    for name, a, b in zip(given._fields, given, looked, strict=True):
        if name not in ("last_coherence", "gamma_shift", "last_key", "last_input"):
            torch.testing.assert_close(a, b, msg=name)
    learned = given_memory(looked.fast_weights.requires_grad_())
    assert learned.earlier.requires_grad and not learned.bound.requires_grad
    *_, first = remember(*sequence(10), given, 0, basis, config)
    assert (first.fast_weights.norm(dim=(-2, -1)) <= first.bound).all()


@pytest.mark.parametrize("length", [40, 64])
@pytest.mark.parametrize("boost", [0.0, 0.5])  # several stretches at once, and one by one
def test_a_basis_gets_no_gradient(length, boost):
    basis = resonance_basis("zeta", DIM, torch.float64).requires_grad_()
    inputs, empty = sequence(length), empty_memory(2, 2, DIM, dtype=torch.float64)
    inputs[2].requires_grad_()
    config = setting(consolidate_every=16, snr_eta_boost=boost)
    y, _, state = remember(*inputs, empty, 0, basis, config)
    (y.sum() + state.fast_weights.sum()).backward()
    assert basis.grad is None and inputs[2].grad.any()


def test_a_memory_that_is_learned_may_begin_at_zero():
    inputs, config = sequence(48), setting(consolidate_every=16)
    start = [x.requires_grad_() for x in empty_memory(2, 2, DIM, dtype=torch.float64)]

    def gradients(read):
        y, _, state = read(type(empty)(*start))
        loss = y.square().sum() + state.fast_weights.square().sum()
        wanted = start[0], start[8], start[9]  # W, gamma_shift and eta_scale
        return torch.autograd.grad(loss, wanted)

    empty = empty_memory(2, 2, DIM, dtype=torch.float64)
    found = gradients(lambda state: remember(*inputs, state, 0, None, config))
    wanted = gradients(lambda state: pass_through(inputs, None, state, 0, None, config, 1))
    torch.testing.assert_close(found, wanted)
    doubled = empty._replace(eta_scale=2 * empty.eta_scale)  # of the first stretch
    y, twice = (remember(*inputs, state, 0, None, config)[0] for state in (empty, doubled))
    torch.testing.assert_close(twice[:, :16], 2 * y[:, :16])


def test_a_stretch_that_wrote_nothing_has_no_share():
    inputs, config = sequence(192), setting(consolidate_every=64, snr_eta_boost=1.0)
    inputs[5][:, 64:128] = 0.0  # η
    whole, _, state = remember(
        *inputs, empty_memory(2, 2, DIM, dtype=torch.float64), 0, None, config
    )
    assert (state.eta_scale == 1).all()
    state, parts = empty_memory(2, 2, DIM, dtype=torch.float64), []
    for t in range(0, 192, 7):
        y, _, state = remember(*(x[:, t : t + 7] for x in inputs), state, t, None, config)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e19])
def test_the_size_of_a_memory_does_not_matter(scale):
    torch.manual_seed(0)
    memory, basis = torch.randn(2, 3, DIM, DIM), resonance_basis("zeta", DIM)
    memory[0] += 5 * torch.randn(3, DIM, 1) @ torch.randn(3, 1, DIM)
    torch.testing.assert_close(
        resonate(scale * memory, basis, 0.3) / scale, resonate(memory, basis, 0.3)
    )
    (kept, share), (wanted, wanted_share) = (select(x) for x in (scale * memory, memory))
    torch.testing.assert_close((kept / scale, share), (wanted, wanted_share))
    torch.testing.assert_close(noise_scale(scale * memory) / scale, noise_scale(memory))
    found, wanted = snr_stats(scale * memory), snr_stats(memory)
    for name in ("mean_snr", "std_snr", "selected_share"):
        assert abs(found[name] / wanted[name] - 1) < 1e-4
    found, wanted = (resonance_info(x, basis)["mask"] for x in (scale * memory, memory))
    torch.testing.assert_close(found, wanted)
    energy = torch.rand(2, DIM)
    torch.testing.assert_close(resonance_mask(1e37 * energy), resonance_mask(energy))


@pytest.mark.parametrize("length", [1, 30, 64])  # a part of a stretch, and several stretches
def test_the_bound_holds_for_writes_that_take_away(length):
    config, empty = setting(consolidate_every=16), empty_memory(2, 2, DIM, dtype=torch.float64)
    *inputs, eta = sequence(length)
    found = [remember(*inputs, sign * eta, empty, 0, None, config)[2] for sign in (1, -1)]
    torch.testing.assert_close(found[1].bound, found[0].bound, atol=0, rtol=1e-12)
    size = found[1].fast_weights.norm(dim=(-2, -1))
    assert (size <= (1 + 1e-12) * found[1].bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_of_few_digits_are_of_all_digits(dtype):
    memory = torch.randn(2, 3, DIM, DIM).to(dtype)
    found, wanted = snr_stats(memory, 2), snr_stats(memory.double(), 2)
    assert found == pytest.approx(wanted, rel=1e-5) and isinstance(found["threshold"], float)


def test_an_empty_memory_has_no_snr():
    assert snr_stats(torch.zeros(1, 1, DIM, DIM))["mean_snr"] == 0


@pytest.mark.parametrize("gamma", [1e-5, 1e-4, 1e-2, 1.0])
def test_the_peak_of_a_slow_memory_is_finite(gamma):
    omega = torch.tensor(0.6, dtype=torch.float64)
    height = 1 / torch.expm1(torch.tensor(-gamma, dtype=torch.float64)) ** 2
    torch.testing.assert_close(discrete_response(omega, 0.6, gamma), height)
    torch.testing.assert_close(
        discrete_response(omega.float(), omega.float(), gamma), height.float()
    )
    whole = torch.arange(3)  # a frequency may be an integer
    torch.testing.assert_close(
        discrete_response(whole, 0.0, gamma), discrete_response(whole.float(), 0.0, gamma)
    )


@pytest.mark.parametrize("length", [100, 256])  # a part of a stretch, and several stretches
def test_angles_of_half_precision_are_summed_with_all_digits(length):
    inputs = [x.float() for x in sequence(length)]
    inputs[3:] = (x.bfloat16() for x in inputs[3:])
    config = setting(consolidate_every=128)
    *_, state = remember(*inputs, empty_memory(2, 2, DIM), 0, None, config)
    angle = inputs[4].double()[:, -min(length, 128) :].sum(1)
    torch.testing.assert_close(state.turned, angle.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("function", [noise_scale, select, snr_stats])
def test_what_is_no_stack_of_memories(function):
    with pytest.raises(ValueError, match=r"must have shape \(B, H, D, D\), got \(4, 4\)"):
        function(torch.randn(4, 4))
    with pytest.raises(TypeError, match="must be a floating-point tensor, got torch.int64"):
        function(torch.ones(1, 1, 4, 4, dtype=torch.long))
