"""The plan of an adapter config equals the adapters that are then made, or is refused like them."""

import json

import mlx.core as mx
import pytest

from tests.bases import arrays, in_bfloat16, packed
from tests.tiny import biased_model, expert_model, qwen3_model
from textpolicy.adapters import AdapterConfig, AdapterContainer, LoRARule, memory_stats
from textpolicy.adapters.quantization.stored_weights import format_of, weight_shape
from textpolicy.errors import AdapterError, ModelError
from textpolicy.generation.mlx_generation import load_model
from textpolicy.planning.adapter_plan import plan_adapters
from textpolicy.planning.unloaded_model import build_unloaded_model

CONFIG = AdapterConfig(rank=4, scale=2.0)
PLANS = {
    "default": {},
    "dora on all": {
        "rules": [LoRARule(module_path=r".*(proj|embed_tokens|lm_head)", kind="dora", rank=3)]
    },
    "dora on all tied": {
        "rules": [LoRARule(module_path=r".*(proj|embed_tokens)", kind="dora", rank=3)]
    },
    "quantized": {
        "rules": [
            LoRARule(
                module_path=".*down_proj", kind="none", weight_qtype="nf4", tile_size="channel"
            ),
            LoRARule(module_path=".*(q|k)_proj", weight_qtype="int3", bias=True),
            LoRARule(module_path=".*v_proj", weight_qtype="mxfp8"),
            LoRARule(module_path=".*embed_tokens", weight_qtype="nvfp4"),
            LoRARule(module_path=".*", weight_qtype="nf4"),
        ]
    },
}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((make, name) for make in (qwen3_model, biased_model, in_bfloat16) for name in PLANS),
        *((packed(4, tied=True), name) for name in ("default", "dora on all tied")),
    ],
)
def test_a_plan_equals_the_measured_adapters(make, name):
    model, config = make(), AdapterConfig(**PLANS[name])
    before = arrays(model)
    planned = plan_adapters(model, config)
    assert all(array is before[name] for name, array in arrays(model).items())
    container = AdapterContainer.from_model(model, config)
    stats = memory_stats(model)
    assert planned.base_bytes == stats["base_bytes"]
    assert planned.adapter_bytes == stats["adapter_bytes"]
    assert planned.trainable_parameters == stats["trainable_parameters"]
    rows = {row.path: row for row in planned.modules if row.kind != "none"}
    assert {
        (path, layer.kind, layer.rank, layer.scale) for path, layer in container.layers().items()
    } == {(path, row.kind, row.rank, row.scale) for path, row in rows.items()}
    for path, layer in container.layers().items():
        kept = format_of(layer.base)
        assert rows[path].quantization == (f"{kept.name} / {kept.tile}" if kept else None)
        assert rows[path].shape == weight_shape(layer.base)


def test_a_plan_of_experts_counts_every_expert():
    planned = plan_adapters(expert_model(), CONFIG)
    container = AdapterContainer.from_model(model := expert_model(), CONFIG)
    assert planned.adapter_bytes == memory_stats(model)["adapter_bytes"]
    row = next(row for row in planned.modules if "switch_mlp" in row.path)
    assert row.shape[0] == 4 and row.path in container.layers()


def test_a_plan_prints_as_a_table():
    lines = str(plan_adapters(qwen3_model(), AdapterConfig(rank=4, num_layers=1))).splitlines()
    assert lines[0].split()[:5] == ["module", "type", "shape", "adapter", "rank"]
    assert any(line.split()[0] == "lm_head" and line.split()[5] == "-" for line in lines)
    assert lines[-2] == "7 of 16 layers adapted"


def test_a_plan_refuses_what_adapting_refuses():
    with pytest.raises(AdapterError, match="matches nothing"):
        plan_adapters(qwen3_model(), AdapterConfig(keys=["q_proj"]))
    with pytest.raises(ModelError, match="do not divide"):
        plan_adapters(
            qwen3_model(intermediate_size=48), AdapterConfig(rules=[LoRARule(weight_qtype="int4")])
        )


def test_an_unloaded_model_plans_like_the_model_and_takes_no_memory(tiny):
    config = json.loads((tiny / "config.json").read_text())
    state = [array.tolist() for array in mx.random.state]
    before = mx.get_active_memory()
    bare = build_unloaded_model(config)
    planned = plan_adapters(bare, CONFIG)
    assert mx.get_active_memory() - before < 2**16
    assert [array.tolist() for array in mx.random.state] == state
    assert planned == plan_adapters(load_model(tiny)[0], CONFIG)


def test_an_unloaded_model_is_quantized_as_its_config_says(tiny):
    config = json.loads((tiny / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4, "lm_head": False}
    config["quantization"]["model.layers.0.mlp.up_proj"] = {"group_size": 32, "bits": 8}
    kept = {
        row.path: row.quantization
        for row in plan_adapters(build_unloaded_model(config), CONFIG).modules
    }
    assert kept.pop("model.layers.0.mlp.up_proj") == "int8 / 32"
    assert set(kept.values()) == {"int4 / 64"}


def test_an_unloaded_model_of_an_unknown_architecture_is_refused():
    with pytest.raises(ModelError, match="mlx-lm cannot make a 'nonesuch'"):
        build_unloaded_model({"model_type": "nonesuch"})
    with pytest.raises(ModelError, match="no model_type"):
        build_unloaded_model({"hidden_size": 3})
