"""BackgroundSaver: checkpoints are written while the next step samples."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from textpolicy.training.checkpoint import Checkpoint, Checkpoints


class BackgroundSaver:
    """Saves the checkpoints of a run in a thread, one at a time. Without `checkpoints`, none.

    An update should `wait`: weights and optimizer state of before and after it are then never in
    memory together. The block ends when the last checkpoint is on the disk.
    """

    def __init__(self, checkpoints: Checkpoints | None) -> None:
        self._checkpoints = checkpoints
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def due(self, step: int, *, last: bool) -> bool:
        """Return whether to save after `step` steps. The `last` ones are saved always."""
        return self._checkpoints is not None and (last or self._checkpoints.due(step))

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to save a checkpoint; raise what the writing of the one before raised."""
        assert self._checkpoints
        self.wait()
        self._saving = self._thread.submit(self._checkpoints.freeze(checkpoint))

    def wait(self) -> bool:
        """Return, when the last checkpoint is on the disk, whether one was being saved."""
        saving, self._saving = self._saving, None
        if saving:
            saving.result()
        return saving is not None

    def __enter__(self) -> "BackgroundSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()
