"""What to adapt: rules, the last blocks and their keys, the words of PEFT; and their JSON forms."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.bases import arrays, trained
from tests.tiny import TOKENS, expert_model, qwen3_model
from textpolicy.adapters import AdapterConfig, AdapterContainer, LoRARule
from textpolicy.adapters.layers.adapter_layer import adapter_layers
from textpolicy.adapters.quantization.stored_weights import is_quantized
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


def test_more_layers_than_the_model_has_are_all_layers_with_a_warning():
    with pytest.warns(UserWarning, match="num_layers is 3, and the model has 2 blocks: all 2 are"):
        assert adapted_paths(AdapterConfig(num_layers=3)) == adapted_paths(AdapterConfig())


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
        AdapterContainer.from_model(model, rules({"weight_qtype": "nf4", "tile_size": 64}))
    for block in range(2):
        assert f"model.layers.{block}.mlp.down_proj: rows of 96 do not divide" in str(caught.value)
    assert all(array is before[name] for name, array in arrays(model).items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"module_path": "("}, "which is not a regular expression"),
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
        ({"weight_qtype": "nvfp4", "tile_size": 64}, r"tile_size is 64; 'nvfp4' takes \[16\]"),
        ({"weight_qtype": "int4", "tile_size": "channel"}, "'int4' takes"),
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
    with pytest.raises(
        ConfigError, match=r"rules are given together with \['rank', 'num_layers'\]"
    ):
        AdapterConfig(rules=[LoRARule()], rank=4, num_layers=2)
    with pytest.raises(ConfigError, match="rules is empty"):
        AdapterConfig(rules=[])


# The words of PEFT


def peft(**words):
    return AdapterConfig.from_dict({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | words)


def suffixes(paths):
    return {path.rpartition(".")[2] for path in paths}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"target_modules": ["q_proj", "mlp.up_proj"]}, {"q_proj", "up_proj"}),
        ({"target_modules": r".*\.(k|v)_proj"}, {"k_proj", "v_proj"}),
        ({"target_modules": ["lm_head", "embed_tokens"]}, {"lm_head", "embed_tokens"}),
        (
            {"target_modules": "all-linear", "exclude_modules": r".*(mlp|k_proj|v_proj).*"},
            {"q_proj", "o_proj"},
        ),
        (
            {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["self_attn.k_proj"]},
            {"q_proj"},
        ),
    ],
)
def test_peft_names_are_ends_of_paths_and_strings_are_expressions(words, expected):
    assert suffixes(adapted_paths(peft(**words))) == expected


def test_all_linear_is_all_but_the_head():
    assert adapted_paths(peft(target_modules="all-linear")) == adapted_paths(AdapterConfig())


@pytest.mark.parametrize("pattern", [None, [], "layers", ["h", "layers"]])
def test_layers_to_transform_choose_blocks_and_whole_paths_choose_themselves(pattern):
    config = peft(
        target_modules=["q_proj", "model.layers.0.self_attn.v_proj"],
        layers_to_transform=[1],
        layers_pattern=pattern,
    )
    assert adapted_paths(config) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    }


def test_patterns_give_ranks_and_alphas_and_the_first_that_matches_counts():
    config = peft(
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 3},
        alpha_pattern={r"layers\.1\..*": 16},
        use_rslora=True,
        use_dora=True,
        lora_dropout=0.1,
    )
    model = qwen3_model()
    layers = AdapterContainer.from_model(model, config).layers()
    assert {layer.kind for layer in layers.values()} == {"dora"}
    numbers = {path[13:]: (layer.rank, layer.scale) for path, layer in layers.items()}
    assert numbers == {
        "0.self_attn.q_proj": (3, pytest.approx(8 / math.sqrt(3))),
        "0.self_attn.v_proj": (4, 4.0),
        "1.self_attn.q_proj": (2, pytest.approx(16 / math.sqrt(2))),
        "1.self_attn.v_proj": (4, 8.0),
    }
    assert config.dropout == 0.1


def test_every_word_of_peft_that_matches_nothing_is_named():
    config = peft(
        target_modules=["q_proj", "query"],
        exclude_modules=["c_proj"],
        rank_pattern={"vproj": 2},
        layers_to_transform=[7],
    )
    with pytest.raises(AdapterError) as caught:
        adapted_paths(config)
    for words in [
        "target_modules has 'query', which matches nothing",
        "exclude_modules has 'c_proj'",
        "rank_pattern has 'vproj', which matches nothing; nearest: ['model.layers",
        "layers_to_transform has 7, the model has blocks 0 to 1",
    ]:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"peft_type": "LOHA", "target_modules": ["q"]}, "peft_type is 'LOHA'"),
        ({}, "target_modules is missing"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["q"], "bias": "all"}, "bias is 'all'.*; lora_bias trains"),
        ({"target_modules": ["q"], "modules_to_save": ["lm_head"]}, "'modules_to_save': .*Merge"),
        ({"target_modules": ["q"], "some_new_option": 1}, "'some_new_option': 1"),
        ({"target_modules": ["q"], "init_lora_weights": "pissa"}, "'pissa'.*change the base"),
        ({"target_modules": ["q"], "r": 0}, "rank is 0"),
        ({"target_modules": ".*q", "layers_to_transform": [1]}, "target_modules as a list"),
        ({"target_modules": ["q"], "layers_pattern": ["h"]}, "needs layers_to_transform"),
    ],
)
def test_words_of_peft_that_cannot_be_honoured_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        peft(**words)


def test_how_trained_weights_were_once_drawn_does_not_matter():
    words = {"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": "eva"}
    with pytest.raises(ConfigError, match="'eva'"):
        AdapterConfig.from_peft(words)
    assert AdapterConfig.from_peft(words, trained=True).rules[0].a_init == "uniform"
    with pytest.raises(ConfigError, match="'olora'"):
        AdapterConfig.from_peft(words | {"init_lora_weights": "olora"}, trained=True)


# JSON


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(),
        AdapterConfig(num_layers=2, rank=3, scale=20.0, dropout=0.1, keys=["mlp.up_proj"]),
        AdapterConfig(kind="dora", rank=2, alpha=6),
        rules({"kind": "none", "weight_qtype": "nf4", "tile_size": "channel"}, {"bias": True}),
        peft(target_modules=["v_proj", "q_proj"], rank_pattern={"q_proj": 2}, use_dora=True),
        peft(target_modules="all-linear", init_lora_weights="gaussian", lora_bias=True),
    ],
    ids=["default", "last blocks", "dora", "rules", "peft list", "peft all-linear"],
)
def test_a_config_survives_json(config):
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_config_of_mlx_lm_is_read_as_it_is_written():
    from mlx_lm.lora import CONFIG_DEFAULTS

    written = json.loads(json.dumps(CONFIG_DEFAULTS | {"num_layers": 2}))
    assert AdapterConfig.from_dict(written) == AdapterConfig(num_layers=2, rank=8, scale=20.0)
    # The early releases wrote an alpha that nobody read.
    written["lora_parameters"]["alpha"] = 16
    written["fine_tune_type"] = "dora"
    assert AdapterConfig.from_dict(written) == AdapterConfig(
        kind="dora", num_layers=2, rank=8, scale=20.0
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lm_itself_adapts_the_same_modules_with_our_config(kind):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    ours, theirs = qwen3_model(), qwen3_model()
    config = AdapterConfig(num_layers=1, rank=2, scale=3.0, kind=kind)
    container = AdapterContainer.from_model(ours, config)
    container.swap(trained(container))
    form = config.to_dict()
    linear_to_lora_layers(
        theirs, form["num_layers"], form["lora_parameters"], use_dora=kind == "dora"
    )
    theirs.load_weights(list(container.parameters().items()), strict=False)
    assert mx.allclose(ours(TOKENS), theirs(TOKENS), atol=1e-5)


def test_plain_options_are_words_too():
    options = {"lora_layers": 2, "lora_rank": 4, "lora_scale": 20.0, "lora_keys": ["mlp.up_proj"]}
    expected = AdapterConfig(num_layers=2, rank=4, scale=20.0, keys=["mlp.up_proj"])
    assert AdapterConfig.from_dict(options) == expected
    assert AdapterConfig.from_dict({"rank": 16, "alpha": 8}) == AdapterConfig(scale=0.5)


def test_a_function_that_draws_is_left_out_of_json():
    config = rules({"a_init": lambda shape, key: mx.zeros(shape), "rank": 2})
    assert AdapterConfig.from_dict(config.to_dict()) == rules({"rank": 2})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"hidden_size": 4}, r"the options \['hidden_size'\]; expected at least one of \['rules'"),
        ({"rules": [{"rnak": 4}]}, r"unknown rule options \['rnak'\]; .* did you mean \['rank'\]"),
        ({"lora_rnk": 4, "rank": 4}, r"unknown adapter config options \['lora_rnk'\]"),
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
        (
            {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 1.0, "sclae": 2.0}},
            r"unknown lora_parameters options \['sclae'\].*did you mean \['scale'\]",
        ),
        ({"fine_tune_type": "lora", "num_layer": 2}, r"did you mean \['num_layers'\]"),
    ],
)
def test_forms_that_nobody_reads_are_refused_with_the_nearest(data, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig.from_dict(data)
