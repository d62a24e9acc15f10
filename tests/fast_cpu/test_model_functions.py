"""The faster functions for a CPU have the values and the gradients of mlx-lm's functions."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import activations, base, qwen3
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from tests.devices import only_on_a_cpu
from tests.tiny import TOKENS, biased_model, expert_model, qwen3_model
from textpolicy.fast_cpu import array_slices, attention, exponential, model_functions
from textpolicy.fast_cpu.attention import scaled_dot_product_attention
from textpolicy.fast_cpu.exponential import exp, exp2
from textpolicy.fast_cpu.model_functions import swiglu, use_fast_functions
from textpolicy.training.gradient_checkpointing import recompute_activations

pytestmark = pytest.mark.usefixtures("size")
cpu = only_on_a_cpu("a GPU keeps mlx's functions")


@pytest.fixture(
    params=[
        (exponential.SMALL, array_slices.SLICE_SIZE),
        (0, array_slices.SLICE_SIZE),
        (0, 16),
        (0, 1),
    ],
    ids=["small arrays", "whole arrays", "slices of 16", "slices of 1"],
)
def size(request, monkeypatch):
    """Run every test with small arrays, with whole ones, and in slices, also of one number."""
    small, size = request.param
    for module in (exponential, model_functions):
        monkeypatch.setattr(module, "SMALL", small)
    for module in (array_slices, attention):
        monkeypatch.setattr(module, "SLICE_SIZE", size)
    return size


@pytest.mark.parametrize("function", [exp, lambda x: exp2(x * math.log2(math.e))])
def test_the_exponential_is_exact_to_its_last_digits(function):
    x = np.linspace(-80, 3, 1_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(np.array(function(mx.array(x))) / exact - 1).max() < 1e-5
    assert np.abs(np.array(function(mx.array(x[-40:]))) / exact[-40:] - 1).max() < 5e-7


def test_the_exponential_of_zero_infinity_and_nan():
    x = mx.array([0.0, -0.0, -math.inf, -1e30, math.inf, 1e30, 100.0])
    assert exp(x).tolist() == [1, 1, 0, 0, math.inf, math.inf, math.inf]
    assert math.isnan(exp(mx.array(math.nan)).item())
    powers = exp2(mx.array([-3.0, 0.0, 10.0, 126.0])).tolist()
    assert powers == pytest.approx([0.125, 1, 1024, 2.0**126], rel=1e-5)


def test_swiglu_is_that_of_mlx_lm():
    keys = mx.random.split(mx.random.key(0), 3)
    gate, x, weight = (mx.random.normal((7, 33), key=key) for key in keys)
    assert mx.abs(swiglu(gate, x) - activations.swiglu(gate, x)).max() < 1e-6
    for got, expected in zip(
        gradients(swiglu, weight, gate, x),
        gradients(activations.swiglu, weight, gate, x),
        strict=True,
    ):
        assert mx.abs(got - expected).max() < 2e-6


def test_swiglu_at_the_far_ends():
    gate, x = mx.array([-1e4, -100.0, 100.0, 1e4]), mx.full((4,), 2.0)
    assert swiglu(gate, x).tolist() == pytest.approx([0, 0, 200, 2e4], abs=1e-30)
    of_gate, of_x = gradients(swiglu, mx.ones(4), gate, x)
    assert of_gate.tolist() == pytest.approx([0, 0, 2, 2], abs=1e-30)
    assert of_x.tolist() == pytest.approx([0, 0, 100, 1e4], abs=1e-30)
    assert math.isnan(swiglu(mx.array([math.nan]), mx.ones(1)).item())


def gradients(function, weight, *inputs):
    """Return the gradients of a weighted sum of the function's results."""

    def total(*inputs):
        return (function(*inputs) * weight).sum()

    return mx.grad(total, argnums=tuple(range(len(inputs))))(*inputs)


def random_mask(*shape: int) -> mx.array:
    return mx.random.uniform(shape=shape, key=mx.random.key(9)) > 0.4


MASKS = {
    "none": None,
    "causal": "causal",
    "of positions": random_mask(5, 9),
    "of rows": random_mask(3, 1, 5, 9),
    "of rows, one for all positions": random_mask(3, 1, 1, 9),
    "of heads": random_mask(1, 4, 5, 9),
    "of rows and heads": random_mask(3, 4, 5, 9),
    "a row that sees nothing": mx.zeros((3, 1, 5, 9), dtype=mx.bool_).at[0].add(True),
    "added": mx.random.normal((3, 4, 5, 9), key=mx.random.key(8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 5])
def test_attention_is_that_of_mlx_lm(mask, key_heads, time):
    if isinstance(mask, mx.array):
        mask = mask[..., -time:, :]
    shapes = (3, 4, time, 16), (3, key_heads, 9, 16), (3, key_heads, 9, 8), (3, 4, time, 8)
    keys = mx.random.split(mx.random.key(1), 4)
    *inputs, weight = (
        mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True)
    )

    def ours(queries, keys, values):
        return scaled_dot_product_attention(queries, keys, values, None, 0.25, mask)

    def theirs(queries, keys, values):
        return base.scaled_dot_product_attention(queries, keys, values, None, 0.25, mask)

    assert mx.abs(ours(*inputs) - theirs(*inputs)).max() < 1e-6
    for got, expected in zip(
        gradients(ours, weight, *inputs), gradients(theirs, weight, *inputs), strict=True
    ):
        assert mx.abs(got - expected).max() < 5e-6


def test_a_hidden_score_counts_for_nothing_however_large_it_is():
    queries, values = mx.ones((1, 1, 1, 4)), mx.array([[[[1.0], [2.0], [4.0]]]])
    keys = mx.array([0.0, 0.0, 1e6])[None, None, :, None] * mx.ones((1, 1, 1, 4))
    mask = mx.array([[[[True, True, False]]]])
    seen = scaled_dot_product_attention(queries, keys, values, None, 1.0, mask)
    assert seen.item() == pytest.approx(1.5)


def test_half_precision_is_left_to_mlx():
    inputs = [mx.random.normal((1, 2, 3, 16), key=mx.random.key(k)) for k in range(3)]
    queries, keys, values = (x.astype(mx.bfloat16) for x in inputs)
    got = scaled_dot_product_attention(queries, keys, values, None, 0.25, "causal")
    expected = base.scaled_dot_product_attention(queries, keys, values, None, 0.25, "causal")
    assert got.dtype == mx.bfloat16 and mx.array_equal(got, expected)
    assert mx.array_equal(swiglu(queries, keys), activations.swiglu(queries, keys))


@pytest.mark.slow
@cpu
@pytest.mark.parametrize("make", [qwen3_model, biased_model, expert_model])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_a_model_has_the_same_logits_and_gradients(make, again):
    model, plain = make(), make()
    use_fast_functions(model)

    def loss_of(model):
        def loss(weights):
            model.update(weights)
            return (model(TOKENS) ** 2).mean()

        if not again:
            return mx.value_and_grad(loss)(model.trainable_parameters())
        with recompute_activations(model):
            return mx.value_and_grad(loss)(model.trainable_parameters())

    (got, slopes), (expected, plain_slopes) = loss_of(model), loss_of(plain)
    assert mx.abs(got - expected) < 1e-5 * expected
    for (name, x), (_, y) in zip(tree_flatten(slopes), tree_flatten(plain_slopes), strict=True):
        assert mx.abs(x - y).max() < 1e-5 * mx.abs(y).max() + 1e-7, name


@pytest.mark.slow
@cpu
def test_only_this_model_calls_them(monkeypatch):
    model, plain = qwen3_model(), qwen3_model()
    use_fast_functions(model)
    classes = [type(module) for module in model.modules()]
    use_fast_functions(model)
    assert [type(module) for module in model.modules()] == classes
    attention, feed_forward = model.layers[0].self_attn, model.layers[0].mlp
    assert isinstance(attention, qwen3.Attention) and type(attention) is not qwen3.Attention
    assert type(attention).__name__ == "Attention"
    assert type(attention).__call__.__globals__["scaled_dot_product_attention"] is (
        scaled_dot_product_attention
    )
    assert type(feed_forward).__call__.__globals__["swiglu"] is swiglu
    assert type(model) is qwen3.Model
    assert [type(module) for module in plain.modules()] == [
        type(module) for module in qwen3_model().modules()
    ]
    # mlx-lm's own names stay as they were.
    monkeypatch.setattr(qwen3, "swiglu", None)
    monkeypatch.setattr(qwen3, "scaled_dot_product_attention", None)
    mx.eval(model(TOKENS))
    with pytest.raises(TypeError, match="not callable"):
        plain(TOKENS)


@pytest.mark.slow
@cpu
def test_a_model_with_a_quantized_cache_still_answers():
    model, plain = qwen3_model(), qwen3_model()
    use_fast_functions(model)

    def logits(model):
        cache = [QuantizedKVCache(group_size=32) for _ in make_prompt_cache(model)]
        return model(TOKENS, cache=cache)

    assert mx.abs(logits(model) - logits(plain)).max() < 1e-5
