"""The loss of a batch of demonstrations.

    loss = - sum of log p(token | tokens before it) / number of learned tokens

The mean is over all learned tokens of a batch: neither their split into rows nor padding changes
the loss.
"""

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float, Int

from textpolicy.errors import ConfigError, TrainingError
from textpolicy.fast_cpu.rotary import one_pass
from textpolicy.training.output_head import find_output_head
from textpolicy.training.sft.batches import SFTBatch
from textpolicy.training.sft.packing import separate_segments
from textpolicy.training.token_logprobs import logprobs_from_logits

LossAndTokens = tuple[Float[mx.array, ""], Int[mx.array, ""]]
BatchLoss = Callable[[SFTBatch], LossAndTokens]
SFTLoss = Callable[..., tuple[mx.array, mx.array]]
"""Takes (model, inputs, targets, lengths); returns a mean loss and the number of tokens in it.

The first `lengths[r]` targets of row r are real. A loss may take the keyword `mask`, which is True
on the targets to learn. A loss without `mask` is refused for data with unlearned prompts.
"""


def sft_loss(
    model: Any,
    inputs: Int[mx.array, "batch time"],
    targets: Int[mx.array, "batch time"],
    lengths: Int[mx.array, " batch"],
    *,
    mask: Bool[mx.array, "batch time"] | None = None,
) -> LossAndTokens:
    """Return the loss from all logits at once, in the form that a custom loss has."""
    if mask is None:
        mask = mx.arange(inputs.shape[1])[None, :] < lengths[:, None]
    logits = model(inputs).astype(mx.float32)
    count = mx.sum(mask)
    return mx.sum(nn.losses.cross_entropy(logits, targets) * mask) / count, count


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Generator[None]:
    """Put the model into training or evaluation mode until the block ends."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def make_batch_loss(model: nn.Module, custom: SFTLoss | None) -> BatchLoss:
    """Return the user's loss, or else a loss that computes logits for learned tokens only."""
    if custom is not None:
        return _make_custom_loss(model, custom)
    with in_mode(model, training=False):
        head = find_output_head(model)
    logprobs = head.logprobs if head else logprobs_from_logits

    def batch_loss(batch: SFTBatch) -> LossAndTokens:
        network = separate_segments(head.body if head else model, model, batch.segments)
        with one_pass():
            outputs = network(batch.inputs)
        read = outputs.reshape(-1, outputs.shape[-1])[batch.learned]
        tokens = batch.targets.flatten()[batch.learned]
        logp, _ = logprobs(read, tokens, mx.ones(len(tokens)))
        return -mx.mean(logp), mx.array(len(tokens))

    return batch_loss


def _make_custom_loss(model: nn.Module, loss: SFTLoss) -> BatchLoss:
    takes_mask = "mask" in inspect.signature(loss).parameters

    def batch_loss(batch: SFTBatch) -> LossAndTokens:
        keywords = {"mask": batch.mask} if takes_mask else {}
        if not takes_mask and len(batch.learned) < int(batch.lengths.sum()):
            raise ConfigError(
                "the loss takes (model, inputs, targets, lengths), which do not tell prompts from "
                "answers, and the data has both. Learn everything (Encoding(learn='everything')), "
                "or let the loss take the keyword `mask`"
            )
        network = separate_segments(model, model, batch.segments)
        return _check_loss_and_tokens(
            loss(network, batch.inputs, batch.targets, batch.lengths, **keywords)
        )

    return batch_loss


def _check_loss_and_tokens(answer: object) -> tuple[mx.array, mx.array]:
    """Return what a user's loss returned. Raise if it is not a mean and a number of tokens."""
    parts = cast(tuple[object, ...], answer) if isinstance(answer, tuple) else ()
    loss, tokens = parts if len(parts) == 2 else (None, None)
    tokens = mx.array(tokens) if isinstance(tokens, int) else tokens
    if (
        isinstance(loss, mx.array)
        and isinstance(tokens, mx.array)
        and loss.ndim == tokens.ndim == 0
    ):
        return loss, tokens
    raise TrainingError(
        f"the loss returned {_describe(answer)}; expected a pair of scalars, the mean loss of the "
        "batch and the number of tokens in this mean: "
        "`return (each * mask).sum() / mask.sum(), mask.sum()`"
    )


def _describe(value: object) -> str:
    """Return a description without values, because an array may not be evaluated yet."""
    if isinstance(value, mx.array):
        return f"an array of the shape {value.shape}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_describe, cast(tuple[object, ...], value)))})"
    return repr(value)[:60]
