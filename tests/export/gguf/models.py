"""Small random models of the families that GGUF files can hold, with the embedded tokenizer."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tests.bases import trained
from tests.tiny import randomized
from textpolicy.adapters import AdapterConfig, AdapterContainer

VOCABULARY = 320
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
OWN_SIZES = {"qwen3": {"head_dim": 32}, "qwen3_moe": {"head_dim": 32} | EXPERTS}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"type": "linear", "factor": 2.0}
_GENERATOR = np.random.default_rng(0)
# Of different lengths, one beyond the context before scaling.
PROMPTS = [_GENERATOR.integers(0, 317, size).tolist() for size in (1, 7, 120)]


class Made(NamedTuple):
    """A model, and the config.json that it would have."""

    model: nn.Module
    architecture: dict[str, Any]


def make(model_type: str, *, seed: int = 0, **changes: Any) -> Made:
    """Return a random model of a type."""
    # mlx-lm has no class for mistral and takes that of llama.
    name = {"mistral": "llama"}.get(model_type, model_type)
    module = import_module(f"mlx_lm.models.{name}")
    config = {"model_type": model_type} | SIZES | OWN_SIZES.get(model_type, {}) | changes
    model = module.Model(module.ModelArgs.from_dict(config))
    return Made(randomized(model, seed), config)


def adapted(model: nn.Module, config: AdapterConfig | None = None) -> AdapterContainer:
    """Return a container of adapters that change the model's outputs."""
    container = AdapterContainer.from_model(model, config or AdapterConfig(rank=4))
    container.swap(trained(container))
    return container


def logprobs(model: Any, prompts: Sequence[Sequence[int]] = PROMPTS) -> np.ndarray:
    """Return the log-probabilities of the whole vocabulary after each prompt."""
    rows = [model(mx.array([prompt]))[0, -1].astype(mx.float32) for prompt in prompts]
    return np.stack([np.array(row - mx.logsumexp(row)) for row in rows])


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())
