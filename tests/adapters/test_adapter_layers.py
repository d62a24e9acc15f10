"""Adapter layers: LoRA and DoRA beside linear, embedding and expert layers of any number format."""

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner import dora as mlx_lm_dora
from mlx_lm.tuner import lora as mlx_lm_lora

from tests.bases import BASES, arrays, bits, packed, trained
from tests.memory import peak_of
from tests.tiny import TOKENS, biased_model, expert_model, qwen3_model
from textpolicy.adapters import AdapterConfig, AdapterContainer, LoRARule, quantize
from textpolicy.adapters.layers.dora import DoRAEmbedding, DoRALinear
from textpolicy.adapters.layers.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from textpolicy.adapters.quantization.stored_weights import float_weight
from textpolicy.errors import AdapterError

KINDS = ["lora", "dora"]
EVERYWHERE = r".*(proj|embed_tokens|lm_head)"
KEY = mx.random.key(7)


def adapt(make, kind="lora", module_path=".*", **words):
    model = make()
    rule = LoRARule(module_path=module_path, kind=kind, rank=4, **words)
    return model, AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))


def difference(one, other):
    return float(mx.abs(one.astype(mx.float32) - other.astype(mx.float32)).max())


def trained_layer(made, base, **words):
    """A layer whose tensors are far from where they began."""
    layer = made(base, LoRARule(rank=4, scale=1.5, **words), KEY)
    for name, key in zip(layer.trainable, mx.random.split(KEY, 4), strict=False):
        layer[name] = layer[name] + 0.3 * mx.random.normal(layer[name].shape, key=key)
    return layer


def tied_in_4_bits():
    return packed(4, tied=True)()


# Fresh is the base; trained is the merged weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [*BASES.values(), tied_in_4_bits], ids=[*BASES, "tied 4-bit"])
def test_a_fresh_adapter_on_every_layer_is_the_base_bit_for_bit(make, kind):
    model = make()
    before = model(TOKENS)
    rule = LoRARule(module_path=EVERYWHERE, kind=kind, rank=4)
    container = AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
    assert len(container.layers()) == (16 if "lm_head" in model else 15)
    assert {layer.kind for layer in container.layers().values()} == {kind}
    assert {array.dtype for array in container.parameters().values()} == {mx.float32}
    after = model(TOKENS)
    assert after.dtype == before.dtype
    assert mx.array_equal(bits(before), bits(after))
    container.swap(trained(container))
    assert difference(model(TOKENS), before) > 0.01
    with container.disabled():
        assert mx.array_equal(bits(model(TOKENS)), bits(before))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weight_computes_what_the_layer_does(base, kind):
    _model, container = adapt(BASES[base], kind, EVERYWHERE)
    container.swap(trained(container))
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        layer = container.layers()[path]
        x = mx.random.normal((2, 5, layer.lora_a.shape[0]))
        expected = x @ layer.merged_weight().T
        assert difference(layer(x), expected) < 1e-5 * float(mx.abs(expected).max())
        assert difference(layer.delta(), layer.merged_weight() - float_weight(layer.base)) < 1e-6
    table = container.layers()["model.embed_tokens"]
    # mlx looks bfloat16 and nvfp4 tables up in bfloat16.
    tolerance = 4e-3 if base in ("bfloat16", "nvfp4") else 1e-6
    assert difference(table(mx.arange(96)), table.merged_weight()) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_of_a_base_is_no_part_of_its_weight(kind):
    model, container = adapt(biased_model, kind, ".*q_proj")
    container.swap(trained(container))
    layer = model.layers[0].self_attn.q_proj
    x = mx.random.normal((3, 64))
    assert difference(layer(x), x @ layer.merged_weight().T + layer.base.bias) < 1e-5
    assert layer.merged_bias() is layer.base.bias


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_is_adapted_with_its_embedding(kind):
    model, container = adapt(tied_in_4_bits, kind, ".*embed_tokens")
    container.swap(trained(container))
    table = model.model.embed_tokens
    assert isinstance(table, DoRAEmbedding if kind == "dora" else LoRAEmbedding)
    x = mx.random.normal((2, 64))
    assert difference(table.as_linear(x), x @ table.merged_weight().T) < 1e-5
    assert difference(table(TOKENS), table.merged_weight()[TOKENS]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [qwen3_model, biased_model])
def test_an_offset_is_trained_where_a_rule_asks_for_it(make, kind):
    model, container = adapt(make, kind, ".*q_proj", bias=True)
    layer = model.layers[0].self_attn.q_proj
    assert layer.trainable[-1] == "lora_bias"
    x = mx.random.normal((3, 64))
    assert mx.array_equal(layer(x), layer.base(x))
    container.swap(trained(container))
    assert difference(layer(x), x @ layer.merged_weight().T + layer.merged_bias()) < 1e-5
    with container.disabled():
        assert mx.array_equal(layer(x), layer.base(x))


def test_an_offset_is_refused_where_there_is_no_bias():
    with pytest.raises(AdapterError, match="bias=True for a layer of kind 'embedding'"):
        adapt(qwen3_model, "lora", ".*embed_tokens", bias=True)
    with pytest.raises(AdapterError, match="bias=True for a layer of kind 'experts'"):
        adapt(expert_model, "lora", ".*switch_mlp.*", bias=True)


# Against mlx-lm's own layers


def test_lora_is_mlx_lms():
    linear = nn.Linear(32, 48)
    ours = trained_layer(LoRALinear, linear)
    theirs = mlx_lm_lora.LoRALinear.from_base(linear, r=4, scale=1.5)
    theirs.update({"lora_a": ours.lora_a, "lora_b": ours.lora_b})
    x = mx.random.normal((5, 32))
    assert difference(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_dora_is_mlx_lms(bias):
    linear = nn.Linear(32, 48, bias=bias)
    ours = trained_layer(DoRALinear, linear)
    theirs = mlx_lm_dora.DoRALinear.from_base(linear, r=4, scale=1.5)
    assert difference(theirs.m, DoRALinear(linear, LoRARule(), KEY).m) < 1e-6
    theirs.update({name: ours[name] for name in ("lora_a", "lora_b", "m")})
    x = mx.random.normal((5, 32))
    assert difference(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("made", [LoRAEmbedding, DoRAEmbedding])
def test_embeddings_are_mlx_lms(made):
    table = nn.Embedding(24, 16)
    ours = trained_layer(made, table)
    home = mlx_lm_dora.DoRAEmbedding if made is DoRAEmbedding else mlx_lm_lora.LoRAEmbedding
    theirs = home.from_base(table, r=4, scale=1.5)
    theirs.update({name: ours[name] for name in ours.trainable})
    ids, x = mx.arange(24), mx.random.normal((5, 16))
    assert difference(ours(ids), theirs(ids)) < 1e-5
    assert difference(ours.as_linear(x), theirs.as_linear(x)) < 1e-5


@pytest.mark.parametrize("choices", [1, 40])
def test_experts_are_mlx_lms(choices):
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.tuner.lora import LoRASwitchLinear as Theirs

    experts = SwitchLinear(16, 24, 3)
    ours = trained_layer(LoRASwitchLinear, experts)
    theirs = Theirs.from_base(experts, r=4, scale=1.5)
    theirs.update({"lora_a": ours.lora_a, "lora_b": ours.lora_b})
    x = mx.random.normal((choices, 1, 1, 16))
    indices = mx.random.randint(0, 3, (choices, 2))
    assert difference(ours(x, indices), theirs(x, indices)) < 1e-5


# Experts


@pytest.mark.parametrize("mode", [None, "affine", "nvfp4"])
@pytest.mark.parametrize("length", [6, 48])
def test_adapted_experts_compute_what_their_merged_weights_do(mode, length):
    def make():
        model = expert_model()
        if mode:
            quantize(model, mode=mode)
        return model

    tokens = mx.random.randint(0, 96, (1, length))
    model, container = adapt(make)
    base = make()(tokens)
    # From 64 chosen experts on mlx-lm sorts them: another path through the same layer.
    assert mx.array_equal(model(tokens), base)
    assert {path.split(".")[-2] for path in container.layers()} == {"self_attn", "switch_mlp"}
    container.swap(trained(container))
    adapted = model(tokens)
    assert difference(adapted, base) > 0.01
    container.fuse(dtype=mx.float32)
    assert difference(model(tokens), adapted) < 1e-4


@pytest.mark.parametrize(("rank", "read"), [(1, 4), (2, 4), (4, 4), (6, 8)])
def test_on_cuda_the_rank_of_experts_is_filled_up_to_16_bytes(rank, read, monkeypatch):
    """On CUDA, mlx reads other rows at wrong addresses, and the process can compute no more."""
    from mlx_lm.models.switch_layers import SwitchLinear

    layer = LoRASwitchLinear(SwitchLinear(32, 16, 3), LoRARule(rank=rank, scale=2.0), KEY)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    x, chosen = mx.random.normal((5, 1, 1, 32)), mx.random.randint(0, 3, (5, 2))
    result = nn.value_and_grad(layer, lambda x: mx.square(layer(x, chosen)).sum())
    expected, expected_gradients = result(x)
    read_together: list[int] = []
    multiply = mx.gather_mm

    def recording(a, b, **options):
        read_together.append(min(*a.shape[-1:], *b.shape[-2:]))
        return multiply(a, b, **options)

    monkeypatch.setattr(mx, "gather_mm", recording)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    value, gradients = result(x)
    assert min(read_together) == read
    assert mx.allclose(value, expected, rtol=1e-5)
    for name, gradient in tree_flatten(gradients):
        other = dict(tree_flatten(expected_gradients))[name]
        assert gradient.shape == other.shape
        # A sum that is nearly zero has the rounding of its largest terms.
        assert mx.abs(gradient - other).max() < 1e-5 * mx.abs(other).max(), name


def test_experts_and_not_their_routers_get_gradients():
    model, container = adapt(expert_model)
    gradient = nn.value_and_grad(model, lambda x: nn.losses.cross_entropy(model(x), x).mean())
    _, grads = gradient(TOKENS)
    names = arrays_of(grads)
    assert names.keys() == container.parameters().keys()
    assert any("switch_mlp" in name for name in names)
    assert not any("mlp.gate." in name for name in names)
    assert float(mx.abs(names["model.layers.0.mlp.switch_mlp.up_proj.lora_b"]).max()) > 0


def arrays_of(tree):
    from mlx.utils import tree_flatten

    return dict(tree_flatten(tree))


def test_a_router_is_adapted_where_it_is_named():
    _model, container = adapt(expert_model, "lora", r".*mlp\.gate")
    assert set(container.layers()) == {f"model.layers.{i}.mlp.gate" for i in range(2)}


def test_dora_on_experts_is_refused_with_the_way_out():
    with pytest.raises(AdapterError, match=r"expert layers take LoRA only.*rule of kind 'lora'"):
        adapt(expert_model, "dora")


# DoRA's norm


@pytest.mark.parametrize("base", BASES)
def test_the_norm_from_the_factors_is_the_norm_of_the_sum(base):
    def make():
        model = BASES[base]()
        # Scales of a bfloat16 model are bfloat16 too.
        if base == "3-bit":
            model.set_dtype(mx.bfloat16)
        return model

    _model, container = adapt(make, "dora", EVERYWHERE)
    container.swap(trained(container, size=0.3))
    for path in ("model.layers.0.self_attn.q_proj", "model.embed_tokens"):
        layer = container.layers()[path]
        a, b, m = (np.array(layer[name], dtype=np.float64) for name in ("lora_a", "lora_b", "m"))
        product = layer.scale * a @ b
        product = product if path.endswith("embed_tokens") else product.T
        weight = np.array(float_weight(layer.base), dtype=np.float64) + product
        expected = m / np.linalg.norm(weight, axis=1)
        np.testing.assert_allclose(np.array(layer.ratio()), expected, rtol=2e-6)


@pytest.mark.parametrize(("form", "share"), [("affine", 0.05), ("bfloat16", 1.1)])
def test_the_norm_makes_no_matrix_of_the_sum(form, share):
    base = nn.Linear(2048, 2048, bias=False)
    base.set_dtype(mx.bfloat16)
    if form != "bfloat16":
        quantize(model := nn.Sequential(base), mode=form)
        base = model.layers[0]
    layer = DoRALinear(base, LoRARule(rank=4), KEY)
    mx.eval(layer.parameters(), layer.ratio())
    assert peak_of(lambda: mx.eval(layer.ratio())) < share * 2048 * 2048 * 4


@pytest.mark.parametrize("made", [nn.Linear, nn.QuantizedLinear])
def test_no_gradient_flows_through_the_norm(made):
    linear = nn.Linear(64, 48)
    base = nn.QuantizedLinear.from_linear(linear) if made is nn.QuantizedLinear else linear
    layer = trained_layer(DoRALinear, base)
    layer.freeze()
    layer.unfreeze(keys=list(layer.trainable), recurse=False)
    x, target = mx.random.normal((5, 64)), mx.random.normal((5, 48))
    weight = float_weight(base)

    def reference(factors):
        adapted = weight + 1.5 * (factors["lora_a"] @ factors["lora_b"]).T
        norm = mx.stop_gradient(mx.linalg.norm(adapted, axis=1))
        y = x @ ((factors["m"] / norm)[:, None] * adapted).T + base.bias
        return mx.square(y - target).sum()

    expected = mx.grad(reference)({name: layer[name] for name in layer.trainable})
    given = nn.value_and_grad(layer, lambda: mx.square(layer(x) - target).sum())()[1]
    assert arrays_of(given).keys() == expected.keys() == {"lora_a", "lora_b", "m"}
    for name, array in expected.items():
        assert difference(given[name], array) < 2e-5 * float(mx.abs(array).max())


def test_a_row_of_zeros_stays_finite_and_learns():
    linear = nn.Linear(8, 3, bias=False)
    linear.weight = linear.weight * mx.array([[1.0], [0.0], [1.0]])
    layer = DoRALinear(linear, LoRARule(rank=2), KEY)
    x = mx.random.normal((4, 8))
    assert mx.array_equal(layer(x), linear(x))
    gradient = mx.grad(lambda b: layer.update({"lora_b": b})(x).sum())(layer.lora_b)
    assert mx.all(mx.isfinite(gradient))
    assert mx.all(mx.isfinite(layer.merged_weight()))


def test_a_base_that_is_quantized_under_dora_is_noticed():
    model, _ = adapt(qwen3_model, "dora", ".*q_proj")
    nn.quantize(model)
    with pytest.raises(
        AdapterError,
        match=r"of a Linear, but the base is a QuantizedLinear now.*Quantize the model first",
    ):
        model(TOKENS)


# Scale, gate and rank under compile


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["float32", "4-bit", "nf4"])
def test_a_compiled_function_sees_weights_scale_gate_and_rank_change(base, kind):
    model, container = adapt(BASES[base], kind, EVERYWHERE)
    compiled = mx.compile(model, inputs=[model.state])
    fresh = compiled(TOKENS)
    container.swap(trained(container))
    swapped = compiled(TOKENS)
    assert difference(swapped, fresh) > 0.01
    assert difference(swapped, model(TOKENS)) < 1e-4
    with container.disabled():
        assert difference(compiled(TOKENS), fresh) < 1e-4
    for layer in container.layers().values():
        layer.set_scale(-0.5)
    assert difference(compiled(TOKENS), swapped) > 0.01
    assert difference(compiled(TOKENS), model(TOKENS)) < 1e-4
    before = compiled(TOKENS)
    for layer in container.layers().values():
        layer.lora_a = mx.concatenate([layer.lora_a, layer.lora_a[:, :2]], axis=1)
        layer.lora_b = mx.concatenate([layer.lora_b, layer.lora_b[:2]], axis=0)
        assert layer.rank == 6
    assert difference(compiled(TOKENS), before) > 0.01
    assert difference(compiled(TOKENS), model(TOKENS)) < 1e-4


# Fresh weights


@pytest.mark.parametrize(
    ("name", "spread"),
    [
        ("uniform", 1 / math.sqrt(64) / math.sqrt(3)),
        ("he_uniform", math.sqrt(6 / 64) / math.sqrt(3)),
        ("gaussian", 1 / 32),
        ("zeros", 0.0),
    ],
)
def test_an_initialiser_draws_with_its_spread(name, spread):
    layer = LoRALinear(nn.Linear(64, 64), LoRARule(rank=32, a_init=name), KEY)
    assert float(layer.lora_a.std()) == pytest.approx(spread, rel=0.05)
    assert not mx.any(layer.lora_b)


def test_an_initialiser_may_be_a_function_of_shape_and_key():
    def draw(shape, key):
        return mx.random.normal(shape, dtype=mx.bfloat16, key=key)

    layer = LoRALinear(nn.Linear(8, 4), LoRARule(rank=2, a_init=draw, b_init=draw), KEY)
    assert layer.lora_a.dtype == layer.lora_b.dtype == mx.float32
    assert mx.any(layer.lora_b)
    with pytest.raises(AdapterError, match=r"array of shape \(3,\); expected \(8, 2\)"):
        LoRALinear(nn.Linear(8, 4), LoRARule(rank=2, a_init=lambda *_: mx.zeros(3)), KEY)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only_and_on_the_update_only(kind):
    model, container = adapt(qwen3_model, kind, EVERYWHERE, dropout=0.5)
    base = model(TOKENS)
    model.train()
    assert mx.array_equal(model(TOKENS), base)
    container.swap(trained(container))
    assert not mx.array_equal(model(TOKENS), model(TOKENS))
    model.eval()
    assert mx.array_equal(model(TOKENS), model(TOKENS))


# Small steps


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_200_steps_of_a_millionth_move_adapters_as_far_as_in_float64(dtype):
    rate, steps, scale = 1e-6, 200, 2.0
    linear = nn.Linear(32, 24, bias=False)
    linear.set_dtype(dtype)
    layer = LoRALinear(linear, LoRARule(rank=4, scale=scale), KEY)
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    x, target = mx.random.normal((64, 32)), mx.random.normal((64, 24))
    start = {name: np.array(layer[name], dtype=np.float64) for name in layer.trainable}
    weight = np.array(float_weight(linear), dtype=np.float64)
    expected = adam_in_float64(start, weight, np.array(x), np.array(target), scale, rate, steps)

    optimizer = optim.Adam(learning_rate=rate, bias_correction=True)
    step = nn.value_and_grad(layer, lambda: mx.square(layer(x) - target).mean())
    for _ in range(steps):
        optimizer.update(layer, step()[1])
        mx.eval(layer.parameters(), optimizer.state)
    for name, before in start.items():
        moved = np.array(layer[name], dtype=np.float64) - before
        wanted = expected[name] - before
        assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm(wanted), rel=0.01)
        assert np.linalg.norm(moved - wanted) < 0.02 * np.linalg.norm(wanted)


def adam_in_float64(start, weight, x, target, scale, rate, steps):
    """Adam on mean((x W' + scale x A B - target)^2), its gradient by hand."""
    a, b = start["lora_a"], start["lora_b"]
    first = {"a": np.zeros_like(a), "b": np.zeros_like(b)}
    second = {"a": np.zeros_like(a), "b": np.zeros_like(b)}
    for step in range(1, steps + 1):
        error = 2 * (x @ weight.T + scale * x @ a @ b - target) / target.size
        gradient = {"a": scale * x.T @ error @ b.T, "b": scale * (x @ a).T @ error}
        moves = {}
        for name, g in gradient.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            corrected = second[name] / (1 - 0.999**step)
            moves[name] = first[name] / (1 - 0.9**step) / (np.sqrt(corrected) + 1e-8)
        a, b = a - rate * moves["a"], b - rate * moves["b"]
    return {"lora_a": a, "lora_b": b}


def test_bases_are_untouched_by_their_adapters():
    model = qwen3_model()
    before = arrays(model)
    container = AdapterContainer.from_model(
        model, AdapterConfig(rules=[LoRARule(module_path=EVERYWHERE, kind="dora")])
    )
    container.swap(trained(container))
    mx.eval(model(TOKENS))
    after = arrays(container.unload())
    assert after.keys() == before.keys()
    assert all(after[name] is array for name, array in before.items())


@pytest.mark.parametrize("make", [qwen3_model, expert_model])
def test_the_size_of_the_product_is_known_without_making_it(make):
    _model, container = adapt(make)
    container.swap(trained(container))
    for layer in container.layers().values():
        expected = float(mx.square(layer.delta()).sum())
        assert float(layer.product_square()) == pytest.approx(expected, rel=1e-4)
