"""Accounting: what a model takes, measured; and what it will take, before it is there."""

import gc
import json
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma2, llama

from tests.bases import BASES, arrays, in_bfloat16, packed
from tests.memory import peak_of
from tests.tiny import SIZES, TOKENS, biased_model, expert_model, qwen3_model
from textpolicy import algorithms
from textpolicy.adapters import (
    AdapterConfig,
    AdapterContainer,
    LoRARule,
    memory_stats,
    print_trainable_parameters,
    quantize,
)
from textpolicy.adapters.quantization.stored_weights import format_of, weight_shape
from textpolicy.algorithms import grpo
from textpolicy.cli.main import main
from textpolicy.errors import AdapterError, ConfigError, ModelError
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.generation.engine import decode
from textpolicy.planning.adapter_plan import plan_adapters
from textpolicy.planning.memory_plan import plan_memory
from textpolicy.planning.unloaded_model import build_unloaded_model
from textpolicy.training.trainer import Trainer
from textpolicy.training.wired_memory import wired_memory
from textpolicy.types import NOT_SAMPLED, Rollout, RolloutGroup, Sampling, StopReason, Task

CONFIG = AdapterConfig(rank=4, scale=2.0)

# Bytes of a layer's scale, and of the gate that all layers share.
SCALE, GATE = 4, 1


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_memory_is_the_sum_of_the_bytes_of_the_arrays(make):
    model = make()
    container = AdapterContainer.from_model(model, CONFIG)
    stats = memory_stats(model)
    total = sum(array.nbytes for array in arrays(model).values())
    assert stats["base_bytes"] + stats["adapter_bytes"] == total
    assert stats["adapter_bytes"] == sum(a.nbytes for a in container.parameters().values())
    assert stats["gradient_bytes"] == stats["adapter_bytes"] and stats["optimizer_bytes"] == 0
    # A float32 scale and a gate of one byte for each layer.
    assert stats["adapter_buffer_bytes"] == SCALE * len(container.layers()) + GATE
    assert stats["memory_ratio"] == stats["adapter_bytes"] / stats["base_bytes"]
    trainable = sum(array.size for array in container.parameters().values())
    assert stats["trainable_parameters"] == trainable
    assert stats["memory_savings_percent"] == 100 * (1 - trainable / stats["total_parameters"])


def test_packed_weights_count_as_the_weights_they_stand_for():
    plain, stored = memory_stats(qwen3_model()), memory_stats(packed(4)())
    assert stored["total_parameters"] == plain["total_parameters"]
    assert plain["bits_per_weight"] == 32
    # 4 bits, a float32 scale and bias for each 64 weights, and unpacked norms.
    assert 5 <= stored["bits_per_weight"] < 5.2


def test_a_biased_model_counts_its_biases_once_quantized():
    model = biased_model()
    before = memory_stats(model)["total_parameters"]
    quantize(model)
    assert memory_stats(model)["total_parameters"] == before


def test_the_optimizer_is_counted_once_it_has_a_state():
    model = qwen3_model()
    AdapterContainer.from_model(model, CONFIG)
    optimizer = optim.Adam(learning_rate=1e-3)
    gradient = nn.value_and_grad(model, lambda x: model(x).sum())(TOKENS)[1]
    optimizer.update(model, gradient)
    mx.eval(model.parameters(), optimizer.state)
    stats = memory_stats(model, optimizer)
    state = sum(array.nbytes for _, array in tree_flatten(optimizer.state))
    assert stats["optimizer_bytes"] == state
    # Two moments for each parameter, a step count and a learning rate.
    assert state == 2 * stats["adapter_bytes"] + 12
    assert stats["gradient_bytes"] == sum(array.nbytes for _, array in tree_flatten(gradient))


def test_doras_measured_lengths_are_counted():
    model = qwen3_model()
    container = AdapterContainer.from_model(model, AdapterConfig(kind="dora"))
    lengths = sum(layer.m.nbytes for layer in container.layers().values())
    buffers = memory_stats(model)["adapter_buffer_bytes"]
    assert buffers == lengths + SCALE * len(container.layers()) + GATE


def test_trainable_parameters_are_said_in_one_line():
    model = packed(3)()
    container = AdapterContainer.from_model(model, CONFIG)
    lines: list[str] = []
    print_trainable_parameters(model, lines.append)
    trained = sum(array.size for array in container.parameters().values())
    total = sum(array.size for array in arrays(qwen3_model()).values()) + trained
    assert lines == [
        f"trainable params: {trained:,} || all params: {total:,} || "
        f"trainable%: {100 * trained / total:.4f}"
    ]


# Plans


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
def test_a_plan_is_what_is_then_measured(make, name):
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
        assert rows[path].quantization == (f"{kept.name} / {kept.group_size}" if kept else None)
        assert rows[path].shape == weight_shape(layer.base)


def test_a_plan_of_experts_counts_every_expert():
    planned = plan_adapters(expert_model(), CONFIG)
    container = AdapterContainer.from_model(model := expert_model(), CONFIG)
    assert planned.adapter_bytes == memory_stats(model)["adapter_bytes"]
    row = next(row for row in planned.modules if "switch_mlp" in row.path)
    assert row.shape[0] == 4 and row.path in container.layers()


def test_a_plan_reads_as_a_table():
    lines = str(plan_adapters(qwen3_model(), AdapterConfig(rank=4, num_layers=1))).splitlines()
    assert lines[0].split()[:5] == ["module", "type", "shape", "adapter", "rank"]
    assert any(line.split()[0] == "lm_head" and line.split()[5] == "-" for line in lines)
    assert lines[-2] == "7 of 16 layers adapted"


def test_a_plan_refuses_what_adapting_refuses():
    with pytest.raises(AdapterError, match="matches nothing"):
        plan_adapters(qwen3_model(), AdapterConfig(keys=["q_proj"]))
    with pytest.raises(ModelError, match="do not divide"):
        plan_adapters(
            qwen3_model(intermediate_size=96), AdapterConfig(rules=[LoRARule(weight_qtype="nf4")])
        )


def test_a_skeleton_plans_like_the_model_and_takes_no_memory(tiny, load_tiny):
    config = json.loads((tiny / "config.json").read_text())
    state = [array.tolist() for array in mx.random.state]
    before = mx.get_active_memory()
    bare = build_unloaded_model(config)
    planned = plan_adapters(bare, CONFIG)
    assert mx.get_active_memory() - before < 2**16
    assert [array.tolist() for array in mx.random.state] == state
    assert planned == plan_adapters(load_tiny()[0], CONFIG)


def test_a_skeleton_is_quantized_as_its_config_says(tiny):
    config = json.loads((tiny / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4, "lm_head": False}
    config["quantization"]["model.layers.0.mlp.up_proj"] = {"group_size": 32, "bits": 8}
    kept = {
        row.path: row.quantization
        for row in plan_adapters(build_unloaded_model(config), CONFIG).modules
    }
    assert kept.pop("model.layers.0.mlp.up_proj") == "int8 / 32"
    assert set(kept.values()) == {"int4 / 64"}


def test_a_skeleton_of_an_unknown_architecture_is_refused():
    with pytest.raises(ModelError, match="mlx-lm cannot make a 'nonesuch'"):
        build_unloaded_model({"model_type": "nonesuch"})
    with pytest.raises(ModelError, match="no model_type"):
        build_unloaded_model({"hidden_size": 3})


# The command


def test_the_command_plans_from_words_or_from_a_file(capsys, tmp_path):
    assert main(["plan", "--rank", "8", "--keys", "self_attn.q_proj", "--json"]) == 0
    from_words = json.loads(capsys.readouterr().out)
    form = {"target_modules": ["q_proj"], "r": 8, "lora_alpha": 16}
    (tmp_path / "adapter.json").write_text(json.dumps(form))
    assert main(["plan", "--adapter-config", str(tmp_path / "adapter.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == from_words
    adapted = {row["path"] for row in from_words["modules"] if row["kind"] == "lora"}
    assert adapted == {f"model.layers.{i}.self_attn.q_proj" for i in range(len(adapted))}
    assert main(["plan", "--kind", "dora"]) == 0
    assert " dora " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("{}", ["--rank", "4"], "beside ['rank']; put them in"),
        ("{", [], "is not JSON"),
        ("[]", [], "holds a list"),
        ('{"target_modules": ["query"]}', [], "'query', which matches nothing"),
    ],
)
def test_the_command_says_what_it_cannot_plan(capsys, tmp_path, content, words, message):
    path = tmp_path / "adapter.json"
    path.write_text(content)
    assert main(["plan", "--adapter-config", str(path), *words]) in (1, 2)
    assert message in capsys.readouterr().err


# Will it fit


SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
TINY = SHAPE | {"hidden_size": 192, "intermediate_size": 256, "num_key_value_heads": 1}
TINY |= {"head_dim": 64, "vocab_size": 320, "tie_word_embeddings": True}
WIDE = SHAPE | {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
# Blocks, groups, rows of each, tokens of prompts and of completions.
STEPS = {
    "like the embedded model": ((4, 2, 8, 16, 64), TINY, {}),
    "deeper": ((8, 1, 4, 64, 96), SHAPE, {}),
    "long prompts": ((4, 1, 4, 200, 64), SHAPE, {}),
    "prompts in two pieces": ((3, 6, 4, 500, 16), SHAPE, {}),
    "hardly anything but a prompt": ((3, 1, 4, 900, 32), SHAPE, {}),
    "large vocabulary": ((4, 1, 4, 32, 96), SHAPE | {"vocab_size": 16384}, {}),
    "a vocabulary in chunks": ((2, 1, 4, 32, 96), SHAPE | {"vocab_size": 65536}, {}),
    "the last blocks": ((8, 1, 4, 64, 96), SHAPE, {"config": {"num_layers": 2}}),
    "two projections": (
        (6, 1, 4, 64, 96),
        SHAPE,
        {"config": {"keys": ["self_attn.q_proj", "self_attn.v_proj"]}},
    ),
    "dora": ((4, 1, 4, 64, 96), SHAPE, {"config": {"kind": "dora"}}),
    "micro-batches": ((4, 2, 4, 64, 96), SHAPE, {"micro_batch_size": 4}),
    "many groups": ((4, 12, 4, 64, 96), SHAPE, {}),
    "groups that are cut": ((4, 2, 8, 64, 200), SHAPE, {}),
    "a trained head": (
        (4, 1, 4, 32, 96),
        SHAPE | {"vocab_size": 8192},
        {"config": {"rules": [LoRARule(rank=8, module_path="(.*_proj|lm_head)")]}},
    ),
    "a trained head in chunks": (
        (2, 1, 4, 32, 96),
        SHAPE | {"vocab_size": 32768},
        {"config": {"rules": [LoRARule(rank=8, module_path="(.*_proj|lm_head)")]}},
    ),
    "two blocks": ((2, 16, 8, 18, 6), TINY, {}),
    "two blocks with checkpoints": ((2, 16, 8, 18, 6), TINY, {"checkpoint_gradients": True}),
    "checkpoints": ((6, 1, 4, 64, 96), SHAPE, {"checkpoint_gradients": True}),
    "quantized": ((4, 1, 8, 32, 32), WIDE, {"mode": "affine"}),
    "nf4": ((4, 1, 8, 32, 32), WIDE, {"mode": "nf4"}),
}


def rollout_groups(groups, size, prompt, completion):
    def rollout(group, member):
        tokens = [(7 * i + group) % 96 for i in range(prompt)]
        tokens += [(5 * i + member) % 96 for i in range(completion)]
        return Rollout(
            tokens=tokens,
            mask=[False] * prompt + [True] * completion,
            logprobs=[0.0] * prompt + [-1.0] * completion,
            completion="",
            reward=float(member % 2),
            stop_reason=StopReason.LENGTH,
            sampling=Sampling(),
            version=NOT_SAMPLED,
        )

    return [
        RolloutGroup(task=Task(id=str(g), prompt=""), rollouts=[rollout(g, m) for m in range(size)])
        for g in range(groups)
    ]


def adapter_config(words):
    return AdapterConfig(**words) if "rules" in words else AdapterConfig(rank=8, **words)


def prepared(blocks, shape, config, mode):
    """A model of its own and what was there before it, with mlx's free memory given back."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model = qwen3_model(layers=blocks, **shape)
    if mode:
        quantize(model, mode=mode)
    use_fast_functions(model)
    AdapterContainer.from_model(model, adapter_config(config))
    return model, before


def planned_for(step):
    (blocks, groups, size, prompt, completion), shape, words = STEPS[step]
    words = dict(words)
    mode = words.pop("mode", None)
    config = words.pop("config", {})
    architecture = SIZES | {"model_type": "qwen3", "num_hidden_layers": blocks, "head_dim": 32}
    architecture |= {"tie_word_embeddings": False} | shape
    if mode == "nf4":
        architecture = packed_model(architecture, mode)
    elif mode:
        architecture["quantization"] = {"group_size": 64, "bits": 4, "mode": mode}
    planned = plan_memory(
        architecture,
        adapter_config(config),
        batch=groups * size,
        group_size=size,
        prompt_tokens=prompt,
        completion_tokens=completion,
        **words,
    )
    return planned, config, mode


def packed_model(architecture, mode):
    model = build_unloaded_model(architecture)
    quantize(model, mode=mode)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_training_step_peaks_where_the_plan_says(step):
    (blocks, groups, size, prompt, completion), shape, words = STEPS[step]
    planned, config, mode = planned_for(step)
    model, before = prepared(blocks, shape, config, mode)
    options = {name: words[name] for name in words.keys() - {"config", "mode"}}
    trainer = Trainer(
        model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(learning_rate=1e-4), **options
    )
    rollouts = rollout_groups(groups, size, prompt, completion)
    trainer.train(rollouts)
    peak = peak_of(lambda: trainer.train(rollouts), before)
    assert planned.estimated_training_bytes == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
def test_a_model_with_a_window_has_no_more_tokens_in_memory_than_others():
    gc.collect()
    before = mx.get_active_memory()
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
    sizes = SIZES | SHAPE | layers | {"model_type": "llama", "num_hidden_layers": 4}
    model = llama.Model(llama.ModelArgs(**sizes))
    step = {"batch": 16, "group_size": 8, "prompt_tokens": 200, "completion_tokens": 32}
    planned = plan_memory(model, AdapterConfig(rank=8), **step)
    use_fast_functions(model)
    AdapterContainer.from_model(model, AdapterConfig(rank=8))
    adam = optim.Adam(learning_rate=1e-4)
    trainer = Trainer(model, grpo.compute_advantages, grpo.policy_loss, adam)
    rollouts = rollout_groups(2, 8, 200, 32)
    trainer.train(rollouts)
    peak = peak_of(partial(trainer.train, rollouts), before)
    assert planned.estimated_training_bytes == pytest.approx(peak, rel=0.15)


def test_rows_that_wait_are_not_in_the_plan():
    step = {"group_size": 8, "prompt_tokens": 64, "completion_tokens": 64}
    few, many = (plan_memory(qwen3_model(), batch=batch, **step) for batch in (256, 2048))
    assert few == many


def test_more_groups_take_no_more_memory():
    peaks = []
    for groups in (2, 6):
        model, before = prepared(2, SHAPE, {}, None)
        loss = algorithms.get("grpo", beta=0.1).policy_loss
        trainer = Trainer(
            model, grpo.compute_advantages, loss, optim.Adam(learning_rate=1e-4), reference="base"
        )
        rollouts = rollout_groups(groups, 8, 32, 64)
        trainer.train(rollouts)
        peaks.append(peak_of(partial(trainer.train, rollouts), before))
        del model, trainer
    assert peaks[1] < 1.05 * peaks[0]


def test_with_checkpoints_more_blocks_take_hardly_more_memory():
    # A block's input is kept, and nothing else of it until its turn comes in the backward pass.
    def peak(blocks, *, checkpoint):
        model, before = prepared(blocks, SHAPE, {}, None)
        loss, adam = grpo.policy_loss, optim.Adam(learning_rate=1e-4)
        trainer = Trainer(
            model, grpo.compute_advantages, loss, adam, checkpoint_gradients=checkpoint
        )
        rollouts = rollout_groups(1, 4, 16, 128)
        trainer.train(rollouts)
        return peak_of(partial(trainer.train, rollouts), before) - standing(model)

    def standing(model):
        return sum(array.nbytes for array in arrays(model).values())

    kept = peak(12, checkpoint=False) - peak(4, checkpoint=False)
    assert peak(12, checkpoint=True) - peak(4, checkpoint=True) < 0.2 * kept


def test_a_run_leaves_the_wired_limit_as_it_was():
    before = mx.set_wired_limit(0)
    mx.set_wired_limit(before)
    with wired_memory():
        assert mx.square(mx.array(3.0)).item() == 9
    assert mx.set_wired_limit(before) == before


@pytest.mark.metal
@pytest.mark.skipif(not mx.metal.is_available(), reason="needs an Apple GPU")
def test_inside_a_run_the_device_keeps_what_it_recommends():
    with wired_memory():
        limit = mx.device_info()["max_recommended_working_set_size"]
        assert mx.set_wired_limit(limit) == limit


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        "like the embedded model",
        "deeper",
        "long prompts",
        "prompts in two pieces",
        "hardly anything but a prompt",
        "large vocabulary",
        "quantized",
    ],
)
def test_sampling_peaks_where_the_plan_says(step):
    (blocks, groups, size, prompt, completion), shape, _ = STEPS[step]
    planned, config, mode = planned_for(step)
    model, before = prepared(blocks, shape, config, mode)
    prompts = [[(7 * i + group) % 96 for i in range(prompt)] for group in range(groups)]

    def sample():
        decode(
            model,
            prompts,
            n=size,
            sampling=Sampling(max_tokens=completion),
            stop=lambda tokens: None,
            seed=0,
            max_rows=groups * size,
        )

    assert planned.estimated_generation_bytes == pytest.approx(peak_of(sample, before), rel=0.15)


def test_the_memory_of_a_model_that_is_not_here_is_planned_without_loading_anything():
    qwen3_8b = {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
    before = mx.get_active_memory()
    step = {"batch": 64, "group_size": 8, "prompt_tokens": 256, "completion_tokens": 512}
    planned = plan_memory(qwen3_8b, dtype=mx.bfloat16, micro_batch_size=2, **step)
    # 8.19 billion parameters in two bytes each.
    assert planned.weights == pytest.approx(2 * 8.19e9, rel=0.01)
    assert planned.optimizer == 2 * planned.adapters
    lean = plan_memory(
        qwen3_8b, dtype=mx.bfloat16, micro_batch_size=2, checkpoint_gradients=True, **step
    )
    assert lean.estimated_training_bytes < planned.estimated_training_bytes
    packed_8b = qwen3_8b | {"quantization": {"group_size": 64, "bits": 4}}
    assert plan_memory(packed_8b, dtype=mx.bfloat16, **step).weights < planned.weights / 3.5
    assert mx.get_active_memory() - before < 2**20


def test_a_step_that_is_no_step_and_a_model_that_is_not_known_are_refused():
    with pytest.raises(ConfigError, match="batch is 6; expected a multiple of group_size, 4"):
        plan_memory(qwen3_model(), batch=6, group_size=4, prompt_tokens=8, completion_tokens=8)
    with pytest.raises(ModelError, match=r"knows dense blocks.*get_peak_memory"):
        plan_memory(expert_model(), batch=4, prompt_tokens=8, completion_tokens=8)
    sizes = SIZES | {"model_type": "gemma2", "head_dim": 32, "num_hidden_layers": 1}
    more_norms = gemma2.Model(gemma2.ModelArgs.from_dict(sizes))
    with pytest.raises(ModelError, match="also post_feedforward_layernorm, pre_feedforward"):
        plan_memory(more_norms, batch=4, prompt_tokens=8, completion_tokens=8)
