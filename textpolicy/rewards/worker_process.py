"""Rewards in isolated processes: how they are started, called, killed and replaced.

`WorkerPool` gives calls to several processes. `WorkerProcess` is the parent's end of a process, and
`run_worker` is the program of the process. A process is started afresh, because a fork of a process
that has used mlx hangs. It imports no mlx, loads the functions by name, and serves one call at a
time.

A reward is killed in one of three ways, and each ends all that the reward has started:

- `WorkerPool` calls `WorkerProcess.kill` when a call passes its deadline.
- If the parent ends, however it ends, the process notices and kills its own process group.
- If the process is stuck in C code by then, an alarm signal ends it soon after the deadline.
"""

import faulthandler
import json
import math
import os
import resource
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
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from textpolicy.errors import ConfigError, RewardError, TextPolicyError
from textpolicy.rewards.call_reward import (
    MAX_CONCURRENT,
    OnResult,
    RewardResult,
    call_reward,
    describe_batch,
    describe_sample,
    timeout_message,
)
from textpolicy.rewards.reward_function import Reward, Sample
from textpolicy.rewards.weighted_rewards import Rewards
from textpolicy.user_code import has_file_module_name, load_python_file, raise_user_errors_as

_STARTUP_SECONDS = 60.0
"""How long a process may take to import the files of its rewards."""
_SCRIPT_MODULE = "__mp_main__"
"""The name under which a worker runs the main script, as multiprocessing does. The part of the
script under `if __name__ == "__main__"` does not run then."""
_ALARM_DELAY = 1.0
"""Seconds between a call's deadline and the alarm that ends the process without its parent."""
_MAX_MESSAGE_BYTES = 1 << 20
_KEPT_OUTPUT_BYTES = 4096
_MAX_OUTPUT_LINES, _MAX_LINE_WIDTH = 12, 200
_AWAIT_SLACK = 0.2
"""Seconds that a call of many awaited samples may take beyond the time limits of its samples."""
_POLL_SECONDS = 0.1
"""The longest wait for results, in seconds, between two checks for an interruption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _WorkerCall:
    """One call of the reward at `index`, with samples that start at position `first` of a step.

    The call may take `seconds`, and each awaited sample `await_limit` seconds.
    """

    index: int
    first: int
    samples: Sequence[Sample]
    seconds: float
    await_limit: float


class WorkerProcess:
    """The parent's end of one process, which starts, then waits for calls and serves them."""

    def __init__(self, rewards: Sequence[Reward], memory: int | None = None) -> None:
        own_socket, worker_socket = socket.socketpair()
        # Nothing is written to this pipe. The worker reads its end when the parent has ended.
        lifeline, held_lifeline = os.pipe()
        self.output, worker_output = os.pipe()
        os.set_blocking(self.output, False)
        program = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "from textpolicy.rewards.worker_process import run_worker\n"
            f"run_worker({worker_socket.fileno()}, {lifeline})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            pass_fds=[worker_socket.fileno(), lifeline],
            stdin=subprocess.DEVNULL,
            stdout=worker_output,
            stderr=worker_output,
            start_new_session=True,
        )
        worker_socket.close()
        os.close(worker_output)
        os.close(lifeline)
        self.connection = Connection(own_socket.detach())
        descriptors = [self.output, held_lifeline]
        # Called at the latest when this object is collected; further calls have no effect.
        self.kill = weakref.finalize(
            self, _kill_process_group, self.process, self.connection, descriptors
        )
        self.output_is_open = True
        self._last_output = b""
        self.ready = False
        self.call: _WorkerCall | None = None
        self.unanswered: set[int] = set()
        self.started = time.monotonic()
        self.deadline = self.started + _STARTUP_SECONDS
        self._send("the names of files", (_files_to_run(rewards), memory))
        self._send("the reward functions", list(rewards))

    def start_call(self, call: _WorkerCall) -> None:
        """Send a call to the process; the call's deadline counts from now."""
        self.call, self.unanswered = call, set(range(len(call.samples)))
        self.started = time.monotonic()
        self.deadline = self.started + call.seconds
        self._send("rows", call)

    def read_messages(self) -> Iterator[Mapping[str, Any]]:
        """Yield what the process has sent; raise EOFError if the process has ended or is broken."""
        self.read_output()
        while self.connection.poll():
            try:
                yield json.loads(self.connection.recv_bytes(_MAX_MESSAGE_BYTES))
            except (OSError, ValueError) as error:
                raise EOFError from error

    def read_output(self) -> None:
        """Read what the user's code has printed, so that printing never blocks; keep the end."""
        with suppress(BlockingIOError):
            while self.output_is_open:
                data = os.read(self.output, 1 << 16)
                self.output_is_open = bool(data)
                self._last_output = (self._last_output + data)[-_KEPT_OUTPUT_BYTES:]

    def kill_and_describe(self) -> str:
        """End the process and return how it ended, with the last lines that it printed."""
        self.read_output()
        self.kill()
        code = self.process.returncode
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        printed = self._last_output.decode(errors="replace").strip().splitlines()
        lines = [line[:_MAX_LINE_WIDTH] for line in printed[-_MAX_OUTPUT_LINES:]]
        return "\n    ".join([how, *lines])

    def _send(self, what: str, content: object) -> None:
        with raise_user_errors_as(RewardError, f"handing {what} to another process"):
            data = ForkingPickler.dumps(content)
        # If the process has died, reading its messages finds that out.
        with suppress(BrokenPipeError):
            self.connection.send_bytes(data)


def _check_can_isolate(rewards: Sequence[Reward]) -> None:
    """Raise `ConfigError` if another process could not load the functions by their names."""
    # multiprocessing gives the main script both names. In a worker the names differ while it runs.
    if sys.modules.get(_SCRIPT_MODULE) is not sys.modules["__main__"]:
        raise ConfigError(
            "this script starts a run when a reward's process loads the script for its functions: "
            'put the code that starts the run under `if __name__ == "__main__":`, or the rewards '
            "in a file of their own"
        )
    for reward in rewards:
        named: Any = reward.function if reward.file else type(reward.function)
        module = sys.modules.get(named.__module__)
        if "<" in named.__qualname__ or module is None or not vars(module).get("__file__"):
            raise ConfigError(
                f"reward {reward.name} ({named.__qualname__}) cannot run with a timeout: a timeout "
                "needs another process, and that process has to find the function by its name. "
                "Move the function to the top level of a file"
            )


def _files_to_run(rewards: Sequence[Reward]) -> dict[str, str]:
    """Return the files that no import could find, by the names of their modules."""
    functions: list[Any] = [reward.function for reward in rewards]
    modules = {function.__module__ for function in functions}
    files = {name: name for name in modules if has_file_module_name(name)}
    if "__main__" in modules:
        files[_SCRIPT_MODULE] = "__main__"
    return {name: str(sys.modules[loaded].__file__) for name, loaded in files.items()}


def _kill_process_group(
    process: subprocess.Popen[bytes], connection: Connection, descriptors: Sequence[int]
) -> None:
    """End the process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()
    for descriptor in descriptors:
        os.close(descriptor)


class WorkerPool:
    """Calls `rewards` in up to `rewards.workers` processes, with `timeout` seconds for each sample.

    Another thread can set `interrupted`: then `run` kills its calls and raises `RewardError`.
    """

    def __init__(self, rewards: Rewards, timeout: float) -> None:
        self._rewards = rewards.members
        _check_can_isolate(self._rewards)
        self._timeout = timeout
        self._max_workers = rewards.workers
        self._memory = None if rewards.memory_gb is None else int(rewards.memory_gb * 1e9)
        self._workers: list[WorkerProcess] = []
        self.interrupted = threading.Event()

    def start(self, count: int) -> None:
        """Start processes until there are `count`, or as many as allowed; do not wait for them."""
        self._workers = [worker for worker in self._workers if worker.process.poll() is None]
        while len(self._workers) < min(count, self._max_workers):
            self._workers.append(WorkerProcess(self._rewards, self._memory))

    def run(self, index: int, samples: Sequence[Sample], on_result: OnResult) -> None:
        """Call the reward at `index` for all samples; pass each result to `on_result` once."""
        waiting = deque(self._split_into_calls(index, samples))
        self.start(len(waiting))
        try:
            while waiting or any(worker.call for worker in self._workers):
                if self.interrupted.is_set():
                    raise RewardError("the scoring of a step was interrupted")
                for worker in self._workers:
                    if waiting and worker.ready and not worker.call:
                        worker.start_call(waiting.popleft())
                self._wait_for_results(on_result)
        finally:
            for worker in [worker for worker in self._workers if worker.call]:
                self._replace(worker)

    def close(self) -> None:
        """Kill all processes."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _split_into_calls(self, index: int, samples: Sequence[Sample]) -> Iterator[_WorkerCall]:
        reward = self._rewards[index]
        size, seconds = 1, self._timeout
        if reward.batched:
            size = len(samples)
        elif reward.is_async:
            size = math.ceil(len(samples) / self._max_workers)
            rounds = math.ceil(size / MAX_CONCURRENT)
            seconds = self._timeout * rounds + _AWAIT_SLACK
        for first in range(0, len(samples), size):
            yield _WorkerCall(
                index=index,
                first=first,
                samples=samples[first : first + size],
                seconds=seconds,
                await_limit=self._timeout,
            )

    def _wait_for_results(self, on_result: OnResult) -> None:
        """Wait until a process sends, prints, ends or passes its deadline; handle each of these."""
        next_deadline = min(worker.deadline for worker in self._workers) - time.monotonic()
        connections = [worker.connection for worker in self._workers]
        outputs = [worker.output for worker in self._workers if worker.output_is_open]
        wait([*connections, *outputs], timeout=min(max(0.0, next_deadline), _POLL_SECONDS))
        for worker in list(self._workers):
            try:
                for message in worker.read_messages():
                    _handle_message(worker, message, on_result)
            except EOFError:
                self._handle_end(worker, worker.kill_and_describe(), on_result)
            else:
                if time.monotonic() >= worker.deadline:
                    self._handle_end(worker, None, on_result)

    def _handle_end(self, worker: WorkerProcess, ending: str | None, on_result: OnResult) -> None:
        """Replace a process that ended as `ending` says, or that is late if `ending` is None.

        The unanswered samples of the call that the process served fail.
        """
        if not worker.ready:
            self._workers.remove(worker)
            worker.kill()
            names = ", ".join(reward.name for reward in self._rewards)
            late = f"took longer than {_STARTUP_SECONDS:.0f} s to import them"
            how = late if ending is None else f"was not ready when it {ending}"
            raise RewardError(f"the process of {names} {how}")
        call, seconds = worker.call, time.monotonic() - worker.started
        self._replace(worker)
        if call is None:
            # An idle process was killed from outside: no sample is to blame.
            return
        reward = self._rewards[call.index]
        for number, place in enumerate(sorted(worker.unanswered)):
            sample = call.samples[place]
            what = describe_batch(call.samples) if reward.batched else describe_sample(sample)
            error = timeout_message(reward, self._timeout, what)
            if ending is not None:
                how, *printed = ending.splitlines()
                ended = f"reward {reward.name} ended its process, which {how}"
                error = "\n".join([ended, f"  {what}", *printed])
            counts = number == 0 or not reward.batched
            result = RewardResult(error=error, seconds=seconds, counts=counts)
            on_result(call.first + place, result)

    def _replace(self, worker: WorkerProcess) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = WorkerProcess(self._rewards, self._memory)


def _handle_message(worker: WorkerProcess, message: Mapping[str, Any], on_result: OnResult) -> None:
    if "failed" in message:
        raise RewardError(message["failed"])
    if "result" in message and worker.call:
        place: int = message["place"]
        worker.unanswered.discard(place)
        on_result(worker.call.first + place, RewardResult(**message["result"]))
    else:
        worker.ready, worker.call, worker.deadline = True, None, math.inf


def run_worker(descriptor: int, lifeline: int) -> None:
    """Serve calls from this socket until the parent closes it, or until the parent ends."""
    # Programs that the user's code starts should not hold the socket.
    os.set_inheritable(descriptor, False)
    os.set_inheritable(lifeline, False)
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    # That thread cannot run while C code holds the interpreter; the alarm needs no thread.
    _set_alarm(_STARTUP_SECONDS + _ALARM_DELAY)
    _set_resource_limit(resource.RLIMIT_CORE, 0)
    faulthandler.enable()
    connection = Connection(descriptor)
    try:
        rewards = _receive_rewards(connection)
    except TextPolicyError as error:
        _reply(connection, failed=str(error))
        return
    _reply(connection, ready=True)
    _set_alarm(0)
    with suppress(EOFError):
        while True:
            _serve_call(connection, rewards)


def _die_with_parent(lifeline: int) -> None:
    """Wait for the parent's end, then kill this process and all that it has started."""
    os.read(lifeline, 1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _receive_rewards(connection: Connection) -> list[Reward]:
    received: tuple[Mapping[str, str], int | None] = connection.recv()
    files, memory = received
    if memory is not None:
        _set_resource_limit(resource.RLIMIT_AS, memory)
    for name, file in files.items():
        module = load_python_file(Path(file), what="reward", error=RewardError, module_name=name)
        if name == _SCRIPT_MODULE:
            # Pickle looks up what a script defines in the module __main__.
            sys.modules["__main__"] = module
    with raise_user_errors_as(RewardError, "finding the reward functions in a new process"):
        return connection.recv()


def _serve_call(connection: Connection, rewards: Sequence[Reward]) -> None:
    data = connection.recv_bytes()

    def send_result(place: int, result: RewardResult) -> None:
        _reply(connection, place=place, result=asdict(result))

    try:
        with raise_user_errors_as(RewardError, "reading the rows in the reward's process"):
            # The type stub takes this function for a method.
            call: _WorkerCall = ForkingPickler.loads(data)  # pyright: ignore[reportAttributeAccessIssue]
        _set_alarm(call.seconds + _ALARM_DELAY)
        call_reward(rewards[call.index], call.samples, send_result, call.await_limit)
    except TextPolicyError as error:
        _reply(connection, failed=str(error))
    else:
        _reply(connection, done=True)
    finally:
        _set_alarm(0)


def _set_alarm(seconds: float) -> None:
    # The default action of this signal ends the process, even if the process is stuck in C code.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _set_resource_limit(resource_id: int, limit: int) -> None:
    _, hard = resource.getrlimit(resource_id)
    resource.setrlimit(resource_id, (limit, hard))


def _reply(connection: Connection, **message: Any) -> None:
    # JSON, because the parent must not unpickle what the user's code could have written.
    connection.send_bytes(json.dumps(message).encode())
