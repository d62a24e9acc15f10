"""Ctrl-C and SIGTERM during a run: the first stops it after the step, the second at once."""

import os
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from signal import Signals
from threading import Thread

STOPPING = (Signals.SIGINT, Signals.SIGTERM)


class StopRequest:
    """The signal that asked the run to stop, if one came."""

    def __init__(self) -> None:
        self.signal: Signals | None = None

    @property
    def exit_code(self) -> int:
        """The exit code that a shell expects after the signal; 0 if none came."""
        return _exit_code(self.signal) if self.signal else 0


@contextmanager
def stopping(announce: Callable[[str], None]) -> Generator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM is a request, and the second ends the process at once.

    `announce` is called with a line when the first signal comes, on another thread. Signals that
    the process was started to ignore stay ignored. Call it on the main thread.
    """
    request = StopRequest()

    def note(number: int, frame: object) -> None:
        request.signal = request.signal or Signals(number)

    # A Python signal handler waits for the main thread, which may compute in C for a minute. The
    # byte that each signal writes into this pair is read by another thread at once.
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
    """Read signal numbers until the other end is closed."""
    came = 0
    while data := receiver.recv(1):
        if data[0] not in STOPPING:
            continue
        came += 1
        if came == 2:
            os._exit(_exit_code(Signals(data[0])))
        # A closed terminal must not end this thread, which the second signal needs.
        with suppress(OSError, ValueError):
            announce(
                f"{Signals(data[0]).name}: the run stops after this step and saves a checkpoint. "
                "A second signal ends it at once"
            )


def _exit_code(number: Signals) -> int:
    return 128 + number
