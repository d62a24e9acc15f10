"""Ready tasks by name: training tasks without end, held-out ones that are never trained on."""

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b
from importlib import import_module
from itertools import count, islice
from random import Random
from typing import Any

from textpolicy.errors import TaskError
from textpolicy.rewards import score
from textpolicy.types import RewardFn, Task

# One problem in four is held out, by its prompt: enough even where there are few problems.
_HELD_OUT = 64
_HELD_OUT_SEED = 2024


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One module of `textpolicy_envs`; its docstring states what such a module holds."""

    name: str
    make: Callable[[Random], tuple[str, dict[str, Any]]]
    reward: RewardFn
    gold: Callable[[Mapping[str, Any]], str]
    max_tokens: int

    def stream(self, seed: int) -> Iterator[Task]:
        """Training tasks without end, in an order that the seed decides."""
        return self._draw(Random(f"{self.name}/{seed}"), held_out=False)

    def heldout(self, number: int) -> list[Task]:
        """The first `number` different held-out tasks: the same for every run, never streamed."""
        drawn = self._draw(Random(f"{self.name}/{_HELD_OUT_SEED}"), held_out=True)
        different: dict[str, Task] = {}
        for task in islice(drawn, 20 * number):
            different.setdefault(str(task.prompt), task)
            if len(different) == number:
                return list(different.values())
        raise TaskError(
            f"{self.name} has about {len(different)} held-out tasks, {number} were asked for"
        )

    def _draw(self, rng: Random, *, held_out: bool) -> Iterator[Task]:
        for number in count():
            prompt, example = self.make(rng)
            if _is_held_out(prompt) == held_out:
                yield Task(id=f"{self.name}/{number}", prompt=prompt, example=example)


def load(name: str) -> Environment:
    """The environment of that name, one of the modules in `textpolicy_envs`."""
    folders = import_module("textpolicy_envs").__path__
    known = sorted(module.name for module in pkgutil.iter_modules(folders))
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TaskError(f"no environment {name!r}; known: {', '.join(known)}.{hint}")
    module = import_module(f"textpolicy_envs.{name}")
    return Environment(
        name=name,
        make=module.make,
        reward=module.reward,
        gold=module.gold,
        max_tokens=module.MAX_TOKENS,
    )


def check(environment: Environment, number: int = 200) -> None:
    """Raise `TaskError` naming the first task that breaks the contract of an environment."""
    tasks = list(islice(environment.stream(0), number))
    if tasks != list(islice(environment.stream(0), number)):
        raise TaskError(f"{environment.name}: the same seed gave other tasks the second time")
    for task in tasks + environment.heldout(number):
        gold = environment.gold(task.example)
        expected = {gold: 1.0, "": 0.0}
        for completion, value in expected.items():
            got = score(environment.reward, str(task.prompt), completion, task.example)
            if got != value:
                raise TaskError(
                    f"{environment.name}: {task.prompt!r} scores {got} for {completion!r}; "
                    f"expected {value} ({'the gold answer' if completion else 'no answer'})"
                )


def _is_held_out(prompt: str) -> bool:
    return blake2b(prompt.encode(), digest_size=1).digest()[0] < _HELD_OUT
