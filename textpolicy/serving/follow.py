"""Serving the newest version of a run that is still training."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from textpolicy.adapters.publishing import AdapterWatcher
from textpolicy.serving.adapters import ServedAdapters
from textpolicy.serving.engine_queue import ServedEngine
from textpolicy.serving.faults import attempt_step

_SECONDS_BETWEEN_LOOKS = 0.2


class Followers:
    """Serves under each name whatever adapter is in its file, version by version.

    A file that does not exist yet is waited for. A version that cannot be loaded is skipped, and
    the version before stays.
    """

    def __init__(
        self, served: ServedEngine, adapters: ServedAdapters, paths: Mapping[str, Path]
    ) -> None:
        self._served = served
        self._adapters = adapters
        self._watchers = {
            name: AdapterWatcher(path, from_start=True) for name, path in paths.items()
        }

    def load_present(self) -> None:
        """Serve the adapters that are there now. Call it in the thread that owns mlx."""
        for name, watcher in self._watchers.items():
            if path := watcher.poll():
                self._adapters.put(name, path)
                watcher.accept()

    @contextmanager
    def watching(self, tell: Callable[[str], None] = lambda line: None) -> Generator[None]:
        """Look for new versions inside the block, while another thread runs the engine.

        `tell` is called with a line about each version, on a thread of its own.
        """
        ended = Event()
        thread = Thread(
            target=self._watch, args=(ended, tell), name="textpolicy-follow", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, ended: Event, tell: Callable[[str], None]) -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            for name, watcher in self._watchers.items():
                # A run may be removed, or its file replaced by anything, while it is looked at.
                path, _ = attempt_step(watcher.poll)
                if path is None:
                    continue
                watcher.accept()
                loaded = self._served.call(
                    lambda name=name, path=path: self._adapters.put(name, path)
                )
                failure = loaded.exception()
                tell(f"{name}: {failure or f'version {loaded.result()}'}")
