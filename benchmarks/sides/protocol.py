"""Messages between the process of one library and the script that runs it. Standard library only.

Every library runs in an environment of its own. Its process sends one message when it is ready.
Then the process takes one step for each line that it reads, and answers with the seconds of this
step. When the input ends, the process answers with its peak memory.
"""

import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

# Libraries print to standard output too, so answers keep the real one and prints go to stderr.
_ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def read_task() -> dict[str, Any]:
    """Return the task of every library: model folder, prompts, sizes and options."""
    return json.loads(Path(sys.argv[1]).read_text())


def reward_of(text: str) -> float:
    """Return the share of even numbers: quick, and seldom equal for a whole group."""
    numbers = [int(word[1:]) for word in text.split()]
    return sum(number % 2 == 0 for number in numbers) / max(1, len(numbers))


class Steps:
    """Answers the script's requests for steps. Make it right after the imports of the library."""

    def __init__(self) -> None:
        self._imports = _peak_bytes()
        self._seconds_by_part: dict[str, float] = {}
        self._started = self._last = 0.0

    def ready(self, **facts: Any) -> None:
        """Tell the script that steps may begin, with the versions of this library."""
        self._answer(facts)

    def wait(self) -> bool:
        """Return whether the script asks for another step. The time of the step starts here."""
        asked = bool(sys.stdin.readline())
        self._seconds_by_part = {}
        self._started = self._last = time.perf_counter()
        return asked

    def lap(self, name: str) -> None:
        """Add the time since the last call to the part `name` of the step."""
        now = time.perf_counter()
        self._seconds_by_part[name] = self._seconds_by_part.get(name, 0.0) + now - self._last
        self._last = now

    def done(self, **measured: float) -> None:
        """Answer with the times of the step and the peak memory so far, in bytes.

        The library itself timed the parts in `measured`.
        """
        step = {"step": time.perf_counter() - self._started, "peak": float(_peak_bytes())}
        self._answer(step | self._seconds_by_part | measured)

    def end(self, **peaks: float) -> None:
        """Answer with the peak memory of this process."""
        peak = _peak_bytes()
        self._answer({"rss": peak, "rss_above_imports": peak - self._imports} | peaks)

    @staticmethod
    def _answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=_ANSWERS, flush=True)


def _peak_bytes() -> int:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
