"""StepTimer: the seconds and the peak memory of each phase of a training step."""

import time

import mlx.core as mx

from textpolicy.fast_cpu.bfloat16_copies import copied_bytes
from textpolicy.types import Metrics


class StepTimer:
    """Measures the phases of one step, from the moment that it is made."""

    def __init__(self) -> None:
        mx.reset_peak_memory()
        self._started = self._last = time.perf_counter()
        self._seconds: Metrics = {}
        self._peaks: Metrics = {}

    def record(self, name: str) -> None:
        """Add the time since the last phase ended to phase `name`, and keep the highest peak."""
        now = time.perf_counter()
        seconds, peak = f"time/{name}", f"memory/peak_{name}_gb"
        self._seconds[seconds] = self._seconds.get(seconds, 0.0) + now - self._last
        self._last = now
        used = mx.get_peak_memory() + copied_bytes()
        self._peaks[peak] = max(self._peaks.get(peak, 0.0), used / 1e9)
        mx.reset_peak_memory()

    def metrics(self, *, reward_seconds: float) -> Metrics:
        """Return the seconds of the phases, and the peaks of sampling, of training and of all.

        `reward_seconds` were spent on rewards while this process sampled. A step that waited for
        workers reports the share of the wait.
        """
        total = self._last - self._started
        metrics = self._seconds | {"time/step": total}
        if "time/generate" in metrics:
            metrics["time/generate"] -= reward_seconds
            metrics["time/reward"] = reward_seconds
        if "time/wait" in metrics:
            metrics["trainer/idle"] = metrics["time/wait"] / total
        peaks = {n: p for n, p in self._peaks.items() if n.endswith(("generate_gb", "train_gb"))}
        return metrics | peaks | {"memory/peak_gb": max(self._peaks.values())}
