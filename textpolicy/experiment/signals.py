"""Ctrl-C and SIGTERM around a run: the first ends it between two steps, the second at once."""

import os
import shlex
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import Signals
from threading import Thread

from textpolicy.loop import StepReport
from textpolicy.types import Progress

OnStep = Callable[[StepReport], Progress | None]
STOPPING = (Signals.SIGINT, Signals.SIGTERM)


class StopRequest:
    """Whether the run has been asked to end, and by what."""

    def __init__(self) -> None:
        self.signal: Signals | None = None

    def heeded(self, on_step: OnStep) -> OnStep:
        """The same observer, which also stops the run after the step that a signal came in."""

        def see(report: StepReport) -> Progress | None:
            progress = on_step(report)
            return Progress.STOP if self.signal else progress

        return see

    def farewell(self, run: Path, command: str = "train") -> str:
        """What to tell whoever stopped the run, that this command began."""
        by = f"stopped by {self.signal.name}; " if self.signal else ""
        return f"{by}go on with: textpolicy {command} --resume {shlex.quote(str(run))}"

    @property
    def exit_code(self) -> int:
        """What a shell expects of a command that a signal ended; 0 if none came."""
        return _exit_code(self.signal) if self.signal else 0


@contextmanager
def stopping(announce: Callable[[str], None]) -> Generator[StopRequest]:
    """Inside, a first SIGINT or SIGTERM is a request, and a second ends the process there and then.

    `announce` is given a line when the first comes, on a thread of its own. Signals that the
    process was started to ignore stay ignored. For the main thread only.
    """
    request = StopRequest()

    def note(number: int, frame: object) -> None:
        request.signal = request.signal or Signals(number)

    # A handler written in Python has to wait for the main thread, which may be a minute in C; the
    # byte that each signal puts into this pair is read by another thread as soon as it is sent.
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    listener = Thread(target=_listen, args=(receiver, announce), daemon=True)
    listener.start()
    wakeup = signal.set_wakeup_fd(sender.fileno())
    wanted = [s for s in STOPPING if signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        sender.close()
        listener.join()
        receiver.close()


def _listen(receiver: socket.socket, announce: Callable[[str], None]) -> None:
    """Read the numbers of signals until the other end is closed."""
    came = 0
    while data := receiver.recv(1):
        if data[0] not in STOPPING:
            continue
        came += 1
        if came == 2:
            os._exit(_exit_code(Signals(data[0])))
        # A terminal that is gone must not end the thread that the second signal needs.
        with suppress(OSError, ValueError):
            announce(
                f"{Signals(data[0]).name}: the run stops after this step, with a checkpoint; "
                "once more leaves at once"
            )


def _exit_code(number: Signals) -> int:
    return 128 + number
