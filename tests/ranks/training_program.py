"""A program that each rank runs: it trains a tiny model and writes what came out to a file."""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from tests.tiny import qwen3_model
from tests.training.rows import groups_of
from tests.training.trainers import change_rollouts
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.adapters.adapter import digest_of
from textpolicy.adapters.quantization.quantize import quantize
from textpolicy.algorithms import dapo
from textpolicy.errors import TrainingError
from textpolicy.ranks import ALONE, Ranks, join_ranks
from textpolicy.training.trainer import Trainer
from textpolicy.types import Batch, RolloutGroup


def _groups(*shapes: tuple[int, list[int]]) -> list[RolloutGroup]:
    # Of no version that a trainer here reaches: a sampler's log-probabilities would be checked.
    return change_rollouts(groups_of(*shapes, vocabulary=96), lambda r, m: {"version": 99})


# Most tokens are in the first group, which is cut between the ranks.
RAGGED = _groups((9, [40, 25, 31, 18]), (4, [2, 2, 5]), (1, [6, 4, 2]), (3, [1, 9]))
# One micro-batch, which only one of two ranks gets.
SMALL = _groups((2, [3, 2]))
MESSAGES = [b"", b"short", bytes(range(256)) * 40]


class RecordingAdam(optim.AdamW):
    """Keeps the gradient of the first update."""

    first: Any = None

    def update(self, model: nn.Module, gradients: Any) -> None:
        if self.first is None:
            self.first = [np.array(value).ravel() for _, value in tree_flatten(gradients)]
        super().update(model, gradients)


def trainer_of(ranks: Ranks, bits: int | None, **options: Any) -> Trainer:
    """Return a trainer of a tiny model, whose base is quantized to `bits`, if that is a number."""
    model = qwen3_model(seed=3)
    if bits:
        quantize(model, bits=bits, group_size=32)
    adapters = AdapterContainer.from_model(model, AdapterConfig(rank=4, scale=2.0))
    key = mx.random.key(1)
    adapters.swap(
        {n: mx.random.normal(v.shape, key=key) * 0.05 for n, v in adapters.parameters().items()},
        version=0,
    )
    given: dict[str, Any] = {"loss_fn": dapo.policy_loss, "max_grad_norm": float("inf")} | options
    optimizer = RecordingAdam(1e-3, bias_correction=True)
    return Trainer(model, dapo.compute_advantages, optimizer=optimizer, ranks=ranks, **given)


def gradient_of(ranks: Ranks, bits: int | None, groups: list[RolloutGroup]) -> list[float]:
    """Return the gradient of the first update on these groups."""
    trainer = trainer_of(ranks, bits)
    trainer.train(groups)
    return np.concatenate(trainer.optimizer.first).tolist()


def digest(trainer: Trainer) -> str:
    return digest_of(dict(tree_flatten(trainer.model.trainable_parameters())))


def five_steps(ranks: Ranks, bits: int | None) -> dict[str, Any]:
    """Train five steps with every part of the trainer that ranks divide."""
    options = {"old_logprobs": "fresh", "reference": "base", "reward_kl": 0.05, "mini_batches": 2}
    trainer = trainer_of(ranks, bits, **options)
    metrics = [trainer.train(RAGGED) for _ in range(5)]
    numbers = [{n: v for n, v in m.items() if not n.startswith("time/")} for m in metrics]
    weights = [np.array(v).ravel() for _, v in tree_flatten(trainer.model.trainable_parameters())]
    return {
        "metrics": numbers,
        "digest": digest(trainer),
        "weights": np.concatenate(weights).tolist(),
    }


def not_finite(ranks: Ranks) -> dict[str, Any]:
    """Train with a loss that is NaN on the rows of the second group only."""

    def loss(logp: mx.array, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        value, metrics = dapo.policy_loss(logp, batch)
        return value + mx.where((batch.group == 1).any(), mx.nan, 0.0) * logp.sum(), metrics

    trainer = trainer_of(ranks, None, loss_fn=loss)
    before = digest(trainer)
    metrics = trainer.train(RAGGED)
    return {"skipped": metrics["update_skipped/not_finite"], "same": before == digest(trainer)}


def naive_mean(ranks: Ranks) -> list[float]:
    """Return the mean over ranks of gradients that each rank has normalised by its own tokens."""
    own = [RAGGED[number] for number in ranks.own_part(len(RAGGED))]
    gradient = mx.array(gradient_of(ALONE, None, own))
    return (np.array(ranks.sum_arrays([gradient])[0]) / ranks.size).tolist()


def complaint(ranks: Ranks, digest: str) -> str:
    """Return the error about ranks whose digests differ, or "" if they are equal."""
    try:
        ranks.require_equal(digest, "the weights")
    except TrainingError as error:
        return str(error)
    return ""


def results(ranks: Ranks) -> dict[str, Any]:
    """Return everything that the tests compare, as JSON values."""
    small = trainer_of(ranks, None)
    return {
        "size": ranks.size,
        "gradients": {str(bits): gradient_of(ranks, bits, RAGGED) for bits in (None, 4)},
        "naive": naive_mean(ranks),
        "five": {str(bits): five_steps(ranks, bits) for bits in (None, 4)},
        "nan": not_finite(ranks),
        "small": small.train(SMALL)["grad_norm"],
        "gathered": [
            list(map(len, ranks.gather(MESSAGES[ranks.rank :: ranks.size][0]))) for _ in "ab"
        ],
        "first": [list(ranks.send_first(one if ranks.is_first else b"?")) for one in MESSAGES],
        "complaints": [complaint(ranks, "same"), complaint(ranks, str(ranks.rank))],
        "any": [ranks.any(ranks.rank == ranks.size - 1), ranks.any(False)],
        "sums": [
            a.tolist() for a in ranks.sum_arrays([mx.ones((2, 2)), mx.array([ranks.rank + 1.0])])
        ],
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    joined = join_ranks(deadline=120)
    (folder / f"{joined.rank}.json").write_text(json.dumps(results(joined)))
