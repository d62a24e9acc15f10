"""Sampling, training and reloading give the results of single rows, for many families of models."""

from functools import cache

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from tests.families import family_model
from tests.logprobs import token_logprobs
from tests.test_types import rollout
from tests.training.rows import RAGGED, batches_of, groups_of
from textpolicy.adapters import AdapterConfig, AdapterContainer, quantize
from textpolicy.algorithms import grpo
from textpolicy.generation.decode import decode
from textpolicy.generation.engine import can_decode_together
from textpolicy.training.logprobs import ModelLogprobs
from textpolicy.training.trainer import Trainer
from textpolicy.types import RolloutGroup, Sampling, Task

# Family, whether rows of unequal length decode together, and whether rows share their prompt.
FAMILIES = [
    ("llama", True, True),
    ("llama with a window", True, False),
    ("qwen2", True, True),
    ("qwen3", True, True),
    ("qwen3_moe", True, True),
    ("olmoe", True, True),
    ("gemma2", False, False),
    ("gemma3_text", True, False),
    ("gemma4_text", True, False),
    ("deepseek_v3", True, True),
    ("mamba", False, True),
    ("mamba2", True, True),
    ("nemotron_h", False, True),
    ("granitemoehybrid", True, True),
    ("falcon_h1", True, False),
    ("rwkv7", False, True),
    ("qwen3_5", True, True),
    ("qwen3_5_moe", True, True),
    ("qwen3_next", True, True),
    ("olmo_hybrid", False, True),
    ("kimi_linear", True, True),
    ("bailing_moe_v3", True, True),
]
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [10, 11, 12]]
build = cache(family_model)


def sample(model, prompts, *, batched=None, max_tokens=9):
    """Return two rows of each prompt."""
    return decode(
        model,
        prompts,
        n=2,
        sampling=Sampling(max_tokens=max_tokens),
        stop=lambda tokens: None,
        seed=0,
        max_rows=4,
        batched=can_decode_together(model) if batched is None else batched,
    )


@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2], [9]]])
@pytest.mark.parametrize(("name", "batches", "shares"), FAMILIES)
def test_the_recorded_logprobs_equal_those_of_a_forward_pass(name, batches, shares, prompts):
    model = build(name)
    assert can_decode_together(model) is batches
    for row in (row for group in sample(model, prompts, batched=batches) for row in group):
        logp, _ = token_logprobs(model, mx.array([row.context + row.tokens]), mx.ones(1))
        recomputed = logp[0, len(row.context) :]
        assert mx.abs(recomputed - mx.array(row.logprobs)).mean().item() < 1e-4


@pytest.mark.parametrize("name", ["llama", "llama with a window", "gemma3_text"])
def test_long_prompts_are_processed_in_chunks(name):
    """Chunks of 600 prompts have 3 positions, so a length of 2 x 3 + 1 would leave a chunk of 1."""
    model = build(name)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8]] + [[9, 10, 11]] * 599
    rows = decode(
        model,
        prompts,
        n=1,
        sampling=Sampling(max_tokens=1),
        stop=lambda tokens: None,
        seed=0,
        max_rows=600,
    )
    for (row,) in (rows[0], rows[-1]):
        logp, _ = token_logprobs(model, mx.array([row.context + row.tokens]), mx.ones(1))
        assert abs(logp[0, -1].item() - row.logprobs[0]) < 1e-4


@pytest.mark.parametrize(("name", "batches", "shares"), FAMILIES)
def test_the_logprobs_of_a_ragged_batch_equal_those_of_single_rows(name, batches, shares):
    model = build(name)
    read = ModelLogprobs.of(model)
    assert read.share_prompts is shares
    (batch,) = batches_of(groups_of(*RAGGED, vocabulary=96))
    logp, _ = read(batch)
    for row in range(batch.tokens.shape[0]):
        owner = batch.owner[row].item()
        prompt = batch.prompts[owner, : batch.prompt_lengths[owner].item()]
        count = int(batch.mask[row].sum().item())
        tokens = mx.concatenate([prompt, batch.tokens[row, :count]])[None]
        alone, _ = token_logprobs(model, tokens, mx.ones(1))
        assert mx.abs(alone[0, len(prompt) :] - logp[row, :count]).max().item() < 1e-4


def base(name, bits):
    model = family_model(name)
    if bits:
        quantize(model, bits, 32)
    return model


QUICK = {"qwen3_5", "kimi_linear", "nemotron_h", "qwen3_moe", "rwkv7"}


@pytest.mark.parametrize("bits", [None, 4], ids=["float32", "4 bits"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f, *_ in FAMILIES],
)
def test_a_step_of_training_moves_the_adapters_that_others_reload(name, bits, tmp_path):
    model, other = base(name, bits), base(name, bits)
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4, scale=2.0))
    container.publish_path = tmp_path / "adapters.safetensors"
    trainer = Trainer(model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(1e-3))
    before = container.parameters()
    groups = [rollout_group(rows) for rows in sample(model, PROMPTS)]

    metrics = trainer.train(groups)
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-4
    after = container.parameters()
    assert sum(not mx.array_equal(before[path], after[path]) for path in after) >= len(after) / 2

    tokens = mx.array([groups[0].rollouts[0].tokens])
    untrained = other(tokens)
    AdapterContainer.from_directory(container.publish_path).load(other)
    assert mx.abs(model(tokens) - untrained).max().item() > 1e-3
    assert mx.array_equal(model(tokens), other(tokens))


def rollout_group(rows):
    """Return a group in which the second row is better than the first."""
    rollouts = [
        rollout(
            tokens=row.context + row.tokens,
            mask=[False] * len(row.context) + [True] * len(row.tokens),
            logprobs=[0.0] * len(row.context) + row.logprobs,
            reward=float(member),
        )
        for member, row in enumerate(rows)
    ]
    return RolloutGroup(task=Task(id=str(rows[0].prompt), prompt="p"), rollouts=rollouts)


@pytest.mark.parametrize("name", ["nemotron_h", "rwkv7", "mamba", "mamba2", "qwen3_5", "falcon_h1"])
def test_half_precision_does_not_hide_padding_in_recurrent_states(name):
    model = family_model(name)
    expected = can_decode_together(model)
    model.set_dtype(mx.bfloat16)
    assert can_decode_together(model) is expected
