"""One run of real_learning.py: its config, what decides its numbers, and its training."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from textpolicy.config import TrainConfig, changed
from textpolicy.evaluation import MeanReward
from textpolicy.experiment import Measurement, RunEvent, run
from textpolicy.experiment.assembly import plain_settings
from textpolicy.experiment.identity import identity_of
from textpolicy.experiment.model_defaults import with_model_defaults
from textpolicy.tracking.jsonl import read_metrics

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora4": {"model.quantize": 4},
    "nf4": {"model.quantize": 4, "model.quantize_mode": "nf4"},
    "dora": {"adapter.kind": "dora"},
    "rank1": {"adapter.rank": 1},
}
CONTROL = Path(__file__).parents[1] / "sides" / "shuffled_grpo.py"
# Options that change none of the numbers.
_FREE = (
    "tracking.",
    "evaluation.every",
    *("run.output", "run.keep", "run.checkpoint", "run.limits"),
    "model.threads",
)
_PACKAGES = ("textpolicy", "mlx", "mlx-lm")
_CURVES = {"rewards": "reward", "lengths": "completions/mean_length", "grad_norms": "grad_norm"}
_ALARMS_ABOUT_LEARNING = ("entropy", "length", "zero_std", "reward", "overfit")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A run that is trained and recorded at once. `side` is the library that trains."""

    task: str
    seed: int
    variant: str = "lora"
    side: str = "ours"
    control: bool = False

    def config(self, base: TrainConfig) -> TrainConfig:
        """Return `base` with what the unit says, and the defaults of the model for the rest."""
        values = {"task.env": self.task, "run.seed": self.seed, **VARIANTS[self.variant]}
        if self.control:
            values["algorithm.name"] = str(CONTROL)
            values["algorithm.options"] = {"seed": self.seed}
        return with_model_defaults(changed(base, values))

    def settings(self, base: TrainConfig, versions: Mapping[str, str]) -> dict[str, Any]:
        """Return everything that decides the numbers of the run, as JSON values."""
        config = self.config(base)
        given = plain_settings(config).items()
        options = {key: v for key, v in given if v is not None and not key.startswith(_FREE)}
        if self.control:
            options["algorithm.name"] = "grpo, rewards shuffled"
        return {
            "side": self.side,
            "variant": self.variant,
            "control": self.control,
            "options": options,
            "files": identity_of(config),
            "versions": {name: version(name) for name in _PACKAGES} | dict(versions),
        }


def recorded_score(measured: Measurement | MeanReward) -> dict[str, float]:
    """Return a held-out measurement as it is recorded."""
    mean = measured.reward if isinstance(measured, MeanReward) else measured.value
    return {
        "mean": round(mean, 4),
        "standard_error": round(measured.standard_error or 0.0, 4),
        "count": measured.count or 0,
    }


def train(config: TrainConfig, show: Any) -> dict[str, Any]:
    """Train as `textpolicy train` does with these options, and return what is recorded."""

    def on_event(event: RunEvent) -> None:
        show(str(event))

    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = run(config, output=Path(folder) / "run", on_event=on_event)
        rows = read_metrics(result.directory.metrics)
    assert result.before and result.after
    steps = [row for row in rows if "reward" in row]
    return {
        "before": recorded_score(result.before),
        "after": recorded_score(result.after),
        "seconds": round(result.seconds, 1),
        "cpu_seconds": round(time.process_time() - started, 1),
        "alarms": alarms_in(rows),
        "heldout_by_step": {
            str(int(r["step"])): round(r["eval/reward"], 4) for r in rows if "eval/reward" in r
        },
        **{name: rounded(row[key] for row in steps) for name, key in _CURVES.items()},
    }


def rounded(values: Any) -> list[float]:
    """Return the values of a curve as they are recorded."""
    return [round(float(value), 4) for value in values]


def alarms_in(rows: list[dict[str, float]]) -> dict[str, int]:
    """Return the alarms about learning, with the first step of each."""
    return {
        name: next(int(row["step"]) for row in rows if row.get(f"alarm/{name}"))
        for name in _ALARMS_ABOUT_LEARNING
        if any(row.get(f"alarm/{name}") for row in rows)
    }
