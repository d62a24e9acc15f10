"""The best adapter of a run so far, in a file of its own."""

from collections import deque
from pathlib import Path
from statistics import fmean

from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.files.adapter_file import write_adapter_file
from textpolicy.tracking.alarms import REWARD
from textpolicy.types import Metrics


class BestAdapter:
    """Keeps in `path` the adapter with the highest value: measured, or sampled in training.

    `record_evaluation` takes a value of the present adapter. `record_step` takes the reward of a
    step: the value is the mean over the last `window` steps, and it belongs to the adapter that
    sampled the last of these steps, before its update. When a run collapses, the file therefore
    holds an adapter from before the collapse.
    """

    def __init__(self, adapters: AdapterContainer, path: Path, window: int = 10) -> None:
        self._adapters = adapters
        self._sampled_with = adapters.adapter()
        self._rewards: deque[float] = deque(maxlen=window)
        self.path = path
        self.value = float("-inf")
        self.version = self._sampled_with.version
        if not path.exists():
            # A resumed run has one.
            write_adapter_file(path, self._sampled_with)
        self._replayed = 0.0

    def restore(self, value: float, version: int) -> None:
        """Set the value of the adapter that an earlier process of the run left in the file."""
        self.value, self.version = value, version

    def replay_row(self, metrics: Metrics, *, evaluated: bool) -> bool:
        """Take the row of a step that an earlier process wrote; return whether it is the best."""
        if evaluated:
            reward = metrics.get("eval/reward", float("-inf"))
        else:
            self._rewards += [metrics[REWARD]] if REWARD in metrics else []
            reward = fmean(self._rewards) if REWARD in metrics else float("-inf")
        if better := reward > self.value:
            self.restore(reward, int(self._replayed))
        self._replayed = metrics.get("version", self._replayed)
        return better

    def record_step(self, metrics: Metrics) -> bool:
        """Take the metrics of a step, after its update; return whether it sampled the best mean."""
        better = False
        if REWARD in metrics:
            self._rewards.append(metrics[REWARD])
            if better := (mean := fmean(self._rewards)) > self.value:
                self.restore(mean, self._sampled_with.version)
                write_adapter_file(self.path, self._sampled_with)
        self._sampled_with = self._adapters.adapter()
        return better

    def record_evaluation(self, value: float) -> bool:
        """Take a value of the adapter as it is now; return whether it is the best so far."""
        if better := value > self.value:
            adapter = self._adapters.adapter()
            self.restore(value, adapter.version)
            write_adapter_file(self.path, adapter)
        return better
