"""What to adapt: rules, the last blocks and their keys, the words of PEFT; and their JSON forms."""

import math

import mlx.nn as nn
import pytest

from tests.bases import arrays
from tests.tiny import expert_model, qwen3_model
from textpolicy.adapters import AdapterConfig, AdapterContainer, LoRARule
from textpolicy.adapters.layers import adapter_layers
from textpolicy.adapters.quantization import is_quantized
from textpolicy.errors import AdapterError, ConfigError, ModelError

CONFIG = AdapterConfig(rank=4, scale=2.0)


def adapted_paths(config, make=qwen3_model):
    model = make()
    return set(AdapterContainer.from_model(model, config).layers())


def rules(*given):
    return AdapterConfig(rules=[LoRARule(**rule) for rule in given])


# The last blocks and their keys


@pytest.mark.parametrize(("num_layers", "first"), [(-1, 0), (3, 0), (2, 1), (1, 2)])
def test_num_layers_counts_from_the_last_block(num_layers, first):
    model = qwen3_model(layers=3)
    AdapterContainer.from_model(model, AdapterConfig(num_layers=num_layers))
    blocks = {path.split(".")[2] for path in adapter_layers(model)}
    assert blocks == {str(block) for block in range(first, 3)}


def test_more_layers_than_the_model_has_is_an_error():
    with pytest.raises(AdapterError, match="num_layers is 3, the model has 2 blocks"):
        AdapterContainer.from_model(qwen3_model(), AdapterConfig(num_layers=3))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_layers", 0),
        ("num_layers", -2),
        ("rank", 0),
        ("scale", 0.0),
        ("scale", math.nan),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("keys", []),
        ("keys", "self_attn.q_proj"),
    ],
)
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=option):
        AdapterConfig(**{option: value})


def test_keys_are_exact_paths_inside_a_block_or_in_the_model():
    model = qwen3_model()
    keys = ["self_attn.q_proj", "lm_head", "model.layers.0.mlp.up_proj"]
    AdapterContainer.from_model(model, AdapterConfig(num_layers=1, keys=keys))
    assert set(adapter_layers(model)) == {
        "model.layers.1.self_attn.q_proj",
        "lm_head",
        "model.layers.0.mlp.up_proj",
    }


@pytest.mark.parametrize(
    ("key", "near"), [("q_proj", "self_attn.q_proj"), ("self_attn.qproj", "self_attn.q_proj")]
)
def test_a_key_that_matches_nothing_names_the_nearest(key, near):
    model = qwen3_model()
    with pytest.raises(AdapterError, match=f"'{key}' matches nothing; nearest: .'{near}'"):
        AdapterContainer.from_model(model, AdapterConfig(keys=[key]))
    assert AdapterContainer.of(model) is None


def test_adapting_twice_names_the_ways_out():
    model = qwen3_model()
    AdapterContainer.from_model(model, CONFIG)
    with pytest.raises(AdapterError, match=r"already has adapters.*unload\(\).*swap"):
        AdapterContainer.from_model(model, CONFIG)


def test_adapters_of_another_library_are_noticed():
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = qwen3_model()
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    with pytest.raises(AdapterError, match="already has adapters"):
        AdapterContainer.from_model(model, CONFIG)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(AdapterError, match=r"Linear has no \.layers"):
        AdapterContainer.from_model(nn.Linear(2, 2), CONFIG)


def test_keys_that_name_something_that_cannot_be_adapted_are_refused_together():
    keys = ["self_attn", "model.norm", "nonsense"]
    with pytest.raises(AdapterError) as caught:
        AdapterContainer.from_model(qwen3_model(), AdapterConfig(keys=keys))
    message = str(caught.value)
    assert "'model.layers.1.self_attn' is Attention" in message
    assert "'model.norm' is RMSNorm" in message
    assert "'nonsense' matches nothing" in message


def test_blocks_without_layers_to_adapt_are_refused():
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Sequential(nn.RMSNorm(4))]

    with pytest.raises(AdapterError, match="nothing to adapt in Norms"):
        AdapterContainer.from_model(Norms(), CONFIG)


def test_experts_are_adapted_and_routers_are_not():
    paths = adapted_paths(CONFIG, expert_model)
    inside = {path.split(".", 3)[3] for path in paths}
    assert inside == {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down")),
    }


# Rules


def test_the_first_rule_that_matches_is_the_rule():
    model = qwen3_model()
    config = rules(
        {"module_path": ".*v_proj", "kind": "none"},
        {"module_path": r"model/layers/1/self_attn/.*", "kind": "dora", "rank": 2, "scale": 3.0},
        {"module_path": ".*self_attn.*", "rank": 6, "alpha": 3},
        {"module_path": "lm_head", "rank": 5},
    )
    layers = AdapterContainer.from_model(model, config).layers()
    assert {(path, layer.kind, layer.rank, layer.scale) for path, layer in layers.items()} == {
        *((f"model.layers.0.self_attn.{n}_proj", "lora", 6, 0.5) for n in "qko"),
        *((f"model.layers.1.self_attn.{n}_proj", "dora", 2, 3.0) for n in "qko"),
        ("lm_head", "lora", 5, 2.0),
    }


def test_a_wildcard_is_every_linear_layer_of_the_blocks_and_nothing_else():
    assert adapted_paths(rules({})) == adapted_paths(AdapterConfig())
    assert adapted_paths(rules({}), expert_model) == adapted_paths(AdapterConfig(), expert_model)


def test_a_path_is_matched_whole():
    with pytest.raises(AdapterError, match=r"rule 0 \('q_proj'\) matches nothing"):
        adapted_paths(rules({"module_path": "q_proj"}))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (".*q_porj", r"matches nothing; nearest: .*self_attn\.q_proj"),
        (r"model\.embed.*", "only by a wildcard; .* write 'embed_tokens' in module_path"),
        (r"model\.norm", "matches 'model.norm', which is RMSNorm"),
    ],
)
def test_a_rule_that_chooses_nothing_says_why(path, words):
    model = qwen3_model()
    before = arrays(model)
    with pytest.raises(AdapterError, match=words):
        AdapterContainer.from_model(model, rules({"module_path": path}, {}))
    assert all(array is before[name] for name, array in arrays(model).items())


def test_a_rule_that_never_gets_its_turn_names_the_one_before():
    with pytest.raises(AdapterError, match=r"rule 1 .* never applies: rule 0 .'\.\*'. comes first"):
        adapted_paths(rules({}, {"module_path": ".*q_proj"}))


def test_rules_need_no_blocks():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear1, self.linear2 = nn.Linear(16, 64), nn.Linear(64, 16)

    assert adapted_paths(rules({}), Dense) == {"linear1", "linear2"}
    assert adapted_paths(rules({"module_path": "linear2"}), Dense) == {"linear2"}


def test_a_rule_may_quantize_only_and_another_adapt_only():
    model = qwen3_model()
    config = rules(
        {"module_path": ".*mlp.*", "kind": "none", "weight_qtype": "int3", "tile_size": 32},
        {"module_path": ".*v_proj", "rank": 2},
        {"module_path": ".*self_attn.*", "rank": 2, "weight_qtype": "nvfp4"},
    )
    container = AdapterContainer.from_model(model, config)
    modules = dict(model.named_modules())
    up = modules["model.layers.0.mlp.up_proj"]
    assert (up.bits, up.group_size, up.mode) == (3, 32, "affine")
    assert modules["model.layers.0.self_attn.q_proj"].base.mode == "nvfp4"
    assert not is_quantized(modules["model.layers.0.self_attn.v_proj"].base)
    assert not is_quantized(modules["lm_head"])
    assert len(container.layers()) == 8
    # The quantization is of the model, not of the adapters.
    container.unload()
    assert is_quantized(model.layers[0].self_attn.q_proj)


def test_a_base_that_already_is_as_a_rule_asks_is_left_alone():
    model = qwen3_model()
    config = rules({"weight_qtype": "nf4"})
    AdapterContainer.from_model(model, config).unload()
    before = arrays(model)
    AdapterContainer.from_model(model, config).unload()
    assert all(array is before[name] for name, array in arrays(model).items())
    with pytest.raises(ModelError, match="q_proj: it is quantized already"):
        AdapterContainer.from_model(model, rules({"weight_qtype": "int4"}))


def test_a_quantization_that_cannot_be_leaves_the_model_as_it_was():
    model = qwen3_model(intermediate_size=96)
    before = arrays(model)
    with pytest.raises(ModelError) as caught:
        AdapterContainer.from_model(model, rules({"weight_qtype": "nf4"}))
    for block in range(2):
        assert f"model.layers.{block}.mlp.down_proj: rows of 96 do not divide" in str(caught.value)
    assert all(array is before[name] for name, array in arrays(model).items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"module_path": "("}, "no regular expression"),
        ({"module_path": ""}, "module_path is ''"),
        ({"rank": 0}, "rank is 0"),
        ({"scale": math.inf}, "scale is inf"),
        ({"alpha": 0}, "scale is 0"),
        ({"alpha": 8, "scale": 1.0}, r"both scale .1.0. and alpha .8."),
        ({"rslora": True}, "no alpha"),
        ({"dropout": 1}, "dropout is 1"),
        ({"a_init": "pissa"}, r"a_init is 'pissa'; expected one of \['uniform'"),
        ({"b_init": "zero"}, "b_init is 'zero'"),
        ({"weight_qtype": "nf5"}, "weight_qtype is 'nf5'; expected one of .*'nf4'"),
        ({"weight_qtype": "int7"}, r"'int7' \(mlx has no kernels for it\)"),
        ({"weight_qtype": "int1"}, "larger than that of all weights set to zero"),
        ({"weight_qtype": "nvfp4", "tile_size": 64}, r"tile_size is 64; 'nvfp4' has \[16\]"),
        ({"weight_qtype": "int4", "tile_size": "channel"}, "'int4' has"),
        ({"tile_size": 64}, "without a weight_qtype"),
    ],
)
def test_a_rule_that_cannot_be_names_its_field(words, message):
    with pytest.raises(ConfigError, match=message):
        LoRARule(**words)


def test_alpha_becomes_scale():
    assert LoRARule(rank=16, alpha=0.5).scale == 0.5 / 16
    assert LoRARule(rank=16, alpha=8, rslora=True).scale == 2.0
    assert LoRARule(rank=16, scale=2.0) == LoRARule(rank=16, alpha=32) == LoRARule(rank=16)


def test_rules_and_plain_words_do_not_mix():
    with pytest.raises(ConfigError, match=r"rules are given beside \['rank', 'num_layers'\]"):
        AdapterConfig(rules=[LoRARule()], rank=4, num_layers=2)
    with pytest.raises(ConfigError, match="rules is empty"):
        AdapterConfig(rules=[])
