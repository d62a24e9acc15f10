"""The page "Applying LoRA/QLoRA" of Qwix from top to bottom, with modules for its parameters.

`LoraRule` is `LoRARule`, `apply_lora_to_model(model, LoraProvider(rules))` is
`AdapterContainer.from_model(model, AdapterConfig(rules=rules))`.
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from tests.bases import arrays
from textpolicy.adapters import AdapterConfig, AdapterContainer, LoRARule, NF4Linear
from textpolicy.adapters.layers.lora import LoRALinear
from textpolicy.adapters.quantization.stored_weights import float_weight, format_of, is_quantized
from textpolicy.errors import AdapterError, ModelError
from textpolicy.planning import plan_adapters

PROMPT = mx.array([[5, 17, 3, 44, 60, 2]])


class Dense(nn.Module):
    """The page's own model: two layers, 16 -> 64 -> 16."""

    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(16, 64, bias=False)
        self.linear2 = nn.Linear(64, 16, bias=False)

    def __call__(self, x):
        return self.linear2(nn.relu(self.linear1(x)))


def page_rules(**words):
    return AdapterConfig(rules=[LoRARule(weight_qtype="nf4", rank=16, alpha=0.5, **words)])


@pytest.fixture
def model(load_tiny):
    return load_tiny()[0]


@pytest.mark.parametrize(
    "words", [{}, {"tile_size": "channel"}], ids=["the page's rule", "channel"]
)
def test_the_parameters_of_the_page(words):
    model = Dense()
    weights = {name: getattr(model, name).weight for name in ("linear1", "linear2")}
    # The page's scales are one an output, over the whole row. Rows of 16 do not divide into tiles
    # of 64, so the row is the tile.
    AdapterContainer.from_model(model, page_rules(**words))
    shapes = {name: tuple(array.shape) for name, array in arrays(model).items()}
    assert shapes == {
        # Qwix's kernels are inputs x outputs and its codes one each; here they share bytes.
        "linear1.base.weight": (64, 8),
        "linear1.base.scales": (64, 1),
        "linear1.lora_a": (16, 16),
        "linear1.lora_b": (16, 64),
        "linear2.base.weight": (16, 32),
        "linear2.base.scales": (16, 1),
        "linear2.lora_a": (64, 16),
        "linear2.lora_b": (16, 16),
    }
    for name, weight in weights.items():
        layer = getattr(model, name)
        assert type(layer) is LoRALinear and type(layer.base) is NF4Linear
        assert layer.base.weight.dtype == mx.uint8 and layer.base.scales.dtype == mx.float32
        assert layer.lora_a.dtype == layer.lora_b.dtype == mx.float32
        # nf4 codes stand for multiples of the largest magnitude of their row.
        assert mx.allclose(layer.base.scales[:, 0], mx.abs(weight).max(axis=1))
        error = mx.linalg.norm(float_weight(layer.base) - weight) / mx.linalg.norm(weight)
        assert 0.02 < float(error) < 0.15


def test_the_tile_is_qloras_block_where_it_fits_and_a_tile_that_was_asked_for_must_fit():
    # Qwix without a tile_size has one scale a row, which is far from QLoRA on real weights.
    model = Dense()
    model.linear1, model.linear2, model.linear3 = (nn.Linear(n, 8) for n in (192, 96, 48))
    planned = plan_adapters(model, page_rules())
    assert [row.quantization for row in planned.modules] == [
        "nf4 / 64",
        "nf4 / 32",
        "nf4 / channel",
    ]
    with pytest.raises(ModelError, match="linear1: rows of 16 do not divide into groups of 32"):
        AdapterContainer.from_model(Dense(), page_rules(tile_size=32))
    # mlx has no tiles below 32 for whole numbers.
    with pytest.raises(ModelError, match="linear1: rows of 16 do not divide into groups of 64"):
        AdapterContainer.from_model(
            Dense(), AdapterConfig(rules=[LoRARule(weight_qtype="int4", rank=4)])
        )


def test_a_model_in_tiles_of_several_sizes_is_saved_and_loaded(tmp_path):
    def start():
        mx.random.seed(3)
        return Dense()

    model = start()
    AdapterContainer.from_model(model, page_rules()).publish(tmp_path / "a.safetensors")
    again = start()
    AdapterContainer.from_directory(tmp_path / "a.safetensors").load(again)
    x = mx.random.normal((3, 16))
    assert mx.array_equal(again(x), model(x))


def test_the_page_on_the_embedded_model(model):
    AdapterContainer.from_model(model, page_rules())
    layer = model.layers[0].mlp.up_proj
    assert type(layer.base) is NF4Linear
    assert layer.base.scales.shape == (256, 192 // 64)
    assert layer.base.weight.nbytes * 2 == 256 * 192
    assert layer.scale == pytest.approx(0.5 / 16)
    # A rule is about linear layers of the blocks unless it names others.
    assert not is_quantized(model.model.embed_tokens)


def test_fresh_qlora_is_the_quantized_model(model, load_tiny):
    other, _ = load_tiny()
    only = AdapterConfig(rules=[LoRARule(kind="none", weight_qtype="nf4")])
    # A rule without an adapter: the model is quantized, and there is nothing to train.
    from textpolicy.adapters.base_quantization import quantize_by_rules

    assert len(quantize_by_rules(other, only)) == 7 * len(other.layers)
    AdapterContainer.from_model(model, page_rules())
    assert mx.array_equal(model(PROMPT), other(PROMPT))


def test_it_trains_in_4_bits(model):
    container = AdapterContainer.from_model(model, page_rules())
    base = {name: a for name, a in arrays(model).items() if name not in container.parameters()}
    optimizer = optim.Adam(learning_rate=1e-3)

    def loss(x):
        return nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:], reduction="mean")

    losses = []
    for _ in range(10):
        value, gradient = nn.value_and_grad(model, loss)(PROMPT)
        names = tree_flatten(gradient, destination={}).keys()
        assert names == container.parameters().keys()
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert all(arrays(model)[name] is array for name, array in base.items())


@pytest.mark.parametrize(
    "qtype", ["int2", "int3", "int4", "int5", "int6", "int8", "mxfp4", "mxfp8", "nvfp4", "nf4"]
)
def test_every_weight_type_keeps_its_name(model, qtype):
    config = AdapterConfig(rules=[LoRARule(weight_qtype=qtype, rank=4, alpha=4)])
    before = model(PROMPT)
    container = AdapterContainer.from_model(model, config)
    kept = {format_of(layer.base).name for layer in container.layers().values()}
    assert kept == {qtype}
    difference = float(mx.abs(model(PROMPT) - before).mean())
    assert 0 < difference < (0.05 if qtype in ("int8", "mxfp8") else 10)


def test_the_first_rule_that_matches_wins_and_paths_may_have_slashes(model):
    config = AdapterConfig(
        rules=[
            LoRARule(module_path="model/layers/0/.*", rank=2, alpha=1),
            LoRARule(module_path=".*self_attn.*", rank=4, alpha=1, weight_qtype="nf4"),
            LoRARule(module_path=".*mlp.*", kind="none", weight_qtype="int4"),
        ]
    )
    container = AdapterContainer.from_model(model, config)
    ranks = {path: layer.rank for path, layer in container.layers().items()}
    deep = [path for path in ranks if not path.startswith("model.layers.0.")]
    assert {ranks[path] for path in ranks.keys() - set(deep)} == {2}
    assert {ranks[path] for path in deep} == {4} and all("self_attn" in path for path in deep)
    assert not is_quantized(model.layers[0].self_attn.q_proj.base)
    assert format_of(model.layers[1].mlp.up_proj).name == "int4"


def test_unused_rules_are_errors_without_being_asked_for(model):
    rules = [LoRARule(module_path=".*q_proj"), LoRARule(module_path="Dense_0/kernel")]
    with pytest.raises(AdapterError, match=r"rule 1 .'Dense_0/kernel'. matches nothing; nearest"):
        AdapterContainer.from_model(model, AdapterConfig(rules=rules))


def test_initialisers_are_the_users(model):
    def ones(shape, key):
        return mx.ones(shape)

    rule = LoRARule(module_path=".*q_proj", rank=2, a_init=ones, b_init="gaussian")
    container = AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
    layer = next(iter(container.layers().values()))
    assert mx.all(layer.lora_a == 1) and mx.any(layer.lora_b)
    he = LoRARule(module_path=".*q_proj", rank=2, a_init="he_uniform")
    container.unload()
    container = AdapterContainer.from_model(model, AdapterConfig(rules=[he]))
    bound = (6 / 192) ** 0.5
    assert 0.9 * bound < float(mx.abs(next(iter(container.layers().values())).lora_a).max()) < bound


def test_dropout_acts_in_training_only(model):
    # Qwix drops in inference too.
    rule = LoRARule(rank=4, alpha=4, dropout=0.5, b_init="gaussian")
    AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
    model.eval()
    assert mx.array_equal(model(PROMPT), model(PROMPT))
    model.train()
    assert not mx.array_equal(model(PROMPT), model(PROMPT))


def test_shapes_are_known_before_anything_is_done(model):
    before = arrays(model)
    planned = plan_adapters(model, page_rules())
    row = next(row for row in planned.modules if row.path == "model.layers.0.mlp.up_proj")
    assert (row.kind, row.rank, row.quantization) == ("lora", 16, "nf4 / 64")
    # 4 bits a weight, a float32 for 64 of them; rank 16 on both sides.
    assert row.bytes == 256 * 192 // 2 + 256 * 192 // 64 * 4
    assert row.adapter_bytes == 4 * 16 * (256 + 192)
    assert all(array is before[name] for name, array in arrays(model).items())
