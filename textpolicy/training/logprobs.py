"""Log-probabilities of tokens that are already written down: the trainer's side of promise one."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int
from mlx_lm.models.cache import KVCache, make_prompt_cache

from textpolicy.training.output_head import OutputHead, find_output_head
from textpolicy.training.shared_prompts import run_whole_rows, run_with_shared_prompts
from textpolicy.training.softmax_logprobs import logprobs_from_logits
from textpolicy.types import Batch

BatchLogprobs = tuple[Float[mx.array, "batch time"], Float[mx.array, "batch time"]]
"""Each token's log-probability, and the entropy of the distribution that it was drawn from."""


@dataclass(frozen=True)
class ModelLogprobs:
    """How a model's batches are read; what the model allows is found out once, by `of`.

    `head` is None where logits cannot be computed a chunk at a time, `share_prompts` False where
    every row has to repeat its prompt. The values are the same.
    """

    model: nn.Module
    head: OutputHead | None
    share_prompts: bool

    @classmethod
    def of(cls, model: nn.Module) -> "ModelLogprobs":
        """The leanest way to read this model."""
        return cls(model, find_output_head(model), can_share_prompts(model))

    def __call__(self, batch: Batch, *, differentiable: bool = True) -> BatchLogprobs:
        """Return log-probability and entropy of each counted token; 0 at other places."""
        counted = np.flatnonzero(np.array(batch.mask))
        if not len(counted):
            return mx.zeros(batch.mask.shape), mx.zeros(batch.mask.shape)
        network = self.head.body if self.head else self.model
        if self.share_prompts:
            outputs = run_with_shared_prompts(network, self.model, batch)
        else:
            outputs = run_whole_rows(network, batch)
        time = batch.tokens.shape[1]
        at = mx.array(counted)
        read = outputs.reshape(-1, outputs.shape[-1])[at]
        drawn, temperature = batch.tokens.flatten()[at], batch.temperature[at // time]
        if self.head:
            values = self.head.logprobs(read, drawn, temperature, differentiable=differentiable)
        else:
            values = logprobs_from_logits(read, drawn, temperature)
        logp, entropy = values
        return _scatter(logp, at, batch), _scatter(entropy, at, batch)


def token_logprobs(
    model: nn.Module, tokens: Int[mx.array, "batch time"], temperature: Float[mx.array, " batch"]
) -> BatchLogprobs:
    """Return log-probabilities and entropies under softmax(logits / temperature), in float32.

    Position 0 has no predecessor and holds zeros, so results align with `tokens` and its mask.
    """
    logits = model(tokens[:, :-1])
    rows, time, vocabulary = logits.shape
    flat = logits.reshape(-1, vocabulary)
    values = logprobs_from_logits(flat, tokens[:, 1:].flatten(), mx.repeat(temperature, time))
    logp, entropy = (x.reshape(rows, time) for x in values)
    return mx.pad(logp, [(0, 0), (1, 0)]), mx.pad(entropy, [(0, 0), (1, 0)])


def can_share_prompts(model: nn.Module) -> bool:
    """Whether completions read after a shared prompt get the values of whole rows.

    Recurrent and windowed layers keep more than keys and values, and some models (gemma2 in mlx-lm
    0.32) lay a batch's mask over their heads: a ragged batch of six tokens tells.
    """
    if not all(type(layer) is KVCache for layer in make_prompt_cache(model)):
        return False
    batch = _ragged_batch()
    expected, _ = ModelLogprobs(model, None, share_prompts=False)(batch)
    try:
        shared, _ = ModelLogprobs(model, None, share_prompts=True)(batch)
    except ValueError:
        return False
    tolerance = 1e-3 if model(batch.tokens).dtype == mx.float32 else 0.1
    return float(mx.abs(shared - expected).mean()) < tolerance


def _ragged_batch() -> Batch:
    shape = (2, 2)
    return Batch(
        prompts=mx.array([[1, 2, 3], [3, 0, 0]]),
        prompt_lengths=mx.array([3, 1]),
        owner=mx.array([0, 1]),
        group=mx.array([0, 1]),
        tokens=mx.array([[1, 2], [4, 3]]),
        mask=mx.ones(shape, dtype=mx.bool_),
        logp_sampled=mx.zeros(shape),
        logp_old=mx.zeros(shape),
        advantages=mx.zeros(shape),
        temperature=mx.ones(2),
        rows=2,
        token_count=4,
        max_tokens=2,
    )


def _scatter(
    values: Float[mx.array, " counted"], counted: Int[mx.array, " counted"], batch: Batch
) -> Float[mx.array, "batch time"]:
    """The values of counted tokens at their places in the batch."""
    return mx.zeros(batch.mask.size).at[counted].add(values).reshape(batch.mask.shape)
