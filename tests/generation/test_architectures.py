"""Batched decoding and shared prompts give the results of single rows, for many architectures."""

import mlx.core as mx
import pytest
from mlx_lm.models import gemma2, gemma3_text, llama, mamba, qwen2, qwen3_moe
from mlx_lm.models.deepseek_v3 import Model as DeepseekModel
from mlx_lm.models.deepseek_v3 import ModelArgs as DeepseekArgs

from tests.logprobs import token_logprobs
from tests.training.rows import RAGGED, batches_of, groups_of
from textpolicy.generation.decode import decode
from textpolicy.generation.engine import can_decode_together
from textpolicy.training.logprobs import ModelLogprobs
from textpolicy.types import Sampling

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 260,
}
WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "rope_theta": 10000.0,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "norm_topk_prob": True,
}
LATENT = {
    "model_type": "deepseek_v3",
    "n_routed_experts": None,
    "n_shared_experts": None,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}


def build(name: str):
    """Return a random model of two layers; its weights are large enough to show mistakes."""
    mx.random.seed(3)
    kinds = {
        "llama": (llama, COMMON),
        "llama with a window": (llama, COMMON | WINDOW),
        "qwen2": (qwen2, COMMON),
        "qwen3_moe": (qwen3_moe, COMMON | MOE),
        "gemma2": (gemma2, COMMON | {"head_dim": 16}),
        "gemma3_text": (
            gemma3_text,
            COMMON | {"head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2},
        ),
        "mamba": (
            mamba,
            {
                "vocab_size": 260,
                "hidden_size": 64,
                "intermediate_size": 128,
                "state_size": 8,
                "num_hidden_layers": 2,
                "conv_kernel": 4,
                "use_bias": False,
                "use_conv_bias": True,
                "time_step_rank": 4,
            },
        ),
    }
    if name == "deepseek_v3":
        model = DeepseekModel(DeepseekArgs(**(COMMON | LATENT)))
    else:
        module, options = kinds[name]
        model = module.Model(module.ModelArgs(model_type=name.split()[0], **options))
    model.eval()
    mx.eval(model.parameters())
    return model


FAMILIES = [
    ("llama", True, True),
    ("llama with a window", True, False),
    ("qwen2", True, True),
    ("qwen3_moe", True, True),
    ("gemma2", False, False),
    ("gemma3_text", True, False),
    ("mamba", False, False),
    ("deepseek_v3", True, True),
]


@pytest.mark.parametrize("prompts", [[[1, 2, 3, 4, 5, 6, 7], [9], [10, 11, 12]], [[1, 2], [9]]])
@pytest.mark.parametrize(("name", "batches", "shares"), FAMILIES)
def test_the_recorded_logprobs_equal_those_of_a_forward_pass(name, batches, shares, prompts):
    model = build(name)
    assert can_decode_together(model) is batches
    rows = decode(
        model,
        prompts,
        n=2,
        sampling=Sampling(max_tokens=9),
        stop=lambda tokens: None,
        seed=0,
        max_rows=4,
        batched=batches,
    )
    for row in (row for group in rows for row in group):
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
    (batch,) = batches_of(groups_of(*RAGGED))
    logp, _ = read(batch)
    for row in range(batch.tokens.shape[0]):
        owner = batch.owner[row].item()
        prompt = batch.prompts[owner, : batch.prompt_lengths[owner].item()]
        count = int(batch.mask[row].sum().item())
        tokens = mx.concatenate([prompt, batch.tokens[row, :count]])[None]
        alone, _ = token_logprobs(model, tokens, mx.ones(1))
        assert mx.abs(alone[0, len(prompt) :] - logp[row, :count]).max().item() < 1e-4
