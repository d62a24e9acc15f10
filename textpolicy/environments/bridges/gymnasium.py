"""Gymnasium environments of text: a seed of `reset` is a task, and some problems are held out."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import gymnasium as gym

from textpolicy.environments.environment import Environment
from textpolicy.environments.episode_values import open_episode
from textpolicy.environments.faults import environment_errors
from textpolicy.environments.held_out import (
    DRAWS_PER_HELD_OUT_TASK,
    HELD_OUT_SEED,
    choose_held_out,
    is_held_out,
)
from textpolicy.errors import TaskError
from textpolicy.types import Task
from textpolicy.user_code import raise_user_errors_as

# An environment has few problems if so many draws find fewer than so many different ones.
_SURVEY_DRAWS = 128
_MANY_PROBLEMS = 64


def load(name: str) -> Environment:
    """Return the environment of an id for `gymnasium.make`: "ID", or "MODULE:ID".

    MODULE is imported first, so that it registers the id. It may be in the working directory.
    """
    module, _, env_id = name.rpartition(":")
    if module:
        _import_module(module)
    try:
        # The registry has no public look-up for ids without a version, which mean the newest.
        if not any(known.name == env_id for known in gym.registry.values()):
            gym.spec(env_id)
    except gym.error.Error as error:
        hint = "" if module else " Name the module that registers it: gymnasium:MODULE:ID"
        raise TaskError(f"{str(error).strip().rstrip('.')}.{hint}") from error
    return from_gymnasium(name)


def from_gymnasium(
    env: str | Callable[[], gym.Env[Any, Any]], *, name: str | None = None, max_tokens: int = 256
) -> Environment:
    """Return an environment from a Gymnasium environment of text.

    `env` is its id or a function that makes it. Each seed of the Gymnasium environment is a task.
    """
    make_env = partial(gym.make, env, disable_env_checker=True) if isinstance(env, str) else env
    name = name or (env if isinstance(env, str) else env.__name__)
    return Environment(
        name=name,
        tasks=GymnasiumTasks(name=name, make_env=make_env),
        max_tokens=max_tokens,
        make_env=lambda reward: make_env(),
    )


@dataclass(frozen=True, kw_only=True)
class ProblemSurvey:
    """How often the first draws of an environment found each problem.

    Problems that many draws find seldom are split by their hashes. A few problems are listed: a
    quarter of them is held out, but never the most frequent one, without which most draws would be
    useless for training. A single problem cannot be held out, so seeds are held out instead.
    """

    counts: Mapping[str, int]

    @cached_property
    def listed(self) -> frozenset[str] | None:
        """The held-out problems, or None if there are too many to list."""
        if len(self.counts) >= _MANY_PROBLEMS:
            return None
        if len(self.counts) == 1:
            return frozenset(self.counts)
        most_frequent = max(self.counts, key=self.counts.__getitem__)
        return choose_held_out(self.counts.keys() - {most_frequent}, of=len(self.counts))

    def is_held_out(self, problem: str, env_seed: int) -> bool:
        """Return whether training must not draw this seed."""
        if self.listed is None:
            return is_held_out(problem)
        if len(self.counts) == 1:
            return is_held_out(str(env_seed))
        return problem in self.listed

    def note(self, name: str) -> str:
        """Return what a reader of held-out scores must know if the problems are few, or ""."""
        found, draws = len(self.counts), sum(self.counts.values())
        if self.listed is None:
            return ""
        if found == 1:
            return (
                f"environment {name} has one problem: {draws} seeds gave the same one, so no "
                "problem is held out. Held-out tasks are other seeds of the problem that is "
                "trained on, and their score says nothing about new problems. If the seeds are "
                'different problems with the same first observation, return info["problem"] from '
                "reset, a text that tells them apart"
            )
        return (
            f"environment {name} has few problems: {draws} seeds gave {found} different ones. "
            f"{len(self.listed)} of the {found} {'is' if len(self.listed) == 1 else 'are'} held "
            f"out and never trained on. All held-out tasks are seeds of {len(self.listed)} "
            f"problem{'s' * (len(self.listed) > 1)}, so their score is a rough measure"
        )


@dataclass(frozen=True, kw_only=True)
class GymnasiumTasks:
    """Tasks that are seeds of a Gymnasium environment. Its first observation is the prompt.

    The problem of a task is `info["problem"]` of `reset`, or the prompt if info has no problem.
    """

    name: str
    make_env: Callable[[], gym.Env[Any, Any]]

    def stream(self, seed: int) -> Iterator[Task]:
        for env_seed in self._seeds(seed):
            problem, task = self._reset(env_seed)
            if not self._survey.is_held_out(problem, env_seed):
                yield task

    def heldout(self, number: int) -> list[Task]:
        """Return the first seed of each held-out problem, then more seeds of these problems."""
        survey = self._survey
        first: dict[str, Task] = {}
        more: list[Task] = []
        for env_seed in islice(self._seeds(HELD_OUT_SEED), DRAWS_PER_HELD_OUT_TASK * number):
            problem, task = self._reset(env_seed)
            if not survey.is_held_out(problem, env_seed):
                continue
            if problem in first:
                more.append(task)
            else:
                first[problem] = task
            all_found = survey.listed is not None and survey.listed <= first.keys()
            if len(first) == number or (all_found and len(first) + len(more) >= number):
                break
        return [*first.values(), *more][:number]

    @property
    def split_note(self) -> str:
        return self._survey.note(self.name)

    @cached_property
    def _survey(self) -> ProblemSurvey:
        """Draw the same seeds in every run, so that every run holds out the same problems."""
        counts: dict[str, int] = {}
        for env_seed in islice(self._seeds(HELD_OUT_SEED), _SURVEY_DRAWS):
            problem, _ = self._reset(env_seed)
            counts[problem] = counts.get(problem, 0) + 1
            if len(counts) == _MANY_PROBLEMS:
                break
        return ProblemSurvey(counts=counts)

    def _seeds(self, seed: int) -> Iterator[int]:
        rng = Random(f"{self.name}/{seed}")
        while True:
            yield rng.randrange(2**31)

    def _reset(self, env_seed: int) -> tuple[str, Task]:
        """Return the problem of a seed and its task."""
        with environment_errors(self.name, f"seed {env_seed}"):
            env = self.make_env()
            prompt, info = open_episode(env, env_seed)
            env.close()
        task = Task(
            id=f"{self.name}/{env_seed}",
            prompt=prompt,
            example=info.get("example", {}),
            env=self.make_env,
            seed=env_seed,
        )
        return str(info.get("problem", prompt)), task


def _import_module(name: str) -> None:
    """Import the module that registers an id, from the working directory too."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with raise_user_errors_as(TaskError, f"importing the module {name}"):
            import_module(name)
    except TaskError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        raise TaskError(
            f"gymnasium:{name}:ID needs the module {name}, which cannot be imported: "
            f"{error.__cause__}. Looked in {folder} and in the installed packages"
        ) from error
