"""Shows the events of a run in the terminal, and turns signals into a stop after the step."""

from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from signal import Signals

from textpolicy.cli.output import error_stream
from textpolicy.cli.progress import showing_progress
from textpolicy.cli.signals import StopRequest, stopping
from textpolicy.experiment import RunEvent, RunResult
from textpolicy.experiment.events import EventListener
from textpolicy.tracking.console import Console
from textpolicy.types import Progress


class TerminalListener:
    """The listener of a run that a command started. Made by `listening`."""

    def __init__(
        self, steps: int, opened: ExitStack, *, panel: bool, measured_every: int | None
    ) -> None:
        self._steps = steps
        self._opened = opened
        self._panel = panel
        console = Console(error_stream(), steps, measured_every=measured_every)
        self._console = opened.enter_context(closing(console))
        self._request = StopRequest()

    def note(self, text: str) -> None:
        """Write a line that stays."""
        self._console.note(text)

    def __call__(self, event: RunEvent) -> Progress:
        if event.kind == "start":
            # Before, a signal ends the process at once: there is nothing to save.
            self._request = self._opened.enter_context(stopping(self.note))
            if event.step:
                self.note(event.text)
        elif event.kind == "step" and self._panel:
            self._console.show(event.step - 1, event.metrics, event.samples)
            if event.step == self._steps:
                self._console.close()
        elif event.kind != "doubt":  # The command ends with the doubts.
            if event.kind == "killed":
                # The panel must give the cursor back before the process ends.
                self._console.close()
            self.note(event.text)
        return Progress.STOP if self._request.signal else Progress.MORE

    def exit_code(self, result: RunResult, *, ranks: int = 1) -> int:
        """Return 0, or the code that a shell expects of a command that a signal stopped.

        The signal may have come to another one of several `ranks`.
        """
        if result.ended != "stopped":
            return 0
        return self._request.exit_code or (128 + Signals.SIGTERM) * (ranks > 1)

    def stopped(self, resume_line: str) -> str:
        """Return the line for people whose run was stopped: by which signal, and how to resume."""
        by = f"stopped by {self._request.signal.name}; " if self._request.signal else ""
        return f"{by}resume with: {resume_line}"


@contextmanager
def quiet_listener() -> Generator[EventListener]:
    """Make a listener that shows nothing and turns signals into a stop after the step."""
    with ExitStack() as opened:
        request = StopRequest()

        def listen(event: RunEvent) -> Progress:
            nonlocal request
            if event.kind == "start":
                request = opened.enter_context(stopping(lambda text: None))
            return Progress.STOP if request.signal else Progress.MORE

        yield listen


@contextmanager
def listening(
    steps: int, *, panel: bool = True, measured_every: int | None = None
) -> Generator[TerminalListener]:
    """Make a listener that shows a run of `steps` steps: as a panel, or a line for each event.

    `measured_every` is the number of steps between two measurements on held-out tasks.
    """
    with ExitStack() as opened:
        listener = TerminalListener(steps, opened, panel=panel, measured_every=measured_every)
        opened.enter_context(showing_progress(listener.note, steps=True))
        yield listener
