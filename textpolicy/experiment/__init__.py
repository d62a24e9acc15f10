"""A run from its config: directory, evaluation, tracking, checkpoints, best adapter, report."""

from textpolicy.experiment.events import Measurement, RunEvent, RunResult
from textpolicy.experiment.run import run

__all__ = ["Measurement", "RunEvent", "RunResult", "run"]
