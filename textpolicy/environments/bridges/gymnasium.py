"""Gymnasium environments of text: a seed of `reset` is a task, and some problems are held out."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass, replace
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
    HELD_OUT_SEED,
    ProblemSurvey,
    held_out_draws,
    is_held_out,
)
from textpolicy.errors import TaskError
from textpolicy.types import Task
from textpolicy.user_code import WaitingCalls, keep_process_state, raise_user_errors_as

_MAX_FAULTS_IN_A_ROW = 10
_SIDE_BY_SIDE = 8
"""How many seeds are opened at the same time, if opening one waits for something."""
_TELL_APART = (
    "If seeds are different problems with the same first observation, return "
    'info["problem"] from reset, a text that tells them apart'
)


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
class GymnasiumTasks:
    """Tasks that are seeds of a Gymnasium environment. Its first observation is the prompt.

    The problem of a task is `info["problem"]` of `reset`, or the prompt if info has no problem. If
    all seeds have one problem, a quarter of the seeds is held out.
    """

    name: str
    make_env: Callable[[], gym.Env[Any, Any]]
    faults_in_a_row: int = 0
    """How many seeds in a row may be skipped because reset or close fails."""

    def stream(self, seed: int) -> Iterator[Task]:
        for env_seed, problem, task in self._drawn(self._seeds(seed)):
            if not self._is_held_out(problem, env_seed):
                yield task

    def heldout(self, number: int) -> list[Task]:
        """Return the first seed of each held-out problem, then more seeds of these problems."""
        listed = self._survey.listed
        first: dict[str, Task] = {}
        more: list[Task] = []
        seeds = islice(self._seeds(HELD_OUT_SEED), held_out_draws(number))
        for env_seed, problem, task in self._drawn(seeds):
            if not self._is_held_out(problem, env_seed):
                continue
            if problem in first:
                more.append(task)
            else:
                first[problem] = task
            all_found = listed is not None and listed <= first.keys()
            if len(first) == number or (all_found and len(first) + len(more) >= number):
                break
        return [*first.values(), *more][:number]

    def attach(self, task: Task) -> Task:
        return replace(task, env=self.make_env)

    @property
    def split_note(self) -> str:
        return self._survey.note(self.name, tell_apart=_TELL_APART)

    @cached_property
    def _survey(self) -> ProblemSurvey:
        seeds = self._seeds(HELD_OUT_SEED)
        return ProblemSurvey.of(problem for _, problem, _ in self._drawn(seeds))

    def _is_held_out(self, problem: str, env_seed: int) -> bool:
        survey = self._survey
        return is_held_out(str(env_seed)) if survey.is_single else survey.is_held_out(problem)

    def _seeds(self, seed: int) -> Iterator[int]:
        rng = Random(f"{self.name}/{seed}")
        while True:
            yield rng.randrange(2**31)

    def _drawn(self, seeds: Iterator[int]) -> Iterator[tuple[int, str, Task]]:
        """Yield each seed with its problem and its task.

        If resets wait for something, such as a server, a few wait side by side.
        """
        calls, failed = WaitingCalls(), 0
        for first in seeds:
            more = islice(seeds, _SIDE_BY_SIDE - 1) if calls.wait else ()
            opened = [(each, calls.start(self._reset, each)) for each in (first, *more)]
            wait(future for _, future in opened)
            for env_seed, future in opened:
                try:
                    problem, task = future.result()
                except TaskError:
                    failed += 1
                    if failed > self.faults_in_a_row:
                        raise
                else:
                    failed = 0
                    yield env_seed, problem, task

    def _reset(self, env_seed: int) -> tuple[str, Task]:
        """Return the problem of a seed and its task."""
        with environment_errors(self.name, f"seed {env_seed}"), keep_process_state():
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


def skip_faulty_seeds(environment: Environment) -> Environment:
    """Return the environment without the seeds whose reset or close fails."""
    tasks = environment.tasks
    if not isinstance(tasks, GymnasiumTasks):
        return environment
    return replace(environment, tasks=replace(tasks, faults_in_a_row=_MAX_FAULTS_IN_A_ROW))


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
