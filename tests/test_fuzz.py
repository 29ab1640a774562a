"""A thousand models nobody would choose: no NaN, and no exception that is not documented."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase2 import Phase2Config, create_phase2_model
from phase2.resonance import BASES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # overdamped or driven: warned of

CONFIGS = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(1, 20),
        "n_layers": st.integers(1, 2),
        "base_decay": st.sampled_from([1e-8, 1e-4, 0.1, 5.0]),
        "dt": st.sampled_from([1e-3, 1.0, 50.0]),
        "hebbian_eta": st.sampled_from([1e-6, 0.1, 100.0]),
        "consolidate_every": st.integers(1, 12),
        "snr_threshold": st.sampled_from([1e-3, 2.0, 1e3]),
        "snr_gamma_boost": st.sampled_from([0.0, 1.0, 50.0]),
        "snr_eta_boost": st.sampled_from([0.0, 2.0]),
        "resonance_basis": st.sampled_from(BASES),
        "resonance_strength": st.sampled_from([0.0, 0.01, 1.0]),
        "gamma_adjust_rate": st.sampled_from([0.0, 0.01, 10.0]),
    }
)
SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 8]))  # heads, width of a head
MASKS = st.sampled_from(["none", "all", "left", "right", "holes", "packed", "empty row"])
DTYPES = st.sampled_from(["float32", "float64", "bfloat16", "autocast"])


def mask_of(kind, ids):
    """An attention mask for the ids, or None."""
    mask, length = torch.ones_like(ids), ids.shape[1]
    if kind == "left":
        mask[0, : length // 2] = 0
    elif kind == "right":
        mask[0, length // 2 :] = 0
    elif kind == "holes":
        mask = torch.randint(0, 2, ids.shape)
    elif kind == "packed":
        mask = torch.randint(0, 3, ids.shape).sort(1).values
    elif kind == "empty row":
        mask[0] = 0
    return None if kind == "none" else mask


def gradients(model, ids, mask, autocast):
    """Logits after a forward pass, with the gradients of their squares on the parameters."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(ids, attention_mask=mask)
    logits.float().square().sum().backward()
    return logits


@settings(max_examples=1000, deadline=None)
@given(
    CONFIGS, SHAPES, st.integers(1, 3), st.integers(0, 30), MASKS, DTYPES, st.integers(0, 30),
    st.integers(0, 10**6),
)  # fmt: skip
def test_any_model_on_any_input(values, shape, batch, length, kind, dtype, cut, seed):
    heads, dim = shape
    torch.manual_seed(seed)
    config = Phase2Config(d_model=heads * dim, n_heads=heads, **values)
    model = create_phase2_model(config=config)
    model.to(getattr(torch, dtype) if dtype != "autocast" else torch.float32)
    ids = torch.randint(0, config.vocab_size, (batch, length))
    mask = mask_of(kind, ids)

    logits = gradients(model, ids, mask, dtype == "autocast")
    assert logits.shape == (batch, length, config.vocab_size) and logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    cut, state, parts = min(cut, length), None, []
    with torch.no_grad():
        for piece in (slice(0, cut), slice(cut, length)):
            part = None if mask is None else mask[:, piece]
            y, state = model(ids[:, piece], state, part, return_state=True)
            parts.append(y)
        assert torch.cat(parts, dim=1).isfinite().all()
        assert all(x.isfinite().all() for layer in state.layers for x in layer)
        *_, found = model(ids, attention_mask=mask, return_diagnostics=True)
    for stats in found["stability_metrics"]:
        # no memory exceeds its bound, but for rounding: six times 0.2 % in bfloat16
        assert stats["margin"] > (-1.2e-2 if dtype == "bfloat16" else -1e-2), stats
    if dtype == "float64":
        whole = model(ids, attention_mask=mask)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        if kind == "packed" and 0 < cut < length:  # a document that begins with a call goes on
            before, after = mask[:, cut - 1], mask[:, cut]
            real[(before != 0) & (before != after)] = False
        torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-6, rtol=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(list(Phase2Config.__dataclass_fields__)),
        st.one_of(st.integers(-3, 300), st.floats(), st.booleans(), st.none(), st.text(max_size=8)),
        max_size=4,
    )
)
def test_any_configuration_is_built_or_refused_by_name(values):
    try:
        Phase2Config(**values)
    except ValueError as error:
        named = [name for name in Phase2Config.__dataclass_fields__ if name in str(error)]
        assert named and str(error).isprintable()
