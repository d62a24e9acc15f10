"""One policy-gradient update: groups in, moved weights and metrics out."""

import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from textpolicy.adapters.container import AdapterContainer
from textpolicy.buffer import Buffer
from textpolicy.errors import ConfigError, TrainingError
from textpolicy.training.batch import check_scorable, micro_batches, score_rows
from textpolicy.training.logprobs import batch_logps, can_share_prompts
from textpolicy.types import AdvantageFn, Batch, LossFn, Metrics, RolloutGroup

# Nats per token. float32 agrees to 1e-5 and bfloat16 to a few hundredths; a prompt that was
# templated twice, or sampled from other weights, is far above.
MISMATCH_LIMIT = 0.1
# Steps without a single reward before the run is stopped.
UNSCORED_LIMIT = 10


class Trainer:
    """Model + advantage function + loss function + optimizer; only trainable weights move.

    `micro_batch_size` bounds memory and does not change the update. If the model carries adapters,
    every update makes a new adapter version, which is published where their set-up says.
    """

    def __init__(
        self,
        model: nn.Module,
        advantage_fn: AdvantageFn,
        loss_fn: LossFn,
        optimizer: optim.Optimizer,
        *,
        micro_batch_size: int | None = None,
        max_grad_norm: float = 1.0,
    ) -> None:
        _check_options(model, micro_batch_size, max_grad_norm)
        self.model = model
        self.advantage_fn = advantage_fn
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.micro_batch_size = micro_batch_size
        self.max_grad_norm = max_grad_norm
        self.adapters = AdapterContainer.of(model)
        if self.adapters and self.adapters.config.dropout > 0:
            raise ConfigError(
                f"adapter dropout is {self.adapters.config.dropout}; expected 0 for policy "
                "gradients: the trainer must score with the very network that sampled"
            )
        self._share_prompts = can_share_prompts(model)
        self._updates = 0
        self._unscored = 0
        self._value_and_grad = nn.value_and_grad(model, self._objective)

    @property
    def version(self) -> int:
        """The adapters' version. Weights without adapters have none: 0, as policies report it."""
        return self.adapters.version if self.adapters else 0

    @property
    def published(self) -> Path:
        """The file that holds the current version for policies to reload."""
        if self.adapters is None or self.adapters.publish_path is None:
            raise ConfigError(
                "the trainer publishes no adapters, so a policy on other arrays cannot follow it: "
                "set the adapters' publish_path (create_lora_setup(..., adapter_save_path=...)), "
                "or sample from the trainer's own model"
            )
        return self.adapters.publish_path

    def train(self, groups: Sequence[RolloutGroup] | Buffer) -> Metrics:
        """Take one optimizer step on `groups`, or on all that a buffer holds and is fresh."""
        if isinstance(groups, Buffer):
            groups = groups.take(self.version)
        if not groups:
            raise TrainingError("no rollout groups to train on: collect some first")
        check_scorable(groups)
        rows = score_rows(groups, self.advantage_fn)
        if not rows:
            return self._without_rewards()
        self._unscored = 0
        gradient, metrics = self._gradient(micro_batches(rows, self.micro_batch_size))
        self._check_sampler(groups, metrics)
        has_signal = any(row.advantage != 0 for row in rows)
        return metrics | self._update(gradient, has_signal)

    def _objective(self, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        logp, entropy = batch_logps(self.model, batch, share_prompts=self._share_prompts)
        loss, metrics = self.loss_fn(logp, batch)
        difference = mx.where(batch.mask, mx.abs(logp - batch.logp_old), 0)
        return loss, metrics | {
            "loss": loss,
            "entropy": mx.where(batch.mask, entropy, 0).sum() / batch.token_count,
            "sampling/sampling_logp_difference/mean": difference.sum() / batch.token_count,
            "sampling/sampling_logp_difference/max": difference.max(),
        }

    def _gradient(self, batches: Sequence[Batch]) -> tuple[Any, Metrics]:
        """The gradient and metrics of the whole batch, one micro-batch in memory at a time."""
        gradient: Any = None
        metrics: Metrics = {}
        for batch in batches:
            (_, part), grads = self._value_and_grad(batch)
            gradient = grads if gradient is None else tree_map(mx.add, gradient, grads)
            mx.eval(gradient, part)
            for name, value in part.items():
                combine = max if name.endswith("/max") else operator.add
                metrics[name] = combine(metrics.get(name, 0.0), float(value))
        return gradient, metrics

    def _update(self, gradient: Any, has_signal: bool) -> Metrics:
        norm = _global_norm(gradient)
        report = self._report(norm)
        if norm == 0 and has_signal and self._updates == 0:
            raise TrainingError(
                "advantages differ but the gradient is exactly zero: the loss does not depend on "
                "the trainable weights. Check that loss_fn uses the `logp` it is given"
            )
        # Adam moves on its momentum even where the gradient is zero, and never forgets a NaN.
        if norm == 0 or not math.isfinite(norm):
            return report
        scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
        before = self.model.trainable_parameters()
        self.optimizer.update(self.model, tree_map(lambda g: g * scale, gradient))
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        if self._updates == 0:
            self._check_movement(before)
        self._updates += 1
        if self.adapters:
            self.adapters.advance()
            if self.adapters.publish_path:
                self.adapters.publish()
        return report

    def _without_rewards(self) -> Metrics:
        """The report of a step in which the reward function declined to score every sample."""
        self._unscored += 1
        if self._unscored == UNSCORED_LIMIT:
            raise TrainingError(
                f"the reward function returned None for every sample of {UNSCORED_LIMIT} steps in "
                "a row: nothing can be learned. Return a number for what you want to compare"
            )
        return self._report(norm=0.0)

    def _report(self, norm: float) -> Metrics:
        return {
            "grad_norm": norm,
            "learning_rate": float(self.optimizer.learning_rate),
            "update_skipped/not_finite": float(not math.isfinite(norm)),
            "update_skipped/no_signal": float(norm == 0),
        }

    def _check_sampler(self, groups: Sequence[RolloutGroup], metrics: Metrics) -> None:
        mismatch = metrics["sampling/sampling_logp_difference/mean"]
        on_policy = all(group.version == self.version for group in groups)
        if on_policy and mismatch > MISMATCH_LIMIT:
            raise TrainingError(
                "recorded and recomputed log-probabilities of one version differ by "
                f"{mismatch:.3f} nats a token; expected at most {MISMATCH_LIMIT}. The rollouts "
                "come from another model, other adapters or another prompt than the trained one"
            )

    def _check_movement(self, before: Any) -> None:
        old, new = leaves(before), leaves(self.model.trainable_parameters())
        if all(mx.array_equal(old[name], new[name]) for name in new):
            rate = float(self.optimizer.learning_rate)
            raise TrainingError(
                "the first update moved no weight although the gradient is not zero; the learning "
                f"rate is {rate:g}: expected one large enough to change the weights, and no "
                "schedule that starts at 0"
            )


def _check_options(model: nn.Module, micro_batch_size: int | None, max_grad_norm: float) -> None:
    if not leaves(model.trainable_parameters()):
        raise ConfigError(
            "the model has no trainable weights: apply adapters (create_lora_setup) or unfreeze it"
        )
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ConfigError(f"micro_batch_size is {micro_batch_size}; expected at least 1, or None")
    if not max_grad_norm > 0:
        raise ConfigError(f"max_grad_norm is {max_grad_norm}; expected above 0 (inf is no limit)")


def _global_norm(gradient: Any) -> float:
    squares = [mx.square(g.astype(mx.float32)).sum() for g in leaves(gradient).values()]
    return float(mx.sqrt(mx.stack(squares).sum()))


def leaves(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree of parameters by their dotted names."""
    return dict(tree_flatten(tree))
