"""Corrects the time that a run has announced, once its first steps are measured."""

from collections.abc import Callable
from statistics import median

from textpolicy.planning.time_plan import TimePlan

# The first step also prepares the model.
_SKIPPED, _MEASURED = 1, 3


class AnnouncedTime:
    """Tells `note` once how long the run takes, if its first steps show that `plan` was far off."""

    def __init__(self, plan: TimePlan | None, note: Callable[[str], None]) -> None:
        self._plan = plan
        self._note = note
        self._seconds: list[float] = []

    def step_ended(self, seconds: float, steps_left: int) -> None:
        """Take the time of a finished step of this process."""
        if self._plan is None or len(self._seconds) == _SKIPPED + _MEASURED:
            return
        self._seconds.append(seconds)
        if len(self._seconds) == _SKIPPED + _MEASURED:
            measured = median(self._seconds[_SKIPPED:])
            if text := self._plan.correction(measured, steps_left):
                self._note(text)
