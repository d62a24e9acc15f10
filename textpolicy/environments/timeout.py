"""`with_timeout`: the episodes of an environment in another process, in which a hang can be killed.

One process serves all episodes of a run. If it is killed because one episode hung, the others are
restored in a new process: each is reset with its seed and gets its earlier actions again. With a
seed, a Gymnasium environment then does what it did before.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

from textpolicy.environments.agent import with_limits
from textpolicy.environments.bridges.gymnasium import GymnasiumTasks
from textpolicy.environments.environment import AgentTasks, Environment, EpisodeTasks
from textpolicy.environments.request_process import RequestProcess, pack
from textpolicy.errors import TaskError
from textpolicy.types import Task

_numbers = count()


def with_timeout(environment: Environment, seconds: float) -> Environment:
    """Return the environment, in whose episodes no call of reset, step or close takes longer.

    For an agent the limit is that of a whole rollout. An environment of one turn is returned as it
    is. Raise `ConfigError` if another process could not import the environment.
    """
    if isinstance(environment.tasks, AgentTasks):
        return with_limits(environment, seconds=seconds)
    tasks, process = environment.tasks, RequestProcess(seconds)
    what = f"environment {environment.name}"
    if isinstance(tasks, GymnasiumTasks):
        packed = pack(tasks.make_env, what)
        make = partial(IsolatedEnv, process, packed, ("example", "problem"))
        return replace(environment, tasks=replace(tasks, make_env=make))
    if isinstance(tasks, EpisodeTasks):
        pack(tasks.build, what)
        return replace(environment, tasks=_IsolatedTasks(source=tasks, process=process, what=what))
    return environment


@dataclass(frozen=True, kw_only=True)
class _IsolatedTasks:
    source: EpisodeTasks
    process: RequestProcess
    what: str

    def stream(self, seed: int) -> Iterator[Task]:
        return map(self._isolated, self.source.stream(seed))

    def heldout(self, number: int) -> list[Task]:
        return list(map(self._isolated, self.source.heldout(number)))

    def attach(self, task: Task) -> Task:
        return self._isolated(self.source.attach(task))

    def _isolated(self, task: Task) -> Task:
        assert task.env is not None
        return replace(task, env=partial(IsolatedEnv, self.process, pack(task.env, self.what), ()))


class IsolatedEnv:
    """A `TextEnv` that lives in another process. `reset` keeps only the `keys` of its info."""

    def __init__(self, process: RequestProcess, packed: bytes, keys: tuple[str, ...]) -> None:
        self._process = process
        self._packed = packed
        self._keys = keys
        self._number = next(_numbers)
        self._generation = -1
        self._seed: int | None = None
        self._actions: list[str] = []
        self._last: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Make the environment in the process and reset it."""
        self._seed, self._actions = seed, []
        with self._process.lock:
            self._last = self._open()
        prompt, info = self._last
        return (prompt, info) if isinstance(prompt, str) else ("", info | {"messages": prompt})

    def step(self, action: str, /) -> tuple[Any, ...]:
        """Play one turn; the episode is restored first if its process was killed."""
        with self._process.lock:
            if self._generation != self._process.generation:
                self._replay()
            self._last = self._process.request("step", "step", self._number, action)
        self._actions.append(action)
        reward, terminated, truncated, info = self._last
        return "", reward, terminated, truncated, info

    def close(self) -> None:
        """Close the environment, if its process still has it."""
        with self._process.lock:
            if self._generation == self._process.generation:
                self._process.request("close", "close", self._number)

    def _open(self) -> Any:
        self._process.load(self._packed)
        self._generation = self._process.generation
        return self._process.request(
            "reset", "reset", self._number, self._packed, self._seed, self._keys
        )

    def _replay(self) -> None:
        last = self._open()
        for action in self._actions:
            last = self._process.request("step", "step", self._number, action)
        if last != self._last:
            raise TaskError(
                "the process was stopped because of another episode, and the environment did not "
                "repeat its earlier turns; expected equal turns for equal seeds and answers"
            )
