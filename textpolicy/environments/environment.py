"""Environments: training tasks without end, held-out tasks, and the reward of both."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count, islice
from random import Random
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym

from textpolicy.environments.chat import ChatEnv, DrawFn, GoldFn
from textpolicy.environments.dataset import Dataset
from textpolicy.environments.held_out import (
    HELD_OUT_SEED,
    ProblemSurvey,
    held_out_draws,
)
from textpolicy.environments.streamed_rows import StreamedTasks
from textpolicy.rewards import Rewards, reward
from textpolicy.types import Agent, Prompt, RewardFn, Task

USUAL_ANSWER_TOKENS = 256
"""The most tokens of an answer to a task whose environment names no limit."""
_TELL_APART = (
    "If tasks with the same prompt are different problems, write a function problem(example) that "
    "returns a text that tells them apart"
)


@runtime_checkable
class TaskSplit(Protocol):
    """Training tasks and held-out tasks, which share no problem."""

    def stream(self, seed: int) -> Iterator[Task]:
        """Yield training tasks without end, in an order that `seed` decides."""
        ...

    def heldout(self, number: int) -> list[Task]:
        """Return the first `number` different held-out tasks, or all if there are fewer.

        Every call and every run get the same held-out tasks. `stream` never yields one of them.
        """
        ...


@runtime_checkable
class NotedSplit(Protocol):
    """A split that can have too few problems. `split_note` says what that means, or is ""."""

    @property
    def split_note(self) -> str: ...


@runtime_checkable
class AttachingSplit(Protocol):
    """A split whose tasks have an environment or an agent."""

    def attach(self, task: Task) -> Task:
        """Return the task with its environment or agent.

        The task comes from the same split in another process, without its `env` and `agent`.
        """
        ...


@runtime_checkable
class BuildEnv(Protocol):
    """Makes a Gymnasium environment from a function that draws its tasks, and a reward."""

    def __call__(
        self, draw: DrawFn, /, *, reward: RewardFn | Rewards | None
    ) -> gym.Env[Any, Any]: ...


# Metrics call this reward "earned".
@reward(name="earned")
def sum_turn_rewards(*, turn_rewards: Sequence[float]) -> float:
    """Return the sum of the rewards that the environment gave in each turn."""
    return sum(turn_rewards)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Tasks and their reward. The default reward is the sum of the turns' rewards.

    `max_tokens` limits one answer. `make` returns a Gymnasium environment with the same tasks, in
    which the seed of `reset` decides the task.
    """

    name: str
    tasks: TaskSplit
    max_tokens: int
    make_env: Callable[[RewardFn | Rewards], gym.Env[Any, Any]]
    reward: RewardFn | Rewards = sum_turn_rewards
    gold: GoldFn | None = None

    def stream(self, seed: int) -> Iterator[Task]:
        return self.tasks.stream(seed)

    def heldout(self, number: int) -> list[Task]:
        return self.tasks.heldout(number)

    def attach(self, task: Task) -> Task:
        """Return a task that came from another process, with its environment or agent again."""
        return attach_from(self.tasks, task)

    @property
    def agent(self) -> Agent | None:
        """The agent that plays the tasks, if one does."""
        return self.tasks.agent if isinstance(self.tasks, AgentTasks) else None

    def close(self) -> None:
        """End the processes of an agent. They start again when it plays again."""
        if self.agent is not None:
            self.agent.close()

    def make(self) -> gym.Env[Any, Any]:
        return self.make_env(self.reward)

    @property
    def split_note(self) -> str:
        """What a reader of held-out scores must know, if there are few problems, or ""."""
        return self.tasks.split_note if isinstance(self.tasks, NotedSplit) else ""


@dataclass(frozen=True, kw_only=True)
class GeneratedTasks:
    """Tasks that a function draws. A quarter of the problems is held out.

    The problem is the prompt, unless `problem` returns another text. If all draws have one problem,
    the held-out task has it too.
    """

    name: str
    draw: DrawFn
    problem: Callable[[Task], str] = lambda task: str(task.prompt)

    def stream(self, seed: int) -> Iterator[Task]:
        return (
            task for problem, task in self._draws(seed) if not self._survey.is_held_out(problem)
        )

    def heldout(self, number: int) -> list[Task]:
        draws = islice(self._draws(HELD_OUT_SEED), held_out_draws(number))
        found: dict[str, Task] = {}
        for problem, task in draws:
            if self._survey.is_single or self._survey.is_held_out(problem):
                found.setdefault(problem, task)
            if len(found) == number:
                break
        return list(found.values())

    @property
    def split_note(self) -> str:
        return self._survey.note(self.name, tell_apart=_TELL_APART)

    @cached_property
    def _survey(self) -> ProblemSurvey:
        return ProblemSurvey.of(problem for problem, _ in self._draws(HELD_OUT_SEED))

    def _draws(self, seed: int) -> Iterator[tuple[str, Task]]:
        rng = Random(f"{self.name}/{seed}")
        for number in count():
            prompt, example = self.draw(rng)
            task = Task(id=f"{self.name}/{number}", prompt=prompt, example=example)
            yield self.problem(task), task


@dataclass(frozen=True, kw_only=True)
class EpisodeTasks:
    """The tasks of another split, each with an environment that `build` makes for it alone."""

    source: TaskSplit
    build: BuildEnv
    reward: RewardFn | None = None

    def stream(self, seed: int) -> Iterator[Task]:
        return map(self._with_env, self.source.stream(seed))

    def heldout(self, number: int) -> list[Task]:
        return list(map(self._with_env, self.source.heldout(number)))

    @property
    def split_note(self) -> str:
        return self.source.split_note if isinstance(self.source, NotedSplit) else ""

    def attach(self, task: Task) -> Task:
        return self._with_env(attach_from(self.source, task))

    def _with_env(self, task: Task) -> Task:
        draw = _GivenTask(prompt=task.prompt, example=task.example)
        return replace(task, env=partial(self.build, draw, reward=self.reward))


@dataclass(frozen=True, kw_only=True)
class AgentTasks:
    """The tasks of another split, each played by an agent."""

    source: TaskSplit
    agent: Agent

    def stream(self, seed: int) -> Iterator[Task]:
        return map(self._with_agent, self.source.stream(seed))

    def heldout(self, number: int) -> list[Task]:
        return list(map(self._with_agent, self.source.heldout(number)))

    @property
    def split_note(self) -> str:
        return self.source.split_note if isinstance(self.source, NotedSplit) else ""

    def attach(self, task: Task) -> Task:
        return self._with_agent(attach_from(self.source, task))

    def _with_agent(self, task: Task) -> Task:
        return replace(task, agent=self.agent)


def attach_from(tasks: TaskSplit, task: Task) -> Task:
    """Return the task with what `tasks` attaches; a task that is data alone stays as it is."""
    return tasks.attach(task) if isinstance(tasks, AttachingSplit) else task


@dataclass(frozen=True, kw_only=True)
class _GivenTask:
    """A `DrawFn` that always draws this task. Unlike a lambda, it can go to another process."""

    prompt: Prompt
    example: Mapping[str, Any]

    def __call__(self, rng: Random) -> tuple[Prompt, Mapping[str, Any]]:
        return self.prompt, self.example


def from_function(
    name: str,
    draw: DrawFn,
    reward: RewardFn | Rewards,
    *,
    tasks: TaskSplit | None = None,
    gold: GoldFn | None = None,
    max_tokens: int = USUAL_ANSWER_TOKENS,
) -> Environment:
    """Return an environment of one turn, whose tasks `draw` makes. `tasks` replaces the tasks."""
    return Environment(
        name=name,
        tasks=tasks or GeneratedTasks(name=name, draw=draw),
        max_tokens=max_tokens,
        make_env=lambda reward: ChatEnv(
            draw, lambda answers, example: None, reward, gold=gold, max_turns=1
        ),
        reward=reward,
        gold=gold,
    )


def from_dataset(
    dataset: Dataset | StreamedTasks,
    reward: RewardFn | Rewards,
    *,
    gold: GoldFn | None = None,
    max_tokens: int = USUAL_ANSWER_TOKENS,
) -> Environment:
    """Return an environment of one turn, whose tasks are the rows of a dataset."""
    return from_function(
        dataset.name, dataset.draw, reward, tasks=dataset, gold=gold, max_tokens=max_tokens
    )
