"""Lines that say what a command does, whenever a part of its work takes more than two seconds."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Thread

from textpolicy import activity
from textpolicy.activity import Activity

_FIRST_LINE, _NEXT_LINES = 2.0, 10.0
_POLL = 0.25
# What a step of a run consists of. A run shows its steps by itself.
_PARTS_OF_A_STEP = ("sampling", "training", "reward ", "saving", "reloading", "writing", "a step ")


@contextmanager
def showing_progress(
    note: Callable[[str], None], *, steps: bool = False, after: float = _FIRST_LINE
) -> Generator[None]:
    """Call `note` with a line when one work of the block has taken `after` s, then every 10 s.

    With `steps`, the parts of training steps get no lines.
    """
    ended = Event()
    thread = Thread(target=_show, args=(note, ended, steps, after), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _show(note: Callable[[str], None], ended: Event, steps: bool, after: float) -> None:
    shown: Activity | None = None
    due = 0.0
    while not ended.wait(_POLL):
        works = activity.now()
        if not works or (steps and works[0].text.startswith(_PARTS_OF_A_STEP)):
            continue
        now = time.monotonic()
        if works[0] is not shown:
            shown, due = works[0], works[0].started + after
        if now >= due:
            due = now + _NEXT_LINES
            # A closed terminal must not end the work.
            with suppress(OSError, ValueError):
                note(_line(works, now))


def _line(works: Sequence[Activity], now: float) -> str:
    return f"{', '.join(map(str, works))} ... {now - works[0].started:.0f} s"
