"""The trainer: policy-gradient updates on rollout groups."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from textpolicy import fast_cpu
from textpolicy.activity import doing
from textpolicy.adapters.container import AdapterContainer
from textpolicy.buffer import Buffer
from textpolicy.errors import ConfigError, TrainingError
from textpolicy.fast_cpu.bfloat16_copies import keep_copies
from textpolicy.file_writing import atomic_replace, make_private_folder
from textpolicy.machine import most_copied_bytes
from textpolicy.ranks import ALONE, Ranks
from textpolicy.training.advantages import add_advantages, advantages_by_group, requested_keywords
from textpolicy.training.batch import (
    BatchTotals,
    TrainingRow,
    check_usable_for_training,
    make_batch,
    split_into_micro_batches,
    split_into_mini_batches,
    training_rows,
)
from textpolicy.training.checkpoint import (
    check_base,
    restore_training_tensors,
    training_tensors,
)
from textpolicy.training.dealing import DealtParts, deal_micro_batches
from textpolicy.training.gradient_accumulation import accumulate_gradient
from textpolicy.training.logprobs import ModelLogprobs, add_logprobs
from textpolicy.training.metrics import (
    advantage_metrics,
    average_updates,
    policy_metrics,
    sum_micro_batches,
)
from textpolicy.training.trainer_checks import (
    SamplerCheck,
    StalledSteps,
    check_differentiable,
    check_gradient,
    check_movement,
)
from textpolicy.types import (
    NOT_SAMPLED,
    AdvantageFn,
    Batch,
    LossFn,
    Metrics,
    RolloutGroup,
    check_fields,
)

_MISMATCH = "sampling/sampling_logp_difference/mean"
# Rows that show how far the first update moved log-probabilities.
_MOVE_ROWS = 16


@dataclass(eq=False)
class Trainer:
    """Trains a model's adapters, or its other trainable weights, by policy gradients.

    A call of `train` takes one update on its groups. With `mini_batches`, the groups are dealt to
    several updates; with `epochs`, all groups are used again. If the model has adapters, each call
    that moves them makes a new adapter version and writes it to the adapters' `publish_path`.
    """

    model: nn.Module
    advantage_fn: AdvantageFn
    loss_fn: LossFn
    optimizer: optim.Optimizer
    _: KW_ONLY
    micro_batch_size: int | None = None
    """Rows in memory at once; the update does not depend on this number. None takes whole groups,
    as many as fit into the `micro_batch_tokens` of `DeviceSizes`."""
    checkpoint_gradients: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same update."""
    skip_without_advantages: bool = False
    """Skip the backward pass of each micro-batch whose advantages are all 0. Set this to True only
    if the gradient of the loss is 0 there: a KL term or an entropy bonus has a gradient."""
    max_grad_norm: float = 1.0
    mini_batches: int = 1
    epochs: int = 1
    old_logprobs: Literal["recorded", "fresh"] = "recorded"
    """The denominator of ratios: log-probabilities that the sampler recorded, or those that the
    trainer computes before the first update."""
    reference: nn.Module | Literal["base"] | None = None
    """The reference policy: the model without its adapters ("base"), or another model with the same
    vocabulary, for example a teacher."""
    reward_kl: float = 0.0
    """Subtracted from a reward for each nat by which the rollout diverges from the reference."""
    truncated: Literal["keep", "mask"] = "keep"
    """Whether completions that reached the length limit are part of the loss. Their rewards are
    part of the group's baseline in both cases."""
    rejected: Path | None = None
    """The folder for batches whose gradient was not finite."""
    seed: int = 0
    ranks: Ranks = ALONE
    """The processes that train this model together. Each computes the gradient of some rows, and
    all take the same update, so `train` must be called with the same groups on each."""

    def __post_init__(self) -> None:
        fast_cpu.enable()
        # Last digits depend on the copies, so a process that does not sample has them too.
        keep_copies(self.model, most_copied_bytes())
        self.adapters = AdapterContainer.of(self.model)
        self._check_options()
        check_differentiable(self.model)
        self._logprobs = ModelLogprobs.of(self.model)
        self._reference_logprobs = self._logprobs
        if isinstance(self.reference, nn.Module):
            self._reference_logprobs = ModelLogprobs.of(self.reference)
        self._keywords = requested_keywords(self.advantage_fn)
        self._sampler = SamplerCheck()
        self._stalled = StalledSteps()
        self._shuffle = Random(self.seed)
        self._updates = 0
        self.advantages: list[list[float | None]] = []
        """Of the last call of `train`, by group and member; None is not part of the loss."""

    @doing("training", begins=True)
    def train(self, groups: Sequence[RolloutGroup] | Buffer) -> Metrics:
        """Take the updates on the groups, or on all fresh groups of a buffer; return metrics."""
        if isinstance(groups, Buffer):
            groups = groups.take(self.version)
        if not groups:
            raise TrainingError("there are no rollout groups to train on; collect some first")
        check_usable_for_training(groups)
        started = time.perf_counter()
        rows = training_rows(groups, exclude_truncated=self.truncated == "mask")
        self._stalled.count("reward", missing=not rows)
        if rows:
            rows = self._add_logprobs(rows)
            rows = add_advantages(
                rows,
                self.advantage_fn,
                self._keywords,
                self.reward_kl,
                group_size=max(len(group.rollouts) for group in groups),
            )
        self.advantages = advantages_by_group(groups, rows)
        if not rows:
            return self._update_metrics(norm=0.0)
        ready = time.perf_counter()
        updates_before = self._updates
        metrics = self._take_updates(rows, groups)
        updated = time.perf_counter()
        if self.adapters and self._updates > updates_before:
            self.adapters.advance()
            if self.adapters.publish_path:
                self.adapters.publish()
        return metrics | {
            "time/publish": time.perf_counter() - updated,
            "time/logprobs": ready - started,
            "time/update": updated - ready,
        }

    def _add_logprobs(self, rows: list[TrainingRow]) -> list[TrainingRow]:
        """Return the rows with fresh and reference log-probabilities, where options need them."""
        policy = self._logprobs if self.old_logprobs == "fresh" else None
        reference = self._reference_logprobs if self.reference else None
        compute = partial(add_logprobs, micro_batch_size=self.micro_batch_size, ranks=self.ranks)
        if self.reference != "base":
            return compute(rows, policy=policy, reference=reference)
        rows = compute(rows, policy=policy)
        assert self.adapters is not None
        with self.adapters.disabled():
            return compute(rows, reference=reference)

    def _take_updates(self, rows: list[TrainingRow], groups: Sequence[RolloutGroup]) -> Metrics:
        """Take all updates on these rows, and return their metrics together."""
        first_call = self._updates == 0
        updates: list[Metrics] = []
        for _ in range(self.epochs):
            for batch in split_into_mini_batches(rows, self.mini_batches, self._shuffle):
                gradient, metrics = self._compute_gradient(batch)
                if not updates:
                    self._check_sampler(batch, metrics[_MISMATCH])
                has_signal = any(row.has_signal for row in batch)
                updates.append(metrics | self._apply_gradient(gradient, has_signal, groups))
        if first_call and self._updates:
            self._sampler.move = self._measure_mismatch(rows)
        sampled = any(group.version != NOT_SAMPLED for group in groups)
        metrics = average_updates(updates, with_sampler=sampled)
        if self.adapters:
            metrics |= self.adapters.movement()
        return metrics | advantage_metrics(rows)

    def _compute_gradient(self, rows: Sequence[TrainingRow]) -> tuple[Any, Metrics]:
        """Return the gradient and the metrics of an optimizer batch."""
        totals = BatchTotals.of(rows)
        share = self._logprobs.share_prompts
        dealt = deal_micro_batches(rows, self.micro_batch_size, self.ranks, share_prompts=share)
        skip = self.skip_without_advantages
        gradient, values = accumulate_gradient(
            self.model,
            lambda part: self._loss_and_metrics(make_batch(part, totals)),
            dealt.of(self.ranks.rank),
            checkpoint=self.checkpoint_gradients,
            skip=lambda part: skip and not any(row.has_signal for row in part),
        )
        metrics = [{name: float(x) for name, x in arrays.items()} for _, arrays in values]
        return self._sum_over_ranks(gradient), self._metrics_of_ranks(dealt, metrics)

    def _sum_over_ranks(self, gradient: Any) -> Any:
        """Return the gradient of all rows: a NaN of one rank is then in the gradient of all."""
        names, arrays = zip(*tree_flatten(gradient), strict=True)
        sums = self.ranks.sum_arrays(arrays)
        return tree_unflatten(list(zip(names, sums, strict=True)))

    def _metrics_of_ranks(self, dealt: DealtParts, own: list[Metrics]) -> Metrics:
        """Return the metrics of the whole batch from those of this rank's micro-batches."""
        all_ranks = [iter(metrics) for metrics in self.ranks.gather_json(own)]
        metrics = [next(all_ranks[owner]) for owner in dealt.owners]
        has_tokens = [any(any(row.mask) for row in part) for part in dealt.parts]
        return sum_micro_batches(zip(metrics, has_tokens, strict=True))

    def _loss_and_metrics(self, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        logp, entropy = self._logprobs(batch)
        result: Any = self.loss_fn(logp, replace(batch, entropy=entropy))
        if not isinstance(result, tuple) or len(result) != 2:
            raise ConfigError(
                f"the loss function returned an object of type {type(result).__name__}; expected "
                "(loss, metrics), where metrics is a dict that may be empty"
            )
        loss, metrics = result
        return loss, {"loss": loss} | policy_metrics(logp, entropy, batch) | metrics

    def _apply_gradient(
        self, gradient: Any, has_signal: bool, groups: Sequence[RolloutGroup]
    ) -> Metrics:
        """Clip the gradient and update the weights, unless it is zero or not finite."""
        arrays = dict(tree_flatten(gradient)).values()
        squares = [mx.square(g.astype(mx.float32)).sum() for g in arrays]
        norm = float(mx.sqrt(mx.stack(squares).sum()))
        metrics = self._update_metrics(norm)
        if self._updates == 0:
            check_gradient(norm, has_signal=has_signal)
        finite = math.isfinite(norm)
        self._stalled.count("finite gradient", missing=not finite)
        if not finite and self.rejected:
            _save_rejected_batch(groups, self.rejected)
        # Adam moves weights by its momentum even if the gradient is zero, and keeps a NaN for ever.
        if norm == 0 or not finite:
            return metrics
        scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
        before = self.model.trainable_parameters()
        self.optimizer.update(self.model, tree_map(lambda g: g * scale, gradient))
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        metrics["learning_rate"] = float(self.optimizer.learning_rate)
        if self._updates == 0:
            check_movement(before, self.model.trainable_parameters(), self.optimizer)
        self._updates += 1
        return metrics

    def _update_metrics(self, norm: float) -> Metrics:
        return {
            "grad_norm": norm,
            "learning_rate": float(self.optimizer.learning_rate),
            "update_skipped/not_finite": float(not math.isfinite(norm)),
            "update_skipped/no_signal": float(norm == 0),
        }

    def _check_sampler(self, rows: Sequence[TrainingRow], mismatch: float) -> None:
        """Check the rows whose tokens are all of the current version; `mismatch` is of all rows."""
        current = [row for row in rows if row.rollout.version == self.version]
        if len(current) < len(rows):
            mismatch = self._measure_mismatch(current) if current else 0.0
        if current:
            self._sampler.check(mismatch)

    def _measure_mismatch(self, rows: Sequence[TrainingRow]) -> float:
        """Return how far a few rows' log-probabilities are from recorded ones, in nats a token."""
        part = split_into_micro_batches(rows, self.micro_batch_size or _MOVE_ROWS)[0]
        batch = make_batch(part, BatchTotals.of(part))
        logp, entropy = self._logprobs(batch)
        return float(policy_metrics(logp, entropy, batch)[_MISMATCH])

    @property
    def version(self) -> int:
        """The version of the adapters; 0 for a model without adapters."""
        return self.adapters.version if self.adapters else 0

    @property
    def published(self) -> Path:
        """The file from which policies reload the current version."""
        if self.adapters is None or self.adapters.publish_path is None:
            raise ConfigError(
                "the trainer publishes no adapters, so a policy with its own arrays cannot follow "
                "the trainer. Set the adapters' publish_path (create_lora_setup(..., "
                "adapter_save_path=...)), or sample from the trainer's own model"
            )
        return self.adapters.publish_path

    def state(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """Return what `restore` needs: tensors, and facts that JSON can hold."""
        return training_tensors(self.model, self.optimizer), {
            "base": self.adapters.fingerprint if self.adapters else None,
            "version": self.version,
            "updates": self._updates,
            "shuffle": self._shuffle.getstate(),
            "sampler": asdict(self._sampler),
            "fruitless": asdict(self._stalled),
        }

    def restore(self, tensors: Mapping[str, mx.array], facts: Mapping[str, Any]) -> None:
        """Restore a `state()`. Raise and change nothing if the state is of another model.

        The adapters are published again, because the published file may be newer than the state.
        """
        check_base(facts["base"], self.adapters.fingerprint if self.adapters else None)
        restore_training_tensors(tensors, self.model, self.optimizer)
        self._updates = facts["updates"]
        version, words, gauss = facts["shuffle"]
        self._shuffle.setstate((version, tuple(words), gauss))
        self._sampler = SamplerCheck(**facts["sampler"])
        self._stalled = StalledSteps(**facts["fruitless"])
        if self.adapters:
            self.adapters.version = facts["version"]
            if self.adapters.publish_path:
                self.adapters.publish()

    def _check_options(self) -> None:
        count = (int, lambda x: x >= 1, "a whole number, at least 1")
        check_fields(
            self,
            micro_batch_size=(int | None, lambda x: x is None or x >= 1, "at least 1, or None"),
            max_grad_norm=(int | float, lambda x: x > 0, "above 0 (inf is no limit)"),
            mini_batches=count,
            epochs=count,
            old_logprobs=(str, ("recorded", "fresh").__contains__, "'recorded' or 'fresh'"),
            truncated=(str, ("keep", "mask").__contains__, "'keep' or 'mask'"),
            reward_kl=(int | float, lambda x: 0 <= x < math.inf, "a number, 0 or more"),
        )
        if not tree_flatten(self.model.trainable_parameters()):
            raise ConfigError(
                "the model has no trainable weights. Apply adapters (create_lora_setup), or "
                "unfreeze the model"
            )
        if self.reward_kl and self.reference is None:
            raise ConfigError(
                f"reward_kl is {self.reward_kl}, and there is no reference to diverge from. Pass "
                "reference='base'"
            )
        if self.adapters and self.adapters.config.dropout > 0:
            raise ConfigError(
                f"adapter dropout is {self.adapters.config.dropout}; policy gradients need 0, "
                "because the trainer computes log-probabilities with the network that sampled. "
                "Leave dropout out of the adapter config. Adapters of a file that were trained "
                "with dropout are loaded without it by load(model, dropout=0)"
            )
        if self.reference == "base" and self.adapters is None:
            raise ConfigError(
                "reference is 'base', the model without its adapters, and the model has none. "
                "Attach adapters, or pass another model as the reference"
            )


def _save_rejected_batch(groups: Sequence[RolloutGroup], folder: Path) -> None:
    """Write each rollout with its task as a JSON line of a new file, which its owner can read."""
    make_private_folder(folder)
    path = folder / f"batch-{len(list(folder.glob('batch-*.jsonl'))):04d}.jsonl"
    lines = (
        json.dumps({"task": group.task.id} | asdict(rollout))
        for group in groups
        for rollout in group.rollouts
    )
    with atomic_replace(path, private=True) as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
