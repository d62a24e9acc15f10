"""Small random models of kinds that the embedded model is not: biased, untied, MoE."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen2, qwen3, qwen3_moe

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
TOKENS = mx.array([[5, 17, 3, 44, 60, 2]])


def qwen3_model(*, layers: int = 2, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a Qwen3 whose output head is not tied to the embedding."""
    args = {"model_type": "qwen3", "num_hidden_layers": layers, "head_dim": 32}
    args |= {"tie_word_embeddings": False} | SIZES | changes
    return randomized(qwen3.Model(qwen3.ModelArgs(**args)), seed)


def biased_model(*, seed: int = 0) -> nn.Module:
    """Return a Qwen2, whose attention projections have biases."""
    args = {"model_type": "qwen2", "num_hidden_layers": 2, "tie_word_embeddings": True} | SIZES
    return randomized(qwen2.Model(qwen2.ModelArgs(**args)), seed)


def expert_model(*, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a Qwen3-MoE, with a mixture of experts in every block."""
    args = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "head_dim": 32}
    args |= {"tie_word_embeddings": False, "num_experts": 4, "num_experts_per_tok": 2}
    args |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 64}
    args |= {"norm_topk_prob": True} | SIZES | changes
    return randomized(qwen3_moe.Model(qwen3_moe.ModelArgs(**args)), seed)


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """Draw every weight of the model from `seed`, with norms near one and nonzero biases."""
    keys = iter(mx.random.split(mx.random.key(seed), 1000))

    def draw(old: mx.array) -> mx.array:
        noise = mx.random.normal(old.shape, key=next(keys)) * 0.1
        return noise + 1 if old.ndim == 1 and mx.all(old == 1) else noise

    model.apply(draw)
    mx.eval(model.parameters())
    return model
