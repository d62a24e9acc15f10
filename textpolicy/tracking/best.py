"""The best adapter of a run so far, in a file of its own."""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.files.adapter_file import read_adapter_file, write_adapter_file
from textpolicy.errors import AdapterError
from textpolicy.tracking.alarms import REWARD
from textpolicy.types import Metrics


class BestAdapter:
    """Keeps in `path` the adapter with the highest value: measured, or sampled in training.

    `record_evaluation` takes a value of the present adapter. `record_step` takes the reward of a
    step: the value is the mean over the last `window` steps, and it belongs to the adapter that
    sampled the last of these steps, before its update. When a run collapses, the file therefore
    holds an adapter from before the collapse. `max_staleness` says how many versions before the
    present one workers may have sampled with; so many adapters are held in memory.
    """

    def __init__(
        self, adapters: AdapterContainer, path: Path, window: int = 10, max_staleness: int = 0
    ) -> None:
        self._adapters = adapters
        self._recent = deque([adapters.adapter()], maxlen=max_staleness + 1)
        self._rewards: deque[float] = deque(maxlen=window)
        self.path = path
        self.value = float("-inf")
        self.version = self._recent[-1].version
        if not path.exists():
            # A resumed run has one.
            write_adapter_file(path, self._recent[-1])

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON values."""
        return {"value": self.value, "version": self.version, "rewards": list(self._rewards)}

    def restore(self, state: Mapping[str, Any], kept: Path | None = None) -> bool:
        """Continue from a `state()`; return whether its adapter is in the file, or in `kept`.

        If it is in neither, the file gets the present adapter, and the next value is the best.
        """
        self._recent.append(self._adapters.adapter())
        self._rewards.extend(state["rewards"])
        for path in filter(None, (self.path, kept)):
            adapter = _read(path)
            if adapter and adapter.version == state["version"]:
                self.value, self.version = state["value"], state["version"]
                if path != self.path:
                    write_adapter_file(self.path, adapter)
                return True
        # The file is damaged, or newer than the checkpoint, whose run has not measured it.
        self.path.unlink(missing_ok=True)
        write_adapter_file(self.path, self._recent[-1])
        return False

    def record_step(self, metrics: Metrics, sampled_with: int | None = None) -> bool:
        """Take the metrics of a step, after its update; return whether it sampled the best mean.

        `sampled_with` is the oldest version that sampled the step's rewards, by default the version
        before the update.
        """
        better = False
        if REWARD in metrics:
            self._rewards.append(metrics[REWARD])
            if better := (mean := fmean(self._rewards)) > self.value:
                versions = [one for one in self._recent if one.version == sampled_with]
                adapter = versions[0] if versions else self._recent[-1]
                self.value, self.version = mean, adapter.version
                write_adapter_file(self.path, adapter)
        self._recent.append(self._adapters.adapter())
        return better

    def record_evaluation(self, value: float, *, latest_of_equals: bool = False) -> bool:
        """Take a value of the adapter as it is now; return whether it is the best so far.

        Of equal values the first one is the best, or with `latest_of_equals` the last one.
        """
        if better := value > self.value or (latest_of_equals and value == self.value):
            adapter = self._adapters.adapter()
            self.value, self.version = value, adapter.version
            write_adapter_file(self.path, adapter)
        return better


def _read(path: Path) -> Adapter | None:
    """Return the adapter of a file, or None if the file is missing or damaged."""
    try:
        return read_adapter_file(path)
    except AdapterError:
        return None
