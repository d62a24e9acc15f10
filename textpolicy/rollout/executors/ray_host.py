"""`WorkerHost`: the Ray actor that holds a rollout worker on its machine, and passes messages on.

The worker is a process below the actor, like a worker without Ray. So the user's code cannot stop
the actor, mlx runs in a main thread, and the worker ends with everything that it has started when
the actor ends. Nothing in this file imports Ray.
"""

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textpolicy import backend
from textpolicy.errors import ConfigError, TextPolicyError, UnwritableError
from textpolicy.rollout.executors.spawned import Packed, SpawnedLink
from textpolicy.rollout.executors.worker_link import (
    Failed,
    PublishedVersion,
    WorkerEndedError,
    answer_to_json,
)

Heard = tuple[list[Mapping[str, Any]], str | None]
"""The answers of a worker as JSON holds them, and how the worker has ended, if it has."""


@dataclass(frozen=True)
class Surroundings:
    """What every machine of a run must have in common."""

    folder: str
    versions: Mapping[str, str | None]

    @classmethod
    def here(cls) -> "Surroundings":
        """Return those of this process."""
        return cls(folder=os.getcwd(), versions=backend.versions())

    def enter(self) -> None:
        """Make this process like the trainer's. Raise `ConfigError` if this machine is not."""
        found = backend.versions()
        different = [name for name, version in self.versions.items() if found[name] != version]
        if different:
            has, needs = (
                ", ".join(f"{name} {versions[name] or 'not installed'}" for name in different)
                for versions in (found, self.versions)
            )
            raise ConfigError(
                f"this machine has {has}; the trainer has {needs}. Install the versions of the "
                "trainer here"
            )
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise ConfigError(
                f"the trainer's working directory {self.folder} cannot be entered here: "
                f"{error.strerror}. Ray copies no files: put the user's files and the model at the "
                "same paths on every machine"
            ) from error


class WorkerHost:
    """Starts the worker that `packed_build` makes, on a machine that has these surroundings."""

    def __init__(self, packed_build: Packed, surroundings: Surroundings) -> None:
        self._name = socket.gethostname()
        self._news = asyncio.Event()
        self._early: dict[int, Callable[[SpawnedLink], None]] = {}
        self._number = 0
        self._refusal: TextPolicyError | None = None
        self._link: SpawnedLink | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="textpolicy-worker-"))
        try:
            surroundings.enter()
            self._link = SpawnedLink(packed_build)
        except ConfigError as error:
            self._refuse(error)

    async def follow(self, number: int, version: int, sha256: str, content: bytes) -> None:
        """Let the worker follow a version with this content. See `play` for `number`."""

        def pass_on(link: SpawnedLink) -> None:
            path = self._folder / f"{version:08d}.safetensors"
            try:
                path.write_bytes(content)
            except OSError as error:
                self._refuse(UnwritableError(f"{path} cannot be written: {error.strerror}"))
            link.follow(PublishedVersion(version=version, path=path, sha256=sha256))

        self._pass_on(number, pass_on)

    async def play(self, number: int, packed_job: Packed) -> None:
        """Hand a job to the worker after the messages with a smaller number.

        Ray may deliver a message before an earlier one whose content is large.
        """
        self._pass_on(number, lambda link: link.send(packed_job))

    async def hear(self) -> Heard:
        """Return what the worker has said. Wait until it says something, or ends."""
        if self._link and not self._refusal:
            await self._until_news(self._link.process.socket)
        if self._refusal:
            return [self._named(answer_to_json(Failed(self._refusal)))], None
        messages: list[Mapping[str, Any]] = []
        try:
            for message in self._link.messages() if self._link else ():
                messages.append(self._named(message))
                self._drop_files(message)
        except WorkerEndedError as error:
            return messages, f"{error} on the machine {self._name}"
        return messages, None

    async def close(self) -> None:
        """End the worker and remove its files."""
        if self._link:
            self._link.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _pass_on(self, number: int, message: Callable[[SpawnedLink], None]) -> None:
        self._early[number] = message
        while (next_one := self._early.pop(self._number, None)) is not None:
            self._number += 1
            if self._link:
                next_one(self._link)

    def _refuse(self, error: TextPolicyError) -> None:
        self._refusal = error
        self._news.set()

    async def _until_news(self, worker: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(worker, self._news.set)
        await self._news.wait()
        loop.remove_reader(worker)
        self._news.clear()

    def _named(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the message; the text of an error gets the name of the machine."""
        if "failed" not in message:
            return message
        return {**message, "text": f"on the machine {self._name}: {message.get('text')}"}

    def _drop_files(self, message: Mapping[str, Any]) -> None:
        """Remove the files of versions that the worker has in memory."""
        match message:
            case {"following": int(followed)}:
                for path in self._folder.iterdir():
                    if int(path.stem) <= followed:
                        path.unlink()
            case _:
                pass
