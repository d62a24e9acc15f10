"""Where a run's tasks come from: training tasks without end, held-out ones never trained on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import count, islice
from random import Random
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym

from textpolicy.environments.dataset import Dataset
from textpolicy.environments.single_turn import DrawFn, GoldFn, SingleTurnEnv
from textpolicy.errors import TaskError
from textpolicy.rewards import Rewards, reward
from textpolicy.types import Prompt, RewardFn, Task

# One problem in four is held out, by its hash: enough even where there are few problems.
_HELD_OUT = 64
_HELD_OUT_SEED = 2024


@runtime_checkable
class TaskSource(Protocol):
    """Tasks in two parts that share no problem."""

    def stream(self, seed: int) -> Iterator[Task]:
        """Training tasks without end, in an order that the seed decides."""
        ...

    def heldout(self, number: int) -> list[Task]:
        """The first `number` different held-out tasks, or all if there are fewer: the same for
        every run, and never streamed.
        """
        ...


@runtime_checkable
class BuildEnv(Protocol):
    """Makes an environment whose tasks are drawn that way and whose last answer earns `reward`."""

    def __call__(
        self, draw: DrawFn, /, *, reward: RewardFn | Rewards | None
    ) -> gym.Env[Any, Any]: ...


# Metrics call this reward "earned".
@reward(name="earned")
def sum_turn_rewards(*, turn_rewards: Sequence[float]) -> float:
    """Return the sum of the rewards that the environment gave in each turn."""
    return sum(turn_rewards)


def prompt_as_problem(task: Task) -> str:
    """What tells problems apart, unless an environment says otherwise: the prompt."""
    return str(task.prompt)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Tasks and what scores them: a reward function, or `sum_turn_rewards`.

    `max_tokens` bounds one answer. `make` gives the same as a Gymnasium environment that draws
    tasks itself and ends with the reward.
    """

    name: str
    tasks: TaskSource
    max_tokens: int
    make_env: Callable[[RewardFn | Rewards], gym.Env[Any, Any]]
    reward: RewardFn | Rewards = sum_turn_rewards
    gold: GoldFn | None = None

    def stream(self, seed: int) -> Iterator[Task]:
        return self.tasks.stream(seed)

    def heldout(self, number: int) -> list[Task]:
        return self.tasks.heldout(number)

    def make(self) -> gym.Env[Any, Any]:
        return self.make_env(self.reward)


@dataclass(frozen=True, kw_only=True)
class GeneratedTasks:
    """Tasks that a function draws. What `problem` says of one decides whether it is held out."""

    name: str
    draw: DrawFn
    problem: Callable[[Task], str] = prompt_as_problem

    def stream(self, seed: int) -> Iterator[Task]:
        return self._draw(Random(f"{self.name}/{seed}"), held_out=False)

    def heldout(self, number: int) -> list[Task]:
        drawn = self._draw(Random(f"{self.name}/{_HELD_OUT_SEED}"), held_out=True)
        return _different(drawn, number, self.problem, self.name)

    def _draw(self, rng: Random, *, held_out: bool) -> Iterator[Task]:
        for number in count():
            prompt, example = self.draw(rng)
            task = Task(id=f"{self.name}/{number}", prompt=prompt, example=example)
            if _is_held_out(self.problem(task)) == held_out:
                yield task


@dataclass(frozen=True, kw_only=True)
class EpisodeTasks:
    """The tasks of another source, each played in an environment that `build` makes for it."""

    source: TaskSource
    build: BuildEnv
    reward: RewardFn | None = None

    def stream(self, seed: int) -> Iterator[Task]:
        return map(self._played, self.source.stream(seed))

    def heldout(self, number: int) -> list[Task]:
        return list(map(self._played, self.source.heldout(number)))

    def _played(self, task: Task) -> Task:
        draw = _FixedTask(task.prompt, task.example)
        return replace(task, env=partial(self.build, draw, reward=self.reward))


@dataclass(frozen=True, slots=True)
class _FixedTask:
    """Draws the same task every time."""

    prompt: Prompt
    example: Mapping[str, Any]

    def __call__(self, rng: Random) -> tuple[Prompt, Mapping[str, Any]]:
        return self.prompt, self.example


@dataclass(frozen=True, kw_only=True)
class GymnasiumTasks:
    """Tasks that are seeds of a Gymnasium environment: what it opens with is the prompt."""

    name: str
    make_env: Callable[[], gym.Env[Any, Any]]

    def stream(self, seed: int) -> Iterator[Task]:
        return self._draw(Random(f"{self.name}/{seed}"), held_out=False)

    def heldout(self, number: int) -> list[Task]:
        drawn = self._draw(Random(f"{self.name}/{_HELD_OUT_SEED}"), held_out=True)
        return _different(drawn, number, lambda task: str(task.seed), self.name)

    def _draw(self, rng: Random, *, held_out: bool) -> Iterator[Task]:
        while True:
            seed = rng.randrange(2**31)
            if _is_held_out(str(seed)) == held_out:
                yield self._task(seed)

    def _task(self, seed: int) -> Task:
        env = self.make_env()
        prompt, info = opening_prompt(*env.reset(seed=seed), self.name)
        env.close()
        return Task(
            id=f"{self.name}/{seed}",
            prompt=prompt,
            example=info.get("example", {}),
            env=self.make_env,
            seed=seed,
        )


def opening_prompt(
    observation: Any, info: dict[str, Any], name: str
) -> tuple[Prompt, dict[str, Any]]:
    """What an environment opens with: `info["messages"]` if it has them, else the observation."""
    if messages := info.get("messages"):
        return list(messages), info
    if not isinstance(observation, str):
        raise TaskError(
            f"environment {name} opened with {observation!r:.60} ({type(observation).__name__}); "
            "expected text. Wrap it so that observations and actions are strings"
        )
    return observation, info


def question_and_answer(
    name: str,
    draw: DrawFn,
    reward: RewardFn | Rewards,
    *,
    tasks: TaskSource | None = None,
    gold: GoldFn | None = None,
    max_tokens: int = 256,
) -> Environment:
    """Tasks that a function draws, each answered once; or those of `tasks`, if it is given."""

    def make_env(reward: RewardFn | Rewards) -> SingleTurnEnv:
        return SingleTurnEnv(draw, reward, gold)

    return Environment(
        name=name,
        tasks=tasks or GeneratedTasks(name=name, draw=draw),
        max_tokens=max_tokens,
        make_env=make_env,
        reward=reward,
        gold=gold,
    )


def from_dataset(
    dataset: Dataset,
    reward: RewardFn | Rewards,
    *,
    gold: GoldFn | None = None,
    max_tokens: int = 256,
) -> Environment:
    """The rows of a dataset, each answered once."""
    return question_and_answer(
        dataset.name, dataset.draw, reward, tasks=dataset, gold=gold, max_tokens=max_tokens
    )


def from_gymnasium(
    env: str | Callable[[], gym.Env[Any, Any]], *, name: str | None = None, max_tokens: int = 256
) -> Environment:
    """Any Gymnasium environment of text, by its id or by what makes one; seeds are its tasks."""
    make_env = partial(gym.make, env, disable_env_checker=True) if isinstance(env, str) else env
    name = name or (env if isinstance(env, str) else env.__name__)
    return Environment(
        name=name,
        tasks=GymnasiumTasks(name=name, make_env=make_env),
        max_tokens=max_tokens,
        make_env=lambda reward: make_env(),
    )


def _different(
    tasks: Iterator[Task], number: int, problem: Callable[[Task], str], name: str
) -> list[Task]:
    found: dict[str, Task] = {}
    for task in islice(tasks, 20 * number):
        found.setdefault(problem(task), task)
        if len(found) == number:
            break
    if not found:
        raise TaskError(f"{name} has no held-out task among {20 * number} that were drawn")
    return list(found.values())


def _is_held_out(problem: str) -> bool:
    return blake2b(problem.encode(), digest_size=1).digest()[0] < _HELD_OUT
