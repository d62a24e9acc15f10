"""Policy-gradient updates: groups in, moved weights and metrics out."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from textpolicy import fast_cpu
from textpolicy.adapters.adapter_movement import adapter_movement
from textpolicy.adapters.container import AdapterContainer
from textpolicy.buffer import Buffer
from textpolicy.errors import ConfigError, TrainingError
from textpolicy.training import checks
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
from textpolicy.training.checkpoint import check_tensors_fit, flatten_tree, unflatten_tree
from textpolicy.training.gradient_accumulation import accumulate_gradient
from textpolicy.training.logprobs import ModelLogprobs
from textpolicy.training.metrics import (
    advantage_metrics,
    average_updates,
    policy_metrics,
    sum_micro_batches,
)
from textpolicy.training.recorded_logprobs import add_logprobs
from textpolicy.training.rejected_batches import save_rejected_batch
from textpolicy.types import (
    NOT_SAMPLED,
    AdvantageFn,
    Batch,
    LossFn,
    Metrics,
    RolloutGroup,
    StopReason,
    check_fields,
)

# Rows that show how far the first update moved.
SAMPLE = 16
_WEIGHTS, _OPTIMIZER = "weights.", "optimizer."


@dataclass(eq=False)
class Trainer:
    """Model + advantage function + loss function + optimizer; only trainable weights move.

    A call of `train` takes one update on its groups; with `mini_batches` it deals them to several,
    and with `epochs` it goes through them again. If the model carries adapters, every call that
    moved them makes a new adapter version, published where their set-up says.
    """

    model: nn.Module
    advantage_fn: AdvantageFn
    loss_fn: LossFn
    optimizer: optim.Optimizer
    _: KW_ONLY
    micro_batch_size: int | None = None
    """Rows in memory at once; changes no update. None is whole groups, as many as have about a
    thousand tokens."""
    checkpoint_gradients: bool = False
    """Compute activations again in the backward pass: less memory, more time, the same update."""
    skip_without_advantages: bool = False
    """Skip the backward pass of each micro-batch whose advantages are all 0. Set this to True only
    if the gradient of the loss is 0 there: a KL term or an entropy bonus has a gradient."""
    max_grad_norm: float = 1.0
    mini_batches: int = 1
    epochs: int = 1
    old_logprobs: Literal["recorded", "fresh"] = "recorded"
    """What ratios are taken against: what the sampler recorded, or the trainer's own score of it,
    computed before the first update."""
    reference: nn.Module | Literal["base"] | None = None
    """The model without its adapters, or another of the same vocabulary, such as a teacher."""
    reward_kl: float = 0.0
    """Taken off a reward for each nat by which the rollout diverged from the reference."""
    truncated: Literal["keep", "mask"] = "keep"
    """Whether completions cut off at the length limit are learned from; they count for the
    baseline of the others either way."""
    rejected: Path | None = None
    """Folder that keeps the batches whose gradient was not finite."""
    seed: int = 0

    def __post_init__(self) -> None:
        fast_cpu.enable()
        self._check_options()
        self.adapters = AdapterContainer.of(self.model)
        if self.adapters and self.adapters.config.dropout > 0:
            raise ConfigError(
                f"adapter dropout is {self.adapters.config.dropout}; expected 0 for policy "
                "gradients: the trainer must score with the very network that sampled. Adapters "
                "that were trained with it are loaded without: load(model, dropout=0)"
            )
        if self.reference == "base" and self.adapters is None:
            raise ConfigError(
                "reference is 'base', the model without its adapters, and the model has none: "
                "attach adapters, or pass another model as the reference"
            )
        self._read = ModelLogprobs.of(self.model)
        self._read_reference = self._read
        if isinstance(self.reference, nn.Module):
            self._read_reference = ModelLogprobs.of(self.reference)
        self._asked = requested_keywords(self.advantage_fn)
        self._sampler = checks.SamplerCheck()
        self._fruitless = checks.StalledSteps()
        self._shuffle = Random(self.seed)
        self._updates = 0
        # Of the last call of `train`, by group and member; None is not learned from.
        self.advantages: list[list[float | None]] = []

    def _check_options(self) -> None:
        whole = (int, lambda x: x >= 1, "a whole number, at least 1")
        check_fields(
            self,
            micro_batch_size=(int | None, lambda x: x is None or x >= 1, "at least 1, or None"),
            max_grad_norm=(int | float, lambda x: x > 0, "above 0 (inf is no limit)"),
            mini_batches=whole,
            epochs=whole,
            old_logprobs=(str, ("recorded", "fresh").__contains__, "'recorded' or 'fresh'"),
            truncated=(str, ("keep", "mask").__contains__, "'keep' or 'mask'"),
            reward_kl=(int | float, lambda x: 0 <= x < math.inf, "a number, 0 or more"),
        )
        if not tree_flatten(self.model.trainable_parameters()):
            raise ConfigError(
                "the model has no trainable weights: apply adapters (create_lora_setup) or "
                "unfreeze it"
            )
        if self.reward_kl and self.reference is None:
            raise ConfigError(
                f"reward_kl is {self.reward_kl} and there is no reference to diverge from; "
                "pass reference='base'"
            )

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

    def state(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """What `restore` needs: tensors, and facts that JSON can hold."""
        weights = self.model.trainable_parameters()
        # Before the first update there is no state; one that is there is left as it is.
        self.optimizer.init(weights)
        arrays = flatten_tree(_WEIGHTS, weights)
        return arrays | flatten_tree(_OPTIMIZER, self.optimizer.state), {
            "base": self.adapters.fingerprint if self.adapters else None,
            "version": self.version,
            "updates": self._updates,
            "shuffle": self._shuffle.getstate(),
            "sampler": asdict(self._sampler),
            "fruitless": asdict(self._fruitless),
        }

    def restore(self, arrays: Mapping[str, mx.array], facts: Mapping[str, Any]) -> None:
        """Go to where `state()` was taken, or change nothing if it was of another model.

        Adapters are published again: what was published since then belongs to another course.
        """
        self._check_base(facts["base"])
        check_tensors_fit(arrays, self.state()[0])
        self.model.update(unflatten_tree(_WEIGHTS, arrays))
        self.optimizer.state = unflatten_tree(_OPTIMIZER, arrays)
        self._updates = facts["updates"]
        version, words, gauss = facts["shuffle"]
        self._shuffle.setstate((version, tuple(words), gauss))
        self._sampler = checks.SamplerCheck(**facts["sampler"])
        self._fruitless = checks.StalledSteps(**facts["fruitless"])
        if self.adapters:
            self.adapters.version = facts["version"]
            if self.adapters.publish_path:
                self.adapters.publish()

    def _check_base(self, base: str | None) -> None:
        own = self.adapters.fingerprint if self.adapters else None
        if base != own:
            raise TrainingError(
                f"a checkpoint was made with a model of fingerprint {base}, this one has {own}: "
                "go on with the model, and the quantization, that the run began with"
            )

    def train(self, groups: Sequence[RolloutGroup] | Buffer) -> Metrics:
        """Take the updates on `groups`, or on all that a buffer holds and is fresh."""
        if isinstance(groups, Buffer):
            groups = groups.take(self.version)
        if not groups:
            raise TrainingError("no rollout groups to train on: collect some first")
        check_usable_for_training(groups)
        started = time.perf_counter()
        rows = self._silenced(training_rows(groups))
        self.advantages = advantages_by_group(groups, [])
        self._fruitless.see("reward", fruitless=not rows)
        if not rows:
            return self._report(norm=0.0)
        rows = self._scored(rows)
        rows = add_advantages(rows, self.advantage_fn, self._asked, self.reward_kl)
        self.advantages = advantages_by_group(groups, rows)
        ready = time.perf_counter()
        metrics = self._updated(rows, groups)
        update = time.perf_counter() - ready - metrics["time/publish"]
        return metrics | {"time/score": ready - started, "time/update": update}

    def _silenced(self, rows: list[TrainingRow]) -> list[TrainingRow]:
        if self.truncated == "keep":
            return rows
        cut = StopReason.LENGTH
        return [replace(row, silent=row.rollout.stop_reason is cut) for row in rows]

    def _scored(self, rows: list[TrainingRow]) -> list[TrainingRow]:
        """The rows with fresh and reference log-probabilities, as far as they are asked for."""
        policy = self._read if self.old_logprobs == "fresh" else None
        if self.reference != "base":
            reference = self._read_reference if self.reference else None
            return add_logprobs(rows, policy, reference, self.micro_batch_size)
        rows = add_logprobs(rows, policy, None, self.micro_batch_size) if policy else rows
        assert self.adapters is not None
        with self.adapters.disabled():
            return add_logprobs(rows, None, self._read, self.micro_batch_size)

    def _updated(self, rows: list[TrainingRow], groups: Sequence[RolloutGroup]) -> Metrics:
        """Every update that these rows are for, and what they report together."""
        first = self._updates == 0
        on_policy = checks.on_policy(groups, self.version)
        before = self._updates
        updates: list[Metrics] = []
        for _ in range(self.epochs):
            for part in split_into_mini_batches(rows, self.mini_batches, self._shuffle):
                gradient, metrics = self._gradient(part)
                if not updates:
                    self._sampler.see(metrics, on_policy=on_policy)
                has_signal = any(row.teaches for row in part)
                updates.append(metrics | self._update(gradient, has_signal, groups))
        if first and self._updates:
            self._sampler.note_move(self._distance(rows))
        started = time.perf_counter()
        if self._updates > before:
            self._publish()
        published = {"time/publish": time.perf_counter() - started}
        known = any(group.version != NOT_SAMPLED for group in groups)
        metrics = average_updates(updates, with_sampler=known)
        return metrics | self._movement() | advantage_metrics(rows) | published

    def _objective(self, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        logp, entropy = self._read(batch)
        loss, metrics = self.loss_fn(logp, replace(batch, entropy=entropy))
        return loss, {"loss": loss} | policy_metrics(logp, entropy, batch) | metrics

    def _gradient(self, rows: Sequence[TrainingRow]) -> tuple[Any, Metrics]:
        """Return the gradient and the metrics of an optimizer batch."""
        totals = BatchTotals.of(rows)
        share = self._read.share_prompts
        parts = split_into_micro_batches(rows, self.micro_batch_size, share_prompts=share)
        gradient, values = accumulate_gradient(
            self.model,
            lambda part: self._objective(make_batch(part, totals)),
            parts,
            checkpoint=self.checkpoint_gradients,
            skip=lambda part: self.skip_without_advantages and not any(r.teaches for r in part),
        )
        reports = [{name: float(x) for name, x in report.items()} for _, report in values]
        counts = [any(any(row.mask) for row in part) for part in parts]
        return gradient, sum_micro_batches(zip(reports, counts, strict=True))

    def _update(self, gradient: Any, has_signal: bool, groups: Sequence[RolloutGroup]) -> Metrics:
        norm = gradient_norm(gradient)
        report = self._report(norm)
        if self._updates == 0:
            checks.check_gradient(norm, has_signal=has_signal)
        finite = math.isfinite(norm)
        self._fruitless.see("finite gradient", fruitless=not finite)
        if not finite and self.rejected:
            save_rejected_batch(groups, self.rejected)
        # Adam moves on its momentum even where the gradient is zero, and never forgets a NaN.
        if norm == 0 or not finite:
            return report
        scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
        before = self.model.trainable_parameters()
        self.optimizer.update(self.model, tree_map(lambda g: g * scale, gradient))
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        if self._updates == 0:
            checks.check_movement(before, self.model.trainable_parameters(), self.optimizer)
        self._updates += 1
        return report

    def _publish(self) -> None:
        if self.adapters:
            self.adapters.advance()
            if self.adapters.publish_path:
                self.adapters.publish()

    def _distance(self, rows: Sequence[TrainingRow]) -> float:
        """How far a few rows' log-probabilities are from those recorded, in nats a token."""
        part = split_into_micro_batches(rows, self.micro_batch_size or SAMPLE)[0]
        batch = make_batch(part, BatchTotals.of(part))
        logp, entropy = self._read(batch)
        return float(policy_metrics(logp, entropy, batch)[checks.MISMATCH])

    def _movement(self) -> Metrics:
        return adapter_movement(self.adapters) if self.adapters else {}

    def _report(self, norm: float) -> Metrics:
        return {
            "grad_norm": norm,
            "learning_rate": float(self.optimizer.learning_rate),
            "update_skipped/not_finite": float(not math.isfinite(norm)),
            "update_skipped/no_signal": float(norm == 0),
        }


def gradient_norm(gradient: Any) -> float:
    """The Euclidean norm over all arrays of a gradient."""
    arrays = dict(tree_flatten(gradient)).values()
    squares = [mx.square(g.astype(mx.float32)).sum() for g in arrays]
    return float(mx.sqrt(mx.stack(squares).sum()))
