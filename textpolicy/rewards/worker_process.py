"""Rewards in isolated processes: how they are started, called, killed and replaced.

`WorkerPool` gives calls to several processes, and kills a call that passes its deadline.
`WorkerProcess` is the parent's end of a process, and `run_worker` is the program of the process. A
process is started afresh, because a fork of a process that has used mlx hangs. It imports no mlx,
loads the functions by name, and serves one call at a time. `KillableProcess` ends all that a reward
has started: with a late call, with the pool, and with the run, however the run ends.
"""

import math
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast

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
from textpolicy.user_code import (
    SCRIPT_MODULE,
    has_file_module_name,
    load_python_file,
    raise_user_errors_as,
)
from textpolicy.user_code.killable_process import ForgedAnswerError, KillableProcess, ParentLink

_STARTUP_SECONDS = 60.0
"""How long a process may take to import the files of its rewards."""
_MAX_EXCERPT = 80
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
    """A process that starts, then waits for calls of rewards and serves them one by one."""

    def __init__(self, rewards: Sequence[Reward], memory: int | None = None) -> None:
        self.child = KillableProcess(f"{__name__}:{run_worker.__name__}")
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

    def _send(self, what: str, content: object) -> None:
        with raise_user_errors_as(RewardError, f"handing {what} to another process"):
            self.child.send(content)


def _check_can_isolate(rewards: Sequence[Reward]) -> None:
    """Raise `ConfigError` if another process could not load the functions by their names."""
    # multiprocessing gives the main script both names. In a worker the names differ while it runs.
    if sys.modules.get(SCRIPT_MODULE) is not sys.modules["__main__"]:
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
        files[SCRIPT_MODULE] = "__main__"
    return {name: str(sys.modules[loaded].__file__) for name, loaded in files.items()}


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
        self._workers = [worker for worker in self._workers if not worker.child.has_ended()]
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
            worker.child.kill()
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
        children = [worker.child for worker in self._workers]
        outputs = [child.output for child in children if child.output_is_open]
        wait(
            [*(child.socket for child in children), *outputs],
            timeout=min(max(0.0, next_deadline), _POLL_SECONDS),
        )
        for worker in list(self._workers):
            try:
                for message in worker.child.read_messages():
                    _handle_message(worker, message, on_result)
            except ForgedAnswerError as error:
                forged = f"was killed: it wrote {error} where an answer was expected"
                self._handle_end(worker, forged, on_result)
            except EOFError:
                self._handle_end(worker, worker.child.kill_and_describe(), on_result)
            else:
                if time.monotonic() >= worker.deadline:
                    self._handle_end(worker, None, on_result)

    def _handle_end(self, worker: WorkerProcess, ending: str | None, on_result: OnResult) -> None:
        """Replace a process that ended or broke as `ending` says, or is late if `ending` is None.

        The unanswered samples of the call that the process served fail.
        """
        if not worker.ready:
            self._workers.remove(worker)
            worker.child.kill()
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
        for place in sorted(worker.unanswered):
            sample = call.samples[place]
            what = describe_batch(call.samples) if reward.batched else describe_sample(sample)
            error = timeout_message(reward, self._timeout, what)
            if ending is not None:
                how, *printed = ending.splitlines()
                ended = f"reward {reward.name} ended its process, which {how}"
                error = "\n".join([ended, f"  {what}", *printed])
            on_result(call.first + place, RewardResult(error=error, seconds=seconds))

    def _replace(self, worker: WorkerProcess) -> None:
        worker.child.kill()
        self._workers[self._workers.index(worker)] = WorkerProcess(self._rewards, self._memory)


def _handle_message(worker: WorkerProcess, message: Mapping[str, Any], on_result: OnResult) -> None:
    """Note what a message says. The user's code could have written it: believe nothing."""
    match message:
        case {"failed": str(reason)}:
            raise RewardError(reason)
        case {"place": int(place), "result": dict(fields)} if place in worker.unanswered:
            result = _checked_result(cast("dict[str, Any]", fields))
            worker.unanswered.discard(place)
            on_result(cast("_WorkerCall", worker.call).first + place, result)
        case {"ready": True} if not worker.ready:
            worker.ready, worker.deadline = True, math.inf
        case {"done": True} if worker.call and not worker.unanswered:
            worker.call, worker.deadline = None, math.inf
        case _:
            raise ForgedAnswerError(repr(message)[:_MAX_EXCERPT])


def _checked_result(fields: dict[str, Any]) -> RewardResult:
    """Return the result that a message holds, or raise `ForgedAnswerError`."""
    match fields:
        case {
            "value": float() | int() | None as value,
            "metrics": dict(metrics),
            "seconds": float(seconds),
            "error": str() | None as error,
            "note": str(note),
        } if len(fields) == 5 and all(map(_is_finite, [value or 0.0, seconds, *metrics.values()])):
            return RewardResult(
                value=value, metrics=metrics, seconds=seconds, error=error, note=note
            )
        case _:
            raise ForgedAnswerError(repr(fields)[:_MAX_EXCERPT])


def _is_finite(value: object) -> bool:
    return isinstance(value, float | int) and abs(value) <= sys.float_info.max


def run_worker(parent: ParentLink) -> None:
    """Serve calls from the parent until the parent closes its end."""
    try:
        rewards = _receive_rewards(parent)
    except TextPolicyError as error:
        parent.send(failed=str(error))
        return
    parent.send(ready=True)
    with suppress(EOFError):
        while True:
            _serve_call(parent, rewards)


def _receive_rewards(parent: ParentLink) -> list[Reward]:
    received: tuple[Mapping[str, str], int | None] = parent.receive()
    files, memory = received
    if memory is not None:
        _set_resource_limit(resource.RLIMIT_AS, memory)
    for name, file in files.items():
        module = load_python_file(Path(file), what="reward", error=RewardError, module_name=name)
        if name == SCRIPT_MODULE:
            # Pickle looks up what a script defines in the module __main__.
            sys.modules["__main__"] = module
    with raise_user_errors_as(RewardError, "finding the reward functions in a new process"):
        return parent.receive()


def _serve_call(parent: ParentLink, rewards: Sequence[Reward]) -> None:
    data = parent.receive_bytes()

    def send_result(place: int, result: RewardResult) -> None:
        parent.send(place=place, result=asdict(result))

    try:
        with raise_user_errors_as(RewardError, "reading the rows in the reward's process"):
            call: _WorkerCall = parent.unpickle(data)
        call_reward(rewards[call.index], call.samples, send_result, call.await_limit)
    except TextPolicyError as error:
        parent.send(failed=str(error))
    else:
        parent.send(done=True)


def _set_resource_limit(resource_id: int, limit: int) -> None:
    _, hard = resource.getrlimit(resource_id)
    resource.setrlimit(resource_id, (limit, hard))
