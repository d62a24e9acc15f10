"""Log-probabilities of tokens that are already written down: the trainer's side of promise one.

A group's prompt runs once. Its keys and values, still differentiable, are then prepended to those
of every completion of the group, so gradients are those of the plain forward pass on whole rows.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float, Int
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, make_prompt_cache

from textpolicy.types import Batch

Scores = tuple[Float[mx.array, "batch time"], Float[mx.array, "batch time"]]
"""Each token's log-probability, and the entropy of the distribution that it was drawn from."""


def token_logps(
    model: nn.Module, tokens: Int[mx.array, "batch time"], temperature: Float[mx.array, " batch"]
) -> Scores:
    """Scores under softmax(logits / temperature), in float32 whatever the model's dtype.

    Position 0 has no predecessor and holds zeros, so results align with `tokens` and its mask.
    """
    logp, entropy = _score(model(tokens[:, :-1]), tokens[:, 1:], temperature)
    return mx.pad(logp, [(0, 0), (1, 0)]), mx.pad(entropy, [(0, 0), (1, 0)])


def batch_logps(model: nn.Module, batch: Batch, *, share_prompts: bool = True) -> Scores:
    """Scores of the batch's completion tokens, each completion read after its prompt."""
    run = _logits_after_shared_prompts if share_prompts else _logits_of_whole_rows
    return _score(run(model, batch), batch.tokens, batch.temperature)


def can_share_prompts(model: nn.Module) -> bool:
    """Whether completions read after a shared prompt get the scores of whole rows.

    Recurrent and windowed layers keep more than keys and values, and some models (gemma2 in mlx-lm
    0.32) lay a batch's mask over their heads: a ragged batch of six tokens tells.
    """
    if not all(type(layer) is KVCache for layer in make_prompt_cache(model)):
        return False
    batch = _ragged_batch()
    expected, _ = batch_logps(model, batch, share_prompts=False)
    try:
        shared, _ = batch_logps(model, batch)
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
        tokens=mx.array([[1, 2], [4, 3]]),
        mask=mx.ones(shape, dtype=mx.bool_),
        logp_old=mx.zeros(shape),
        advantages=mx.zeros(shape),
        temperature=mx.ones(2),
        rows=2,
        token_count=4,
    )


def _score(
    logits: Float[mx.array, "batch time vocab"],
    tokens: Int[mx.array, "batch time"],
    temperature: Float[mx.array, " batch"],
) -> Scores:
    logits = logits.astype(mx.float32) / temperature[:, None, None]
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    drawn = mx.take_along_axis(logp, tokens[..., None], axis=-1).squeeze(-1)
    return drawn, -mx.sum(mx.exp(logp) * logp, axis=-1)


class _PromptKeys:
    """Stands where a layer's cache would, and keeps the prompts' keys and values."""

    offset = 0
    keys: mx.array
    values: mx.array

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, time: int, *, return_array: bool = False, **_: Any) -> Any:
        if return_array:
            return create_causal_mask(time)
        return "causal" if time > 1 else None


class _AfterPrompt:
    """Stands where a layer's cache would, and puts each row's prompt before its own tokens."""

    def __init__(
        self, prompts: _PromptKeys, owner: Int[mx.array, " batch"], length: Int[mx.array, " batch"]
    ) -> None:
        self.offset = length
        self._keys, self._values = prompts.keys[owner], prompts.values[owner]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        joined_keys = mx.concatenate([self._keys, keys], axis=2)
        return joined_keys, mx.concatenate([self._values, values], axis=2)

    def make_mask(self, time: int, **_: Any) -> Bool[mx.array, "batch 1 time all"]:
        width = self._keys.shape[2]
        in_prompt = mx.arange(width)[None, :] < self.offset[:, None]
        shape = (len(self.offset), time)
        prompt = mx.broadcast_to(in_prompt[:, None, :], (*shape, width))
        own = mx.broadcast_to(mx.tril(mx.ones((time, time), dtype=mx.bool_)), (*shape, time))
        return mx.concatenate([prompt, own], axis=2)[:, None]


def _logits_after_shared_prompts(
    model: nn.Module, batch: Batch
) -> Float[mx.array, "batch time vocab"]:
    # The last prompt token is read with the completion, whose first token it predicts.
    length = batch.prompt_lengths[batch.owner] - 1
    cache = None
    if batch.prompts.shape[1] > 1:
        recorded = [_PromptKeys() for _ in make_prompt_cache(model)]
        model(batch.prompts[:, :-1], cache=recorded)
        cache = [_AfterPrompt(layer, batch.owner, length) for layer in recorded]
    last = batch.prompts[batch.owner, length]
    inputs = mx.concatenate([last[:, None], batch.tokens[:, :-1]], axis=1)
    return model(inputs, cache=cache)


def _logits_of_whole_rows(model: nn.Module, batch: Batch) -> Float[mx.array, "batch time vocab"]:
    """The plain way, for models whose state is more than keys and values."""
    length = batch.prompt_lengths[batch.owner][:, None]
    width, time = batch.prompts.shape[1], batch.tokens.shape[1]
    position = mx.broadcast_to(mx.arange(width + time - 1), (len(length), width + time - 1))
    prompts = mx.pad(batch.prompts[batch.owner], [(0, 0), (0, time - 1)])
    own = mx.take_along_axis(batch.tokens, mx.clip(position - length, 0, time - 1), axis=1)
    logits = model(mx.where(position < length, prompts, own))
    window = mx.arange(time)[None, :] + length - 1
    return mx.take_along_axis(logits, window[..., None], axis=1)
