"""What a reward function is given, what it may return, and how it says that it takes batches.

A reward is a plain function. Its parameters are filled by name: `prompt`, `completion`, `example`
(the whole row), any column of the row, and the context fields below. `async def` functions are
awaited together. Nothing is registered, and nothing here imports mlx: processes that only score
stay small.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import FunctionType
from typing import Any, overload

from textpolicy.errors import ConfigError

CONTEXT_FIELDS = ("tokens", "stop_reason", "messages", "turns", "turn_rewards")
"""What a reward may ask for besides the row: sampled token ids; why sampling stopped ("stop_token",
"stop_string" or "length"); the conversation with the completion; the model's turns as texts, and
what the environment gave for each of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One completion to score. `id` is the task's, for messages; `context` holds CONTEXT_FIELDS."""

    prompt: str
    completion: str
    example: Mapping[str, Any] = field(default_factory=dict[str, Any])
    context: Mapping[str, Any] = field(default_factory=dict[str, Any])
    id: str = ""


def sample_of(prompt: str, completion: str, example: Mapping[str, Any], **context: Any) -> Sample:
    """A sample of a text that no policy has written: its context is made up to fit.

    It ended by itself, in one turn, and its token ids are its bytes.
    """
    written = {
        "tokens": list(completion.encode()),
        "stop_reason": "stop_token",
        "messages": append_completion([{"role": "user", "content": prompt}], completion),
        "turns": [completion],
        "turn_rewards": [0.0],
    }
    return Sample(prompt=prompt, completion=completion, example=example, context=written | context)


def append_completion(
    messages: Sequence[Mapping[str, Any]], completion: str
) -> list[dict[str, Any]]:
    """The messages with the model's answer at the end."""
    return [*map(dict, messages), {"role": "assistant", "content": completion}]


@dataclass(frozen=True, slots=True)
class Score:
    """A reward with numbers beside it, which the run reports under the reward's name.

    `value` None leaves the sample out, as returning None does.
    """

    value: float | None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Reward:
    """A reward function, what reports call it, and whether it takes whole batches."""

    function: Callable[..., Any]
    name: str
    batched: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def file(self) -> str:
        """Where the function stands; empty for a callable that is no function."""
        function = self.function
        return function.__code__.co_filename if isinstance(function, FunctionType) else ""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # The decorated name in the module is this record, so pickle cannot find the function by it.
        if isinstance(self.function, FunctionType):
            return _find_reward, (self.function.__module__, self.function.__qualname__)
        return Reward, (self.function, self.name, self.batched)


@overload
def reward(function: Callable[..., Any], /) -> Reward: ...


@overload
def reward(
    *, batched: bool = False, name: str | None = None
) -> Callable[[Callable[..., Any]], Reward]: ...


def reward(
    function: Callable[..., Any] | None = None, /, *, batched: bool = False, name: str | None = None
) -> Reward | Callable[[Callable[..., Any]], Reward]:
    """Decorate a reward that takes lists, or that reports should call by another name.

    A batched reward is called once with all samples: `prompts`, `completions`, `examples`, and
    columns and context under their own names, each a list. It returns one value for each.
    """

    def decorate(function: Callable[..., Any]) -> Reward:
        return Reward(function, name or name_of(function), batched)

    return decorate(function) if function else decorate


def as_reward(function: object) -> Reward:
    """The function as a record; what is decorated already stays as it is."""
    if isinstance(function, Reward):
        return function
    if not callable(function):
        kind = type(function).__name__
        raise ConfigError(f"a reward is {function!r} ({kind}); expected a function")
    return Reward(function, name_of(function))


def name_of(function: Callable[..., Any]) -> str:
    """A function's name, or the type of another callable."""
    return function.__name__ if isinstance(function, FunctionType) else type(function).__name__


def _find_reward(module: str, qualname: str) -> Reward:
    """The reward that a module holds under this name, in whichever process asks."""
    return as_reward(vars(import_module(module))[qualname])
