"""Rollout workers as processes of this machine, each with a connection of its own.

A worker's process is started afresh: mlx hangs after a fork. It runs the user's code, so the
parent reads nothing but JSON, and `KillableProcess` ends with it everything that it has started,
also if the parent is killed. In the process only the main thread uses mlx; one thread reads the
connection and another one writes, so that neither side waits for the other while it computes.
"""

import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from textpolicy.errors import ConfigError, TextPolicyError
from textpolicy.rollout.executors.rollout_worker import RolloutWorker
from textpolicy.rollout.executors.worker_link import (
    Failed,
    PublishedVersion,
    Ready,
    Reloaded,
    SentJob,
    WorkerAnswer,
    WorkerEndedError,
    answer_from_json,
    answer_to_json,
)
from textpolicy.user_code import (
    SCRIPT_MODULE,
    files_named_in,
    load_python_file,
    provide_files,
    raise_user_errors_as,
)
from textpolicy.user_code.killable_process import ForgedAnswerError, KillableProcess, ParentLink

BuildWorker = Callable[[], RolloutWorker]
"""Makes the worker in its process, which finds the function by its name."""
_MAX_ANSWER_BYTES = 1 << 30


class SpawnedWorkers:
    """A `Transport` whose workers are processes of this machine, each made by `build`."""

    def __init__(self, build: BuildWorker) -> None:
        self._packed = pack_build(build)

    def start(self, number: int) -> "SpawnedLink":
        return SpawnedLink(self._packed)

    def wait(self, links: Sequence["SpawnedLink"], seconds: float) -> None:
        wait([link.process.socket for link in links], seconds)

    def close(self) -> None:
        """Return at once: each worker is a process of its own."""


class SpawnedLink:
    """The `WorkerLink` of a process."""

    def __init__(self, packed_build: "Packed") -> None:
        entry = f"{__name__}:{serve_rollouts.__name__}"
        self.process = KillableProcess(entry, max_message_bytes=_MAX_ANSWER_BYTES, uses_mlx=True)
        self.send(packed_build)

    def follow(self, published: PublishedVersion) -> None:
        self.send(_pack(published, "an adapter version"))

    def play(self, job: SentJob) -> None:
        self.send(pack_job(job))

    def send(self, packed: "Packed") -> None:
        """Hand over what `pack_build` or `pack_job` has returned."""
        self.process.send(packed)

    def answers(self) -> Iterator[WorkerAnswer]:
        return map(answer_from_json, self.messages())

    def messages(self) -> Iterator[Mapping[str, Any]]:
        """Yield the answers as they were sent. The errors are those of `answers`."""
        try:
            yield from self.process.read_messages()
        except ForgedAnswerError as error:
            raise WorkerEndedError(f"wrote {error} where an answer was expected") from error
        except EOFError as error:
            raise WorkerEndedError(self.process.kill_and_describe()) from error

    def end(self) -> None:
        self.process.kill()


Packed = tuple[dict[str, str], bytes]
"""The files that define what a pickle names, and the pickle."""


def pack_job(job: SentJob) -> Packed:
    """Return a job as it travels. Raise `ConfigError` if a task holds what cannot travel."""
    return _pack(job, "the columns of a task")


def pack_build(build: BuildWorker) -> Packed:
    """Return as it travels what builds a worker in its process.

    Raise `ConfigError` while a worker loads the script that starts the run.
    """
    # multiprocessing gives the main script both names. In a worker they differ while it runs.
    if sys.modules.get(SCRIPT_MODULE) is not sys.modules["__main__"]:
        raise ConfigError(
            "this script starts a run when a rollout worker loads the script: put the code that "
            'starts the run under `if __name__ == "__main__":`'
        )
    return _pack(build, "the function that builds a rollout worker")


def _pack(content: object, what: str) -> Packed:
    """Return what travels to a worker's process, or raise `ConfigError` with the word `what`."""
    with raise_user_errors_as(ConfigError, f"handing {what} to a rollout worker"):
        packed = bytes(ForkingPickler.dumps(content))
    files = files_named_in(packed)
    if b"__main__" in packed:
        files[SCRIPT_MODULE] = _main_script(what)
    return files, packed


def _main_script(what: str) -> str:
    file = vars(sys.modules["__main__"]).get("__file__")
    if file is None:
        raise ConfigError(
            f"{what} is defined where no other process can find it. Move the definition to a file, "
            "and import this file"
        )
    return str(file)


def serve_rollouts(parent: ParentLink) -> None:
    """Build the worker and play jobs, until the parent closes its end."""
    # A KeyboardInterrupt can then come only from the user's code.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox: SimpleQueue[Packed | None] = SimpleQueue()
    outbox: SimpleQueue[WorkerAnswer | None] = SimpleQueue()
    writer = Thread(target=_write, args=(parent, outbox), daemon=True)
    for thread in (writer, Thread(target=_read, args=(parent, inbox), daemon=True)):
        thread.start()
    try:
        _Server(parent, inbox, outbox).serve()
    except TextPolicyError as error:
        outbox.put(Failed(error))
    outbox.put(None)
    writer.join()


class _Server:
    """The worker between the messages of the parent and its answers."""

    def __init__(
        self,
        parent: ParentLink,
        inbox: "SimpleQueue[Packed | None]",
        outbox: "SimpleQueue[WorkerAnswer | None]",
    ) -> None:
        self._parent = parent
        self._inbox = inbox
        self._outbox = outbox
        self._jobs: deque[SentJob] = deque()
        self._over = False

    def serve(self) -> None:
        """Play jobs until the parent closes its end. The first message builds the worker."""
        build = self._inbox.get()
        if build is None:
            return
        worker: RolloutWorker = _unpack(self._parent, build)()
        self._outbox.put(Ready())
        while True:
            self._receive(worker, wait=not self._jobs)
            if self._over:
                return
            if self._jobs:
                load_newer = partial(self._receive, worker, wait=False)
                self._outbox.put(worker.play(self._jobs.popleft(), load_newer=load_newer))

    def _receive(self, worker: RolloutWorker, *, wait: bool) -> bool:
        """Take what has arrived, or `wait` for it; return whether it was a newer version."""
        published: PublishedVersion | None = None
        while not self._over and (wait or not self._inbox.empty()):
            wait = False
            message = self._inbox.get()
            self._over = message is None
            match content := message and _unpack(self._parent, message):
                case PublishedVersion():
                    published = content
                case SentJob():
                    self._jobs.append(content)
                case _:
                    pass
        if published and not self._over:
            self._outbox.put(Reloaded(worker.follow(published)))
            return True
        return False


def _unpack(parent: ParentLink, packed: Packed) -> Any:
    files, content = packed
    script = files.pop(SCRIPT_MODULE, None)
    if script and vars(sys.modules["__main__"]).get("__file__") != script:
        sys.modules["__main__"] = load_python_file(
            Path(script), what="main", error=ConfigError, module_name=SCRIPT_MODULE
        )
    provide_files(files, what="user's", error=ConfigError)
    with raise_user_errors_as(ConfigError, "reading what was handed to a rollout worker"):
        return parent.unpickle(content)


def _read(parent: ParentLink, inbox: "SimpleQueue[Packed | None]") -> None:
    # A parent that is gone sends nothing more, and the guard ends this process.
    with suppress(EOFError, OSError):
        while True:
            inbox.put(parent.receive())
    inbox.put(None)


def _write(parent: ParentLink, outbox: "SimpleQueue[WorkerAnswer | None]") -> None:
    while (answer := outbox.get()) is not None:
        parent.send(**answer_to_json(answer))
