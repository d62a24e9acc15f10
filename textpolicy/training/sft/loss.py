"""The loss of a batch of demonstrations.

    loss = - sum of log p(token | tokens before it) / number of learned tokens

The mean is over all learned tokens of a batch, however they lie in its rows. Padding is no target.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float, Int

from textpolicy.errors import ConfigError, TrainingError
from textpolicy.training.output_head import OutputHead, find_output_head
from textpolicy.training.sft.batches import SFTBatch
from textpolicy.training.sft.packing import separate_segments
from textpolicy.training.softmax_logprobs import logprobs_from_logits

LossAndTokens = tuple[Float[mx.array, ""], Int[mx.array, ""]]


SFTLoss = Callable[..., tuple[mx.array, mx.array]]
"""(model, inputs, targets, lengths) to the mean loss of a batch and the tokens it is the mean of.

Of the targets of row r, the first `lengths[r]` are real. A loss may ask for the keyword `mask`,
True on the targets that are to be learned. Without it, it cannot tell prompts from answers, and is
given data in which everything is learned.
"""


def sft_loss(
    model: Any,
    inputs: Int[mx.array, "batch time"],
    targets: Int[mx.array, "batch time"],
    lengths: Int[mx.array, " batch"],
    *,
    mask: Bool[mx.array, "batch time"] | None = None,
) -> LossAndTokens:
    """The loss from all logits at once: to build others from, in the form that they have."""
    if mask is None:
        mask = mx.arange(inputs.shape[1])[None, :] < lengths[:, None]
    logits = model(inputs).astype(mx.float32)
    count = mx.sum(mask)
    return mx.sum(nn.losses.cross_entropy(logits, targets) * mask) / count, count


BatchLoss = Callable[[SFTBatch], LossAndTokens]


def make_batch_loss(model: nn.Module, custom: SFTLoss | None) -> BatchLoss:
    """The loss of whole batches: the user's, or one that makes logits for learned tokens only."""
    if custom is not None:
        asks_mask = "mask" in inspect.signature(custom).parameters
        return _Custom(model, custom, asks_mask=asks_mask)
    was_training = model.training
    model.eval()
    head = find_output_head(model)
    model.train(was_training)
    return _Lean(model, head)


@dataclass(frozen=True)
class _Lean:
    model: nn.Module
    head: OutputHead | None

    def __call__(self, batch: SFTBatch) -> LossAndTokens:
        network = separate_segments(
            self.head.body if self.head else self.model, self.model, batch.segments
        )
        outputs = network(batch.inputs)
        read = outputs.reshape(-1, outputs.shape[-1])[batch.learned]
        tokens = batch.targets.flatten()[batch.learned]
        logprobs = self.head.logprobs if self.head else logprobs_from_logits
        logp, _ = logprobs(read, tokens, mx.ones(len(tokens)))
        return -mx.mean(logp), mx.array(len(tokens))


@dataclass(frozen=True)
class _Custom:
    model: nn.Module
    loss: SFTLoss
    asks_mask: bool

    def __call__(self, batch: SFTBatch) -> LossAndTokens:
        asked = {"mask": batch.mask} if self.asks_mask else {}
        if not self.asks_mask and len(batch.learned) < int(batch.lengths.sum()):
            raise ConfigError(
                "the loss takes (model, inputs, targets, lengths), which do not tell prompts from "
                "answers, and the data has both: learn everything (Encoding(learn='everything')), "
                "or let the loss take the keyword `mask`"
            )
        network = separate_segments(self.model, self.model, batch.segments)
        return _pair(self.loss(network, batch.inputs, batch.targets, batch.lengths, **asked))


def _pair(answer: object) -> tuple[mx.array, mx.array]:
    """What a user's loss returned, if it is a mean and the tokens it is the mean of."""
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
        f"the loss returned {_form(answer)}; expected a pair of scalars, the mean loss of the "
        "batch and how many tokens it is the mean of: "
        "`return (each * mask).sum() / mask.sum(), mask.sum()`"
    )


def _form(value: object) -> str:
    """What it is, in words that need no value: that of an array is not known yet."""
    if isinstance(value, mx.array):
        return f"an array of the shape {value.shape}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_form, cast(tuple[object, ...], value)))})"
    return repr(value)[:60]
