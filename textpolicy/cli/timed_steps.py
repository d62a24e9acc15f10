"""The steps of a bench as they are done: kept, with threads by turns, until there are enough."""

import statistics
import time
from collections.abc import Callable, Sequence

from textpolicy import fast_cpu
from textpolicy.loop import StepReport
from textpolicy.training.batch import count_padded_tokens, split_into_micro_batches, training_rows
from textpolicy.types import Metrics, Progress, RolloutGroup

ENOUGH = 20
"""Steps with each number of threads, after which more would say the same."""
_FEW = 4
"""So many steps have to fit into the time for other numbers of threads to be tried."""
_BETWEEN_NOTES = 2.0


class TimedSteps:
    """Watches `train_rl` for about `seconds`. The first step is warm-up and is not kept, unless
    it alone took all the time.

    `threads` are numbers of threads of matrix products: the first is what the run has, and what is
    reported, the others are compared with it.
    """

    def __init__(
        self,
        seconds: float,
        threads: Sequence[int],
        note: Callable[[str], None],
        micro_batch_size: int | None = None,
        *,
        share_prompts: bool = True,
    ) -> None:
        self._seconds, self._threads, self._note = seconds, list(threads), note
        self._micro_batch_size, self._share_prompts = micro_batch_size, share_prompts
        # A number of threads that cannot be set is one to compare with nothing.
        self._kept: dict[int, list[Metrics]] = {count: [] for count in [*threads] or [0]}
        self._now = next(iter(self._kept))
        self._started = self._noted = time.perf_counter()
        self.warmed_up = False
        self.longest = (0, 0)
        """Most tokens of a prompt, and of what follows one."""

    def put_threads_back(self) -> None:
        """As many as the run has."""
        if self._threads:
            fast_cpu.set_threads(self._threads[0])

    @property
    def count(self) -> int:
        """How many steps as the run has them were kept."""
        return len(next(iter(self._kept.values())))

    @property
    def metrics(self) -> Metrics:
        """Means over those steps; the peak of memory is the highest."""
        kept = next(iter(self._kept.values()))
        means = {name: statistics.fmean(one[name] for one in kept) for name in kept[0]}
        return means | {"memory/peak_gb": max(one["memory/peak_gb"] for one in kept)}

    @property
    def seconds_by_threads(self) -> dict[int, float]:
        """The median step with each number of threads; empty where there is nothing to compare."""
        if len(self._kept) == 1:
            return {}
        return {
            count: statistics.median(one["time/step"] for one in kept)
            for count, kept in self._kept.items()
        }

    def see(self, report: StepReport) -> Progress:
        """Keep a step and choose the next one's threads."""
        left = self._seconds - (time.perf_counter() - self._started)
        seconds = report.metrics["time/step"]
        if report.step == 0 and left < _FEW * len(self._kept) * seconds:
            self._kept = {self._now: []}
        if report.step == 0 and left > seconds:
            self.warmed_up = True
        else:
            self._kept[self._now].append(_timed(report) | self._padding(report.trained))
            self._see_lengths(report.trained)
        self._tell(report.step, seconds, left)
        done = all(len(kept) >= ENOUGH for kept in self._kept.values())
        if done or (left < seconds and all(self._kept.values())):
            return Progress.STOP
        self._take_turns()
        return Progress.MORE

    def _take_turns(self) -> None:
        self._now = min(self._kept, key=lambda count: len(self._kept[count]))
        if self._threads:
            fast_cpu.set_threads(self._now)

    def _see_lengths(self, groups: Sequence[RolloutGroup]) -> None:
        rows = training_rows(groups)
        prompt, completion = self.longest
        self.longest = (
            max(prompt, *(row.prompt_length for row in rows)),
            max(completion, *(len(row.mask) for row in rows)),
        )

    def _padding(self, groups: Sequence[RolloutGroup]) -> Metrics:
        rows = training_rows(groups)
        share = self._share_prompts
        prompts = {
            row.group if share else (row.group, row.member): row.prompt_length for row in rows
        }
        tokens = sum(len(row.mask) for row in rows) + sum(prompts.values())
        parts = split_into_micro_batches(rows, self._micro_batch_size, share_prompts=share)
        places = sum(count_padded_tokens(part, share_prompts=share) for part in parts)
        return {"padding": 1 - tokens / places}

    def _tell(self, step: int, seconds: float, left: float) -> None:
        now = time.perf_counter()
        if step == 0:
            self._note(f"warm-up  {seconds:.2f} s")
        elif now - self._noted >= _BETWEEN_NOTES:
            self._noted = now
            self._note(f"step {step}  {seconds:.2f} s  {max(0.0, left):.0f} s left at most")


_TIMED = ("time/", "memory/", "completions/", "num_tokens")


def _timed(report: StepReport) -> Metrics:
    """What a step says of time, memory and lengths, and not of learning; names every step has."""
    metrics = report.metrics
    return {n: x for n, x in metrics.items() if n.startswith(_TIMED) and "terminated" not in n}
