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


@contextmanager
def following(
    served: ServedEngine,
    adapters: ServedAdapters,
    paths: Mapping[str, Path],
    tell: Callable[[str], None] = lambda line: None,
) -> Generator[None]:
    """Inside the block, serve under each name whatever adapter is in its file, version by version.

    A file that does not exist yet is waited for. A version that cannot be loaded is skipped, and
    the version before stays. `tell` is called with a line about each version, on another thread.
    """
    ended = Event()
    watchers = {name: AdapterWatcher(path, from_start=True) for name, path in paths.items()}

    def watch() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            for name, watcher in watchers.items():
                # A run may be removed, or its file replaced by anything, while it is looked at.
                path, _ = attempt_step(watcher.poll)
                if path is None:
                    continue
                watcher.accept()
                loaded = served.call(lambda name=name, path=path: adapters.put(name, path))
                failure = loaded.exception()
                tell(f"{name}: {failure or f'version {loaded.result()}'}")

    thread = Thread(target=watch, name="textpolicy-follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
