"""Rewards in processes of their own, which can be killed: at a deadline, and when they crash.

Each child is started afresh (never forked: a fork of a process that has used mlx hangs), loads the
functions by name, imports no mlx, and stays warm. It gets one call at a time. When a call passes
its deadline, or ends the process, the child is killed with everything it started, the samples of
that call get the reason as their fault, and a new child takes its place.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

from textpolicy.errors import ConfigError, RewardError
from textpolicy.rewards.call_reward import (
    CONCURRENCY,
    Callee,
    Emit,
    RewardResult,
    describe_batch,
    describe_sample,
    fail_together,
    too_late,
)
from textpolicy.rewards.child import STARTUP_SECONDS, Call
from textpolicy.rewards.reward_file import MAIN
from textpolicy.rewards.reward_function import Reward, Sample
from textpolicy.user_code import has_file_module_name, raise_user_errors_as

_SLACK = 0.2
"""What a call of many awaited samples may take beyond them, before it counts as stuck."""
_GLANCE = 0.1
"""Seconds after which a wait looks whether it was interrupted."""
_ANSWER_BYTES = 1 << 20
_OUTPUT_BYTES = 4096
_LAST_LINES, _LINE_WIDTH = 12, 200


@dataclass(frozen=True, kw_only=True)
class Work:
    """One call: the samples at `positions`, for the reward at `index`."""

    index: int
    positions: Sequence[int]
    samples: Sequence[Sample]
    seconds: float


class Child:
    """One process: starting, then ready, then at `work`, until it is killed."""

    def __init__(self, rewards: Sequence[Reward], memory: int | None = None) -> None:
        ours, theirs = socket.socketpair()
        # Nothing is ever written to it: it ends when this process does, however that comes about.
        lifeline, held = os.pipe()
        self.output, output = os.pipe()
        os.set_blocking(self.output, False)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _program(theirs.fileno(), lifeline)],
            pass_fds=[theirs.fileno(), lifeline],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        theirs.close()
        os.close(output)
        os.close(lifeline)
        self.connection = Connection(ours.detach())
        ends = [self.output, held]
        self._end = weakref.finalize(self, _end, self.process, self.connection, ends)
        self.prints = True
        self.ready = False
        self.work: Work | None = None
        self.unanswered: set[int] = set()
        self.started = time.monotonic()
        self.deadline = self.started + STARTUP_SECONDS
        self._printed = b""
        _send_rewards(self.connection, rewards, memory)

    def begin(self, work: Work, limit: float) -> None:
        """Hand over a call; its deadline runs from now."""
        self.work, self.unanswered = work, set(range(len(work.samples)))
        self.started = time.monotonic()
        self.deadline = self.started + work.seconds
        call = Call(work.index, work.samples, limit, work.seconds)
        _send(self.connection, "rows", call)

    def finish(self) -> None:
        """The call is over, and the child waits for the next."""
        self.work, self.deadline = None, math.inf

    def messages(self) -> Iterator[Mapping[str, Any]]:
        """What the child has said since; raises EOFError once it is dead, or talks nonsense."""
        self.drain()
        while self.connection.poll():
            try:
                yield json.loads(self.connection.recv_bytes(_ANSWER_BYTES))
            except (OSError, ValueError) as error:
                raise EOFError from error

    def drain(self) -> None:
        """Read what the user's code has printed, so that it never waits for us; keep the end."""
        with suppress(BlockingIOError):
            while self.prints:
                data = os.read(self.output, 1 << 16)
                self.prints = bool(data)
                self._printed = (self._printed + data)[-_OUTPUT_BYTES:]

    def kill(self) -> None:
        """End the process and whatever it has started."""
        self._end()

    def last_words(self) -> str:
        """How the process ended and the last that it printed."""
        self.drain()
        self.kill()
        code = self.process.returncode
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        tail = self._printed.decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
        return "\n    ".join([how, *(line[:_LINE_WIDTH] for line in tail)])


class Children:
    """Runs rewards in up to `workers` processes, `timeout` seconds for each sample."""

    def __init__(
        self,
        callees: Sequence[Callee],
        *,
        timeout: float,
        workers: int,
        memory: int | None = None,
        interrupted: threading.Event | None = None,
    ) -> None:
        # multiprocessing gives the main script both names; in a child they differ while it runs.
        if sys.modules.get(MAIN) is not sys.modules["__main__"]:
            raise ConfigError(
                "this script starts a run when a reward's process loads it for its functions: put "
                'what it does under `if __name__ == "__main__":`, or its rewards in a file of '
                "their own"
            )
        self._callees = callees
        self._rewards = [callee.reward for callee in callees]
        for reward in self._rewards:
            _check_portable(reward)
        self._timeout = timeout
        self._workers = workers
        self._memory = memory
        self._interrupted = interrupted or threading.Event()
        self._children: list[Child] = []

    def start(self, count: int) -> None:
        """Have `count` children, or as many as are allowed; they get ready meanwhile."""
        self._children = [child for child in self._children if child.process.poll() is None]
        while len(self._children) < min(count, self._workers):
            self._children.append(Child(self._rewards, self._memory))

    def run(self, index: int, samples: Sequence[Sample], emit: Emit) -> None:
        """Score the samples with the reward at `index`, emitting each outcome once."""
        waiting = deque(self._divide(index, samples))
        self.start(len(waiting))
        try:
            while waiting or any(child.work for child in self._children):
                if self._interrupted.is_set():
                    raise RewardError("the scoring of a step was interrupted")
                for child in self._children:
                    if waiting and child.ready and not child.work:
                        child.begin(waiting.popleft(), self._timeout)
                self._listen(emit)
        finally:
            for child in [child for child in self._children if child.work]:
                self._replace(child)

    def close(self) -> None:
        for child in self._children:
            child.kill()
        self._children.clear()

    def _divide(self, index: int, samples: Sequence[Sample]) -> Iterator[Work]:
        callee = self._callees[index]
        size, seconds = 1, self._timeout
        if callee.reward.batched:
            size = len(samples)
        elif callee.is_async:
            size = math.ceil(len(samples) / self._workers)
            seconds = self._timeout * math.ceil(size / CONCURRENCY) + _SLACK
        for first in range(0, len(samples), size):
            chunk = samples[first : first + size]
            positions = range(first, first + len(chunk))
            yield Work(index=index, positions=positions, samples=chunk, seconds=seconds)

    def _listen(self, emit: Emit) -> None:
        """Wait for the next thing that happens to any child, and deal with it."""
        until = min(child.deadline for child in self._children) - time.monotonic()
        ends = [child.connection for child in self._children]
        wait(
            [*ends, *(child.output for child in self._children if child.prints)],
            timeout=min(max(0.0, until), _GLANCE),
        )
        for child in list(self._children):
            try:
                for message in child.messages():
                    _deal_with(child, message, emit)
            except EOFError:
                self._bury(child, emit, late=False)
            else:
                if time.monotonic() >= child.deadline:
                    self._bury(child, emit, late=True)

    def _bury(self, child: Child, emit: Emit, *, late: bool) -> None:
        work, words = child.work, "" if late else child.last_words()
        if work is None:
            self._children.remove(child)
            child.kill()
            if not child.ready:
                raise RewardError(_startup_failed(words, self._rewards))
            # An idle one that was killed from outside: another takes over.
            self._children.append(Child(self._rewards, self._memory))
            return
        self._replace(child)
        seconds = time.monotonic() - child.started
        reward = self._rewards[work.index]
        places = sorted(child.unanswered)
        if reward.batched:
            fault = _fault(reward, describe_batch(work.samples), words, self._timeout)
            fail_together([work.positions[place] for place in places], fault, seconds, emit)
            return
        for place in places:
            fault = _fault(reward, describe_sample(work.samples[place]), words, self._timeout)
            emit(work.positions[place], RewardResult(fault=fault, seconds=seconds))

    def _replace(self, child: Child) -> None:
        child.kill()
        self._children[self._children.index(child)] = Child(self._rewards, self._memory)


def _deal_with(child: Child, message: Mapping[str, Any], emit: Emit) -> None:
    if "failed" in message:
        raise RewardError(message["failed"])
    if "ready" in message:
        child.ready = True
    if "outcome" in message and child.work:
        place: int = message["position"]
        child.unanswered.discard(place)
        emit(child.work.positions[place], RewardResult(**message["outcome"]))
    else:
        child.finish()


def _fault(reward: Reward, sample: str, words: str, timeout: float) -> str:
    if not words:
        return too_late(reward, timeout, sample)
    how, *printed = words.splitlines()
    return "\n".join(
        [f"reward {reward.name} ended its process, which {how}", f"  {sample}", *printed]
    )


def _startup_failed(words: str, rewards: Sequence[Reward]) -> str:
    names = ", ".join(reward.name for reward in rewards)
    if not words:
        return f"the process of {names} took longer than {STARTUP_SECONDS:.0f} s to import them"
    return f"the process of {names} was not ready when it {words}"


def _program(descriptor: int, lifeline: int) -> str:
    return (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from textpolicy.rewards.child import serve_rewards\n"
        f"serve_rewards({descriptor}, {lifeline})"
    )


def _send_rewards(connection: Connection, rewards: Sequence[Reward], memory: int | None) -> None:
    """The files that a new process has to run under their present names, then the functions."""
    modules = {_module_of(reward) for reward in rewards}
    files = {
        name: str(sys.modules[name].__file__) for name in modules if has_file_module_name(name)
    }
    if "__main__" in modules:
        files[MAIN] = str(sys.modules["__main__"].__file__)
    _send(connection, "the names of files", (files, memory))
    _send(connection, "the reward functions", list(rewards))


def _module_of(reward: Reward) -> str:
    function: Any = reward.function
    return function.__module__


def _check_portable(reward: Reward) -> None:
    """Another process can have the function only if it can find it by name in a file."""
    named: Any = reward.function if reward.file else type(reward.function)
    module = sys.modules.get(named.__module__)
    if "<" in named.__qualname__ or module is None or not vars(module).get("__file__"):
        raise ConfigError(
            f"reward {reward.name} ({named.__qualname__}) cannot run with a timeout: that takes "
            "another process, which has to find it by name. Move it to the top level of a file"
        )


def _send(connection: Connection, what: str, content: object) -> None:
    with raise_user_errors_as(RewardError, f"handing {what} to another process"):
        data = ForkingPickler.dumps(content)
    # A child that is dead already is found out when its answers are read.
    with suppress(BrokenPipeError):
        connection.send_bytes(data)


def _end(
    process: subprocess.Popen[bytes], connection: Connection, descriptors: Sequence[int]
) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()
    for descriptor in descriptors:
        os.close(descriptor)
