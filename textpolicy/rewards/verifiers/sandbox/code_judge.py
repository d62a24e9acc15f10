"""Judges model-written code by tests: the code runs in one box, and the tests in another.

The code's box knows the code and the arguments of calls. The tests' box knows the tests, makes the
comparisons and writes the verdict to a socket that the code's box does not have. So the code can
return wrong values, and cannot change what they are compared with, nor the verdict.
"""

import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from textpolicy.rewards.verifiers.sandbox.box import (
    STARTING_SECONDS,
    Box,
    cannot_isolate,
    start_box,
)
from textpolicy.untrusted.parsing import parse_json

_HEADER = struct.Struct("!II")
_MAX_OUTPUT_BYTES = 1 << 20
_MAX_VERDICT_BYTES = 1 << 16
_MAX_ERROR = 2000
_WATCH_SECONDS = 0.05
_SENDING_SECONDS = 5.0
_MOST_SECONDS = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeRun:
    """How one run ended: `passed` if it ran to its end; otherwise `error` says why it did not.

    `output` is what the code and the test printed. Between the two the order may be another.
    """

    passed: bool
    output: str
    error: str


class CodeJudge:
    """Runs tests of one piece of code until it is closed; boxes are started when needed."""

    def __init__(self, code: str, *, memory: int = 1 << 29, unsafe: bool = False) -> None:
        self._code = code
        self._memory = memory
        self._unsafe = unsafe
        self._boxes: tuple[Box, Box] | None = None

    def run(self, test: str, seconds: float) -> CodeRun:
        """Return the verdict of one test, which may take `seconds` of wall time."""
        code_box, test_box = self._boxes or self._start()
        code_end, test_end = socket.socketpair()
        verdict, test_verdict = socket.socketpair()
        with code_end, test_end, verdict, test_verdict:
            try:
                _give(code_box, self._code, [code_end], seconds)
                _give(test_box, test, [test_end, test_verdict], seconds)
            except OSError:
                self.close()
                return CodeRun(passed=False, output="", error="the code ended the sandbox")
            for passed_on in (code_end, test_end, test_verdict):
                passed_on.close()
            watch = _Watch([code_box, test_box], verdict, seconds, 2 * self._memory)
            run = watch.wait()
        if watch.stopped:
            self.close()
        return run

    def close(self) -> None:
        """End both boxes."""
        for box in self._boxes or ():
            box.close()
        self._boxes = None

    def _start(self) -> tuple[Box, Box]:
        """Start both boxes at once, and wait until both are ready."""
        with ExitStack() as stack:
            boxes: list[Box] = []
            for program in ("judged_code", "tester"):
                box = start_box(program, memory=self._memory, unsafe=self._unsafe)
                stack.callback(box.close)
                boxes.append(box)
            for box in boxes:
                _wait_until_ready(box)
            stack.pop_all()
        self._boxes = boxes[0], boxes[1]
        return self._boxes


def _wait_until_ready(box: Box) -> None:
    box.control.settimeout(STARTING_SECONDS)
    started = b""
    with suppress(OSError):
        started = box.control.recv(1)
    if started != b"R":
        raise cannot_isolate(os.read(box.errors, 1 << 16).decode(errors="replace"))
    box.control.settimeout(_SENDING_SECONDS)


def _give(box: Box, text: str, sockets: list[socket.socket], seconds: float) -> None:
    data = text.encode("utf-8", "surrogatepass")
    header = _HEADER.pack(int(min(seconds, _MOST_SECONDS)) + 1, len(data))
    socket.send_fds(box.control, [header], [one.fileno() for one in sockets])
    box.control.sendall(data)


@dataclass(slots=True)
class _Watch:
    """Waits for the verdict of one test, and stops a test that takes too much of something."""

    boxes: list[Box]
    verdict: socket.socket
    seconds: float
    memory: int
    stopped: str = ""
    printed: bytearray = field(default_factory=bytearray)
    complaints: bytearray = field(default_factory=bytearray)
    answer: bytearray = field(default_factory=bytearray)

    def wait(self) -> CodeRun:
        deadline = time.monotonic() + self.seconds
        outputs = [pipe for box in self.boxes for pipe in (box.output, box.errors)]
        while not self.stopped:
            left = deadline - time.monotonic()
            if left <= 0:
                self.stopped = f"took longer than {self.seconds} s"
                break
            waiting = [self.verdict, *outputs]
            readable = wait(waiting, min(left, _WATCH_SECONDS))
            for pipe in [pipe for pipe in readable if isinstance(pipe, int)]:
                if not self._read(pipe):
                    outputs.remove(pipe)
            if self.verdict in readable and not self._read_verdict():
                break
            self._look_at_memory()
        return self._result()

    def _read(self, pipe: int) -> bool:
        """Take what was printed; return False if no more can come."""
        part = os.read(pipe, 1 << 16)
        taken = self.printed if pipe in [box.output for box in self.boxes] else self.complaints
        taken += part
        if len(taken) > _MAX_OUTPUT_BYTES:
            self.stopped = f"printed more than {_MAX_OUTPUT_BYTES} bytes"
        return bool(part)

    def _read_verdict(self) -> bool:
        """Take a part of the verdict; return False if it is complete."""
        part = self.verdict.recv(1 << 16)
        self.answer += part
        return bool(part) and b"\n" not in part and len(self.answer) <= _MAX_VERDICT_BYTES

    def _look_at_memory(self) -> None:
        used = sum(_memory_below(box.process.pid) for box in self.boxes)
        if used > self.memory:
            self.stopped = f"took more than {self.memory} bytes of memory in all its processes"

    def _result(self) -> CodeRun:
        if not self.stopped:
            # What was printed before the verdict is in the pipes by now.
            for box in self.boxes:
                for pipe in (box.output, box.errors):
                    while wait([pipe], 0) and self._read(pipe):
                        if self.stopped:
                            break
        passed, error = _read_answer(bytes(self.answer))
        if self.stopped or not passed:
            error = self.stopped or error or self.complaints.decode(errors="replace")
        return CodeRun(
            passed=passed and not self.stopped,
            output=self.printed[:_MAX_OUTPUT_BYTES].decode(errors="replace"),
            error=error[-_MAX_ERROR:],
        )


def _read_answer(answer: bytes) -> tuple[bool, str]:
    """Return whether the test passed, and what it says of a failure."""
    message: Any = None
    with suppress(ValueError):
        message = parse_json(answer)
    match message:
        case {"passed": bool(passed), "error": str(error)}:
            return passed, error
        case _:
            return False, "the test ended its process"


def _memory_below(process_id: int) -> int:
    """Return the bytes of memory that the processes below this one hold; 0 where unknown."""
    if sys.platform != "linux":
        return 0
    return sum(_memory_of(Path("/proc", str(pid))) for pid in _processes_below(process_id))


def _processes_below(process_id: int) -> Iterator[int]:
    waiting = [process_id]
    while waiting:
        task = Path("/proc", str(waiting.pop()), "task")
        with suppress(OSError):
            for thread in task.iterdir():
                children = [int(pid) for pid in (thread / "children").read_text().split()]
                waiting += children
                yield from children


def _memory_of(process: Path) -> int:
    with suppress(OSError):
        lines = (process / "status").read_text("utf-8", "replace").splitlines()
        kept = [line.split() for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
        return sum(int(kilobytes) for _, kilobytes, _ in kept) * 1024
    return 0
