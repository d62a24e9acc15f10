"""The best adapter of a run so far, in a file of its own: by evaluation, or by what it sampled."""

from collections import deque
from pathlib import Path
from statistics import fmean

from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.files.adapter_file import write_adapter_file
from textpolicy.tracking.alarms import REWARD
from textpolicy.types import Metrics


class BestAdapter:
    """Keeps in `path` the adapter that sampled the last step of the best rolling mean reward.

    An update is judged by what is sampled with it, a step later: at the first sign of ruin, the
    adapter of the step before is still the one to keep.
    """

    def __init__(self, adapters: AdapterContainer, path: Path, window: int = 10) -> None:
        self._adapters = adapters
        self._sampled_with = adapters.adapter()
        self._rewards: deque[float] = deque(maxlen=window)
        self.path = path
        self.reward = float("-inf")
        self.version = self._sampled_with.version
        if not path.exists():
            # A run that goes on has one.
            write_adapter_file(path, self._sampled_with)
        self._replayed = 0.0

    def replay(self, metrics: Metrics, *, evaluated: bool) -> None:
        """Take the row of a step that an earlier process made, whose best file is there."""
        if evaluated:
            reward = metrics.get("eval/reward", float("-inf"))
        else:
            self._rewards += [metrics[REWARD]] if REWARD in metrics else []
            reward = fmean(self._rewards) if REWARD in metrics else float("-inf")
        if reward > self.reward:
            self.reward, self.version = reward, int(self._replayed)
        self._replayed = metrics.get("version", self._replayed)

    def see(self, metrics: Metrics) -> None:
        """To be called after each step, when its update is made."""
        if REWARD in metrics:
            self._rewards.append(metrics[REWARD])
            if (mean := fmean(self._rewards)) > self.reward:
                self.reward, self.version = mean, self._sampled_with.version
                write_adapter_file(self.path, self._sampled_with)
        self._sampled_with = self._adapters.adapter()

    def measured(self, reward: float) -> None:
        """To be called with what the adapter earned as it is now, where runs are evaluated."""
        if reward > self.reward:
            adapter = self._adapters.adapter()
            self.reward, self.version = reward, adapter.version
            write_adapter_file(self.path, adapter)
