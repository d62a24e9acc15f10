"""The estimated peaks of a step against measured peaks, and what the estimate refuses."""

import gc
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx_lm.models import gemma2

from tests.devices import only_on_a_cpu
from tests.families import family_model
from tests.memory import peak_of
from tests.tiny import SIZES, expert_model, qwen3_model
from textpolicy import algorithms, fast_cpu
from textpolicy.adapters import AdapterConfig, AdapterContainer, LoRARule, quantize
from textpolicy.adapters.container import shared_copy
from textpolicy.algorithms import grpo
from textpolicy.device_sizes import DeviceSizes
from textpolicy.errors import ConfigError, ModelError
from textpolicy.fast_cpu.mlx_operations import reason_of_none
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.fast_cpu.packed_weights import MOST_ROWS
from textpolicy.generation.decode import decode
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine
from textpolicy.generation.prefix_cache import PrefixCache
from textpolicy.planning import memory_plan
from textpolicy.planning.largest_micro_batch import largest_micro_batch
from textpolicy.planning.memory_plan import plan_memory
from textpolicy.planning.unloaded_model import build_unloaded_model
from textpolicy.serving.engine_queue import SERVED_PREFIX_BYTES
from textpolicy.training.batch import count_prompts, split_into_micro_batches, training_rows
from textpolicy.training.trainer import Trainer
from textpolicy.types import NOT_SAMPLED, Rollout, RolloutGroup, Sampling, Segment, StopReason, Task

SHAPE = {
    **SIZES,
    "model_type": "qwen3",
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
TINY = SHAPE | {"hidden_size": 192, "intermediate_size": 256, "num_key_value_heads": 1}
TINY |= {"head_dim": 64, "vocab_size": 320, "tie_word_embeddings": True}
WIDE = SHAPE | {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
WINDOWED = SHAPE | {"model_type": "llama", "head_dim": None, "sliding_window": 64}
WINDOWED |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
HEAD = {"rules": [LoRARule(rank=8, module_path="(.*_proj|lm_head)")]}
# Blocks, groups, rows of each, tokens of prompts and of completions; the model; what else is set.
STEPS = {
    "like the embedded model": ((4, 2, 8, 16, 64), TINY, {}),
    "prompts in two chunks": ((3, 6, 4, 500, 16), SHAPE, {}),
    "hardly anything but a prompt": ((3, 1, 4, 900, 32), SHAPE, {}),
    "large vocabulary": ((4, 1, 4, 32, 96), SHAPE | {"vocab_size": 16384}, {}),
    "a vocabulary in chunks": ((2, 1, 4, 32, 96), SHAPE | {"vocab_size": 65536}, {}),
    "a trained head": ((4, 1, 4, 32, 96), SHAPE | {"vocab_size": 8192}, {"config": HEAD}),
    "a trained head in chunks": (
        (2, 1, 4, 32, 96),
        SHAPE | {"vocab_size": 32768},
        {"config": HEAD},
    ),
    "two projections": (
        (6, 1, 4, 64, 96),
        SHAPE,
        {"config": {"keys": ["self_attn.q_proj", "self_attn.v_proj"]}},
    ),
    "the last blocks": ((8, 1, 4, 64, 96), SHAPE, {"config": {"num_layers": 2}}),
    "dora": ((4, 1, 4, 64, 96), SHAPE, {"config": {"kind": "dora"}}),
    "many groups": ((4, 12, 4, 64, 96), SHAPE, {}),
    "groups that are cut": ((4, 2, 8, 64, 200), SHAPE, {}),
    "several segments": ((4, 2, 4, 96, 16), SHAPE, {"segments": 3, "agents": 8}),
    "several segments of rollouts that are cut": (
        (2, 1, 4, 400, 24),
        SHAPE,
        {"segments": 3, "agents": 2},
    ),
    "micro-batches": ((4, 2, 4, 64, 96), SHAPE, {"micro_batch_size": 4}),
    "checkpoints": ((6, 1, 4, 64, 96), SHAPE, {"checkpoint_gradients": True}),
    "two blocks with checkpoints": ((2, 16, 8, 18, 6), TINY, {"checkpoint_gradients": True}),
    "windowed attention": ((4, 2, 8, 200, 32), WINDOWED, {}),
    "quantized": ((4, 1, 8, 32, 32), WIDE, {"mode": "affine"}),
    "nf4": ((4, 1, 8, 32, 32), WIDE, {"mode": "nf4"}),
    "a quantized head that is trained": (
        (2, 1, 8, 32, 32),
        WIDE | {"vocab_size": 32768},
        {"mode": "affine", "config": HEAD},
    ),
}
TOLERANCE = 0.15


def rollout_groups(groups, size, prompt, completion, segments=1):
    def segment(group, member, number):
        start = group + (11 * (size * number + member) if number else 0)
        tokens = [(7 * i + start) % 96 for i in range(prompt)]
        return Segment(
            tokens=tokens + [(5 * i + member) % 96 for i in range(completion)],
            mask=[False] * prompt + [True] * completion,
            logprobs=[0.0] * prompt + [-1.0] * completion,
        )

    def rollout(group, member):
        first, *later = (segment(group, member, number) for number in range(segments))
        return Rollout(
            tokens=first.tokens,
            mask=first.mask,
            logprobs=first.logprobs,
            later=tuple(later),
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


def play(model, groups, agents, prompt):
    """Sample as the server of a run does: each agent asks for the segments of its rollout."""
    engine = Engine(model, prefixes=PrefixCache(SERVED_PREFIX_BYTES))
    rollouts = [one for group in groups for one in group.rollouts]
    for start in range(0, len(rollouts), agents):
        for turn in zip(*(one.segments for one in rollouts[start : start + agents]), strict=True):
            for number, segment in enumerate(turn):
                row = DecodingRow(
                    context=segment.tokens[:prompt],
                    sampling=Sampling(max_tokens=len(segment.tokens) - prompt),
                    stop=lambda tokens: None,
                    key=np.array([0, number], np.uint32),
                    keep_prefix=True,
                )
                engine.submit([row])
            while engine.can_step:
                engine.step()


def unloaded(architecture, mode):
    model = build_unloaded_model(architecture)
    if mode:
        quantize(model, mode=mode)
    return model


def trainer_of(model, config, loss=grpo.policy_loss, **options):
    """A trainer of a loaded model, as `load_model` and a run would prepare it."""
    use_fast_functions(model)
    AdapterContainer.from_model(model, config)
    mx.eval(model.parameters())
    adam = optim.Adam(learning_rate=1e-4)
    return Trainer(model, grpo.compute_advantages, loss, adam, **options)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_sampling_and_training_peak_where_the_plan_says(step):
    (blocks, groups, size, prompt, completion), shape, options = STEPS[step]
    options = dict(options)
    mode, words = options.pop("mode", None), options.pop("config", {})
    config = AdapterConfig(**words) if "rules" in words else AdapterConfig(rank=8, **words)
    architecture = shape | {"num_hidden_layers": blocks}
    planned = plan_memory(
        unloaded(architecture, mode),
        config,
        batch=groups * size,
        group_size=size,
        prompt_tokens=prompt,
        completion_tokens=completion,
        **options,
    )
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model = unloaded(architecture, mode)
    segments, agents = options.pop("segments", 1), options.pop("agents", None)
    trainer = trainer_of(model, config, **options)
    rollouts = rollout_groups(groups, size, prompt, completion, segments)
    sampler = shared_copy(model)
    trainer.train(rollouts)
    training = peak_of(partial(trainer.train, rollouts), before)
    assert planned.estimated_training_bytes == pytest.approx(training, rel=TOLERANCE)

    def sample():
        if agents:
            play(sampler, rollouts, agents, prompt)
            return
        decode(
            sampler,
            [group.rollouts[0].tokens[:prompt] for group in rollouts],
            n=size,
            sampling=Sampling(max_tokens=completion),
            stop=lambda tokens: None,
            seed=0,
            max_rows=groups * size,
        )

    # A busy machine frees buffers at other moments; the plan is of the larger peak.
    sampling = 0
    for _ in range(3):
        sampling = max(sampling, peak_of(sample, before))
        if planned.estimated_generation_bytes == pytest.approx(sampling, rel=TOLERANCE):
            break
    assert planned.estimated_generation_bytes == pytest.approx(sampling, rel=TOLERANCE)


@pytest.mark.slow
def test_more_groups_take_no_more_memory():
    peaks = []
    for groups in (2, 6):
        gc.collect()
        before = mx.get_active_memory()
        loss = algorithms.get("grpo", beta=0.1).policy_loss
        model = unloaded(SHAPE | {"num_hidden_layers": 2}, None)
        trainer = trainer_of(model, AdapterConfig(rank=8), loss, reference="base")
        rollouts = rollout_groups(groups, 8, 32, 64)
        trainer.train(rollouts)
        # How far mlx runs ahead depends on the machine's load, which only adds to a peak.
        peaks.append(min(peak_of(partial(trainer.train, rollouts), before) for _ in range(3)))
        del model, trainer
    assert peaks[1] < 1.1 * peaks[0]


def test_rows_that_wait_are_not_in_the_plan():
    step = {"group_size": 8, "prompt_tokens": 64, "completion_tokens": 64}
    few, many = (
        plan_memory(qwen3_model(), batch=batch, sizes=DeviceSizes(), **step)
        for batch in (256, 2048)
    )
    assert few == many


def test_a_plan_names_its_arrays_and_each_peak_is_a_sum_of_them():
    step = {"batch": 8, "group_size": 8, "prompt_tokens": 64, "completion_tokens": 64}
    planned = plan_memory(qwen3_model(), **step)
    sizes = {name: array.bytes for name, array in planned.arrays.items()}
    assert sizes["optimizer"] == 2 * sizes["adapters"] == 2 * sizes["gradients"]
    standing = ("weights", "adapters", "sampler's adapters", "optimizer", "gradients")
    backward = sum(sizes[name] for name in (*standing, "activations"))
    larger = max(sizes["block temporaries"], sizes["logits"])
    assert planned.estimated_training_bytes == backward + larger


def test_merged_weights_are_a_copy_of_the_adapted_weights():
    step = {"batch": 8, "group_size": 8, "prompt_tokens": 64, "completion_tokens": 64}
    config = AdapterConfig(rules=[LoRARule(module_path=".*(q_proj|lm_head)", rank=4)])
    plain, merging = (
        plan_memory(qwen3_model(), config, **step, merge_adapters=merge) for merge in (False, True)
    )
    # Two layers with 64 queries, and a head of 96 tokens, of 64 inputs each.
    merged = 4 * 64 * (64 + 64 + 96)
    assert merging.arrays["merged weights"].bytes == merged
    assert merging.arrays["update of a merged weight"].bytes == 4 * 64 * 96
    assert "merged weights" not in plain.arrays
    assert {name: peak - merged for name, peak in merging.peaks.items()} == plain.peaks


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
    plan = partial(plan_memory, dtype=mx.bfloat16, batch=64, group_size=8, prompt_tokens=256)
    plan = partial(plan, completion_tokens=512, micro_batch_size=2)
    planned = plan(qwen3_8b)
    # 8.19 billion parameters in two bytes each.
    weights = planned.arrays["weights"].bytes
    assert weights == pytest.approx(2 * 8.19e9, rel=0.01)
    lean = plan(qwen3_8b, checkpoint_gradients=True)
    assert lean.estimated_training_bytes < planned.estimated_training_bytes
    packed_8b = qwen3_8b | {"quantization": {"group_size": 64, "bits": 4}}
    assert plan(packed_8b).arrays["weights"].bytes < weights / 3.5
    assert mx.get_active_memory() - before < 2**20


def test_a_base_in_nf4_is_planned_in_nf4_without_computing_it():
    step = {"batch": 8, "group_size": 8, "prompt_tokens": 16, "completion_tokens": 16}
    shape, form = (
        SHAPE | {"vocab_size": 4096, "num_hidden_layers": 1},
        {"bits": 4, "group_size": 64},
    )
    before = mx.get_active_memory()
    nf4, affine = (
        plan_memory(shape | {"quantization": form | {"mode": mode}}, **step).arrays
        for mode in ("nf4", "affine")
    )
    assert mx.get_active_memory() - before < 2**16
    # A scale for each group of 64, and no bias.
    assert nf4["weights"].bytes < affine["weights"].bytes
    # Training holds the unpacked head of 4096 x 128.
    assert nf4["unpacked head"].bytes == 4096 * 128 * 4


@pytest.mark.parametrize(("mode", "bits"), [("affine", 4), ("affine", 8), ("nf4", 4)])
def test_few_float32_rows_are_planned_without_unpacked_matrices(mode, bits):
    """Other dtypes and more rows unpack them, as do machines without compiled functions."""
    form = {"bits": bits, "group_size": 64, "mode": mode}
    shape = SHAPE | {"vocab_size": 4096, "num_hidden_layers": 1, "quantization": form}

    def unpacked(dtype: mx.Dtype, rows: int) -> int:
        step = {"batch": rows, "group_size": rows, "prompt_tokens": 16, "completion_tokens": 16}
        return plan_memory(shape, dtype=dtype, **step).arrays["unpacked matrices"].bytes

    if mx.default_device().type != mx.cpu or reason_of_none():
        pytest.skip("no compiled functions")
    assert unpacked(mx.float32, MOST_ROWS) == 0
    assert unpacked(mx.float32, MOST_ROWS + 1) > 4096 * 128 * 4
    assert unpacked(mx.bfloat16, 8) > 4096 * 128 * 4


def test_a_batch_without_whole_groups_and_a_model_that_is_not_known_are_refused():
    step = {"prompt_tokens": 8, "completion_tokens": 8}
    with pytest.raises(ConfigError, match="batch is 6; expected a multiple of group_size, 4"):
        plan_memory(qwen3_model(), batch=6, group_size=4, **step)
    with pytest.raises(ModelError, match=r"qwen3_moe cannot be estimated.*dry-run --measure"):
        plan_memory(expert_model(), batch=4, **step)
    with pytest.raises(ModelError, match=r"kimi_linear cannot be estimated.*several kinds"):
        plan_memory(family_model("kimi_linear"), batch=4, **step)
    sizes = SIZES | {"model_type": "gemma2", "head_dim": 32, "num_hidden_layers": 1}
    more_norms = gemma2.Model(gemma2.ModelArgs.from_dict(sizes))
    with pytest.raises(ModelError, match="extra post_feedforward_layernorm, pre_feedforward"):
        plan_memory(more_norms, batch=4, **step)


@pytest.mark.parametrize("size", [None, 3, 64, 5000])
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("share", [True, False])
def test_the_largest_micro_batch_of_any_number_of_groups_is_known_at_once(size, segments, share):
    def largest(groups, group_size):
        return largest_micro_batch(
            groups, group_size, segments, (12, 5), size=size, tokens=1024, share_prompts=share
        )

    assert largest(10**9, 8) == largest(10**4, 8)
    assert largest(2, 10**9) == largest(2, 10**4)


@pytest.mark.parametrize(("groups", "group_size"), [(3000, 2), (1300, 8)])
def test_a_micro_batch_above_the_counted_sizes_is_the_one_that_the_trainer_cuts(groups, group_size):
    rollout = Rollout(
        tokens=[0] * 3,
        mask=[False, True, True],
        logprobs=[0.0] * 3,
        completion="",
        reward=0.0,
        stop_reason=StopReason.LENGTH,
        sampling=Sampling(),
        version=0,
    )
    group = RolloutGroup(task=Task(id="", prompt=""), rollouts=[rollout] * group_size)
    first, *others = split_into_micro_batches(training_rows([group] * groups), 4096)
    planned = largest_micro_batch(
        groups, group_size, 1, (1, 2), size=4096, tokens=1024, share_prompts=True
    )
    assert planned == (len(first), count_prompts(first), bool(others))


@only_on_a_cpu("GPUs multiply in bfloat16")
def test_copies_of_a_bfloat16_checkpoint_are_planned_where_compiled_loops_use_them(monkeypatch):
    step = {"batch": 8, "group_size": 8, "prompt_tokens": 8, "completion_tokens": 8}
    model = qwen3_model()
    assert plan_memory(model, **step, stored=mx.bfloat16).arrays["bfloat16 copies"].bytes == 0
    monkeypatch.setattr(memory_plan, "FEWEST_NUMBERS", 0)
    expected = sum(
        module["weight"].size * 2 for module in model.modules() if isinstance(module, nn.Linear)
    )
    planned = plan_memory(model, **step, stored=mx.bfloat16).arrays["bfloat16 copies"].bytes
    assert planned == (expected if fast_cpu.enable().few_rows else 0)
    for stored in (None, mx.float16, mx.float32):
        assert plan_memory(model, **step, stored=stored).arrays["bfloat16 copies"].bytes == 0
    shape = SHAPE | {"num_hidden_layers": 1}
    in_bfloat16 = plan_memory(shape, **step, dtype=mx.bfloat16, stored=mx.bfloat16)
    assert in_bfloat16.arrays["bfloat16 copies"].bytes == 0
