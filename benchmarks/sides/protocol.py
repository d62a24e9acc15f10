"""How one side of a comparison talks to the script that runs it. Standard library only.

A side runs in an environment of its own. It announces itself when it is ready, takes one step for
each line that it reads, and answers with the seconds of that step; when the lines end, with the
most memory that it took.
"""

import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

# Libraries print what they like; the answers have the real standard output for themselves.
_ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def read_task() -> dict[str, Any]:
    """The task that both sides do: model folder, prompts, sizes and options."""
    return json.loads(Path(sys.argv[1]).read_text())


def reward_of(text: str) -> float:
    """The share of even numbers: cheap, and hardly ever equal in a whole group."""
    numbers = [int(word[1:]) for word in text.split()]
    return sum(number % 2 == 0 for number in numbers) / max(1, len(numbers))


class Steps:
    """The steps that a side is asked for. Made right after its imports, whose memory is noted."""

    def __init__(self) -> None:
        self._imports = _peak_bytes()
        self._laps: dict[str, float] = {}
        self._started = self._last = 0.0

    def ready(self, **facts: Any) -> None:
        """Say that steps may be asked for, and what this side is."""
        self._answer(facts)

    def wait(self) -> bool:
        """Whether there is another step; its time runs from here."""
        asked = bool(sys.stdin.readline())
        self._laps = {}
        self._started = self._last = time.perf_counter()
        return asked

    def lap(self, name: str) -> None:
        """What was done since the last lap."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def done(self, **measured: float) -> None:
        """The step is over; `measured` was timed by the side itself."""
        self._answer({"step": time.perf_counter() - self._started} | self._laps | measured)

    def end(self, **peaks: float) -> None:
        """The most memory that was taken."""
        peak = _peak_bytes()
        self._answer({"rss": peak, "rss_above_imports": peak - self._imports} | peaks)

    @staticmethod
    def _answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=_ANSWERS, flush=True)


def _peak_bytes() -> int:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
