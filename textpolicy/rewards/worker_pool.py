"""Run rewards in several isolated processes, kill each call at its deadline, replace what died.

Each process serves one call at a time. When a call passes its deadline, or ends its process, the
process is killed with all that it has started, the samples of the call get the reason as their
error, and a new process takes its place.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

from textpolicy.errors import RewardError
from textpolicy.rewards.call_reward import (
    MAX_CONCURRENT,
    OnResult,
    RewardResult,
    describe_batch,
    describe_sample,
    timeout_message,
)
from textpolicy.rewards.reward_function import Sample
from textpolicy.rewards.weighted_rewards import Rewards
from textpolicy.rewards.worker_process import (
    STARTUP_SECONDS,
    WorkerCall,
    WorkerProcess,
    check_can_isolate,
)

_AWAIT_SLACK = 0.2
"""Seconds that a call of many awaited samples may take beyond the time limits of its samples."""
_POLL_SECONDS = 0.1
"""Seconds after which a wait checks whether `interrupted` is set."""


class WorkerPool:
    """Calls `rewards` in up to `rewards.workers` processes, with `timeout` seconds for each sample.

    Another thread can set `interrupted`: then `run` kills its calls and raises `RewardError`.
    """

    def __init__(self, rewards: Rewards, timeout: float) -> None:
        self._rewards = rewards.members
        check_can_isolate(self._rewards)
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

    def _split_into_calls(self, index: int, samples: Sequence[Sample]) -> Iterator[WorkerCall]:
        reward = self._rewards[index]
        size, seconds = 1, self._timeout
        if reward.batched:
            size = len(samples)
        elif reward.is_async:
            size = math.ceil(len(samples) / self._max_workers)
            rounds = math.ceil(size / MAX_CONCURRENT)
            seconds = self._timeout * rounds + _AWAIT_SLACK
        for first in range(0, len(samples), size):
            yield WorkerCall(
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
            late = f"took longer than {STARTUP_SECONDS:.0f} s to import them"
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
        worker.finish_call()
