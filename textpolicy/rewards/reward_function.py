"""What a reward function is given and what it may return.

A reward is a plain function. Its parameters are filled by name: `prompt`, `completion`, `example`
(the whole row), any column of the row, and CONTEXT_FIELDS. An `async def` function is awaited.
Nothing in this file imports mlx, because the processes that only call rewards must stay small.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from types import FunctionType, MappingProxyType, NoneType
from typing import Any, overload

from textpolicy.errors import ConfigError
from textpolicy.rewards.parameters_elsewhere import parameter_hint
from textpolicy.rewards.thoughts import thought_fields

CONTEXT_FIELDS = (
    *("tokens", "stop_reason", "messages", "turns", "turn_rewards"),
    *("thought", "visible_answer", "in_thought"),
)
"""What a reward may ask for besides the row: the sampled token ids; why sampling stopped
("stop_token", "stop_string" or "length"); the conversation including the completion; the model's
text of each turn; the environment's reward of each turn; the thought; the text after the thought;
whether the prompt has opened the thought. `answer` is another name of `visible_answer`, if the
rows have no column of this name."""

_CONSTANTS = frozenset({str, int, float, bool, bytes, NoneType})
_SINGLE = ("prompt", "completion", "example")
_BATCHED = ("prompts", "completions", "examples")
_ANSWER = "answer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One completion to score. `id` names the task in messages; `context` holds CONTEXT_FIELDS."""

    prompt: str
    completion: str
    example: Mapping[str, Any] = field(default_factory=dict[str, Any])
    context: Mapping[str, Any] = field(default_factory=dict[str, Any])
    id: str = ""


def sample_of(prompt: str, completion: str, example: Mapping[str, Any], **context: Any) -> Sample:
    """Return a sample of a text that no policy wrote, with a made-up context.

    In this context the completion is one turn that ended by itself, and its tokens are its bytes.
    """
    made_up = {
        "tokens": list(completion.encode()),
        "stop_reason": "stop_token",
        "messages": append_completion([{"role": "user", "content": prompt}], completion),
        "turns": [completion],
        "turn_rewards": [0.0],
        **thought_fields(completion),
    }
    return Sample(prompt=prompt, completion=completion, example=example, context=made_up | context)


def append_completion(
    messages: Sequence[Mapping[str, Any]], completion: str
) -> list[dict[str, Any]]:
    """Return the messages with the completion as the assistant's message at the end."""
    return [*map(dict, messages), {"role": "assistant", "content": completion}]


@dataclass(frozen=True, slots=True)
class Score:
    """A reward, or None to leave the sample out, with metrics that the run reports beside it.

    `note` is a text for people about this sample. `textpolicy check` shows the note of a sample
    that is left out.
    """

    value: float | None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    note: str = ""


@dataclass(frozen=True)
class Reward:
    """A reward function, its name in reports, and whether the function takes whole batches."""

    function: Callable[..., Any]
    name: str
    batched: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A decorated name in a module is this record, so pickle cannot find the function by name.
        if isinstance(self.function, FunctionType):
            return _find_reward, (self.function.__module__, self.function.__qualname__)
        return Reward, (self.function, self.name, self.batched)

    @property
    def file(self) -> str:
        """The file that defines the function; empty for a callable that is not a function."""
        function = self.function
        return function.__code__.co_filename if isinstance(function, FunctionType) else ""

    @cached_property
    def is_async(self) -> bool:
        """Whether each sample is a call to await."""
        function = self.function
        # An object with `async def __call__` is awaited too.
        call: Any = function if inspect.isroutine(function) else type(function).__call__
        return inspect.iscoroutinefunction(call) and not self.batched

    @cached_property
    def parameters(self) -> "_Parameters":
        """The parameters to fill; raises `ConfigError` if the completion is not among them."""
        try:
            parameters = list(inspect.signature(self.function).parameters.values())
        except ValueError:
            # Builtin functions have no signature to read.
            parameters = [
                inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in _SINGLE
            ]
        standard = _BATCHED if self.batched else _SINGLE
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        sees_completion = bool({standard[1], *CONTEXT_FIELDS} & {p.name for p in named})
        by_position = not sees_completion and _takes_three_by_position(parameters)
        only_answer = not (sees_completion or by_position) and _ANSWER in {p.name for p in named}
        if not (sees_completion or by_position or only_answer):
            raise ConfigError(
                f"reward {self.name} takes ({', '.join(map(str, parameters))}): it would not see "
                f"the completion; expected ({', '.join(standard)}), or the names of some of these "
                f"and of the row's columns, with `{standard[1]}` among them"
                f"{self._hint_of_batches()}"
            )
        names = [] if by_position else named
        return _Parameters(
            standard=standard,
            by_position=by_position,
            required=tuple(p.name for p in names if p.default is p.empty),
            optional=tuple(p.name for p in names if p.default is not p.empty),
            takes_context=any(p.kind is p.VAR_KEYWORD for p in parameters),
            only_answer=only_answer,
        )

    def call(self, sample: Sample) -> Any:
        """Call the function for one sample, with copies of the arguments that it asks for.

        A function may change what it gets: the row of the task stays as it is.
        """
        first = (sample.prompt, sample.completion, sample.example)
        return self._fill_and_call(first, sample.example, sample.context)

    def call_batch(self, samples: Sequence[Sample]) -> Any:
        """Call the function once for all samples; each argument is a list."""
        prompts, completions = [s.prompt for s in samples], [s.completion for s in samples]
        examples = [sample.example for sample in samples]
        context = _lists_by_name([sample.context for sample in samples])
        first = (prompts, completions, examples)
        return self._fill_and_call(first, _lists_by_name(examples), context)

    def _fill_and_call(
        self, first: tuple[Any, ...], columns: Mapping[str, Any], context: Mapping[str, Any]
    ) -> Any:
        asked = self.parameters
        extra = dict(context) if asked.takes_context else {}
        if asked.by_position:
            return self.function(*own_copy(list(first)), **own_copy(extra))
        # A context field hides a column of the same name.
        known = {**columns, **context, **dict(zip(asked.standard, first, strict=True))}
        with_answer = {_ANSWER: context.get("visible_answer"), **known}
        named = {name: with_answer[name] for name in asked.required}
        named |= {name: known[name] for name in asked.optional if name in known}
        return self.function(**own_copy(extra | named))

    def _hint_of_batches(self) -> str:
        """Return what a function lacks whose parameters are those of a batched one."""
        names = inspect.signature(self.function).parameters
        if self.batched or _BATCHED[1] not in names:
            return ""
        return (
            f". A function of `{_BATCHED[1]}` takes lists: write @tp.reward(batched=True) above it"
        )

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise `ConfigError` if the function needs a column that the rows do not have."""
        standard, required = self.parameters.standard, self.parameters.required
        known = {*standard, *CONTEXT_FIELDS, *columns}
        if self.parameters.only_answer and _ANSWER in columns:
            raise ConfigError(
                f"your reward {self.name} would not see the completion: the rows have a column "
                f"`{_ANSWER}`, which the parameter receives. Ask for `{standard[1]}` or "
                f"`visible_answer` as well{self._hint_of_batches()}"
            )
        if self._takes_own_answer(columns):
            known.add(_ANSWER)
        missing = [name for name in required if name not in known]
        if not missing:
            return
        hints = [parameter_hint(name, batched=self.batched) for name in missing]
        if foreign := ". ".join(filter(None, hints)):
            raise ConfigError(
                f"your reward {self.name} asks for {_quoted(missing)}; the rows have "
                f"{_quoted(columns) or 'no columns'}. {foreign[0].upper()}{foreign[1:]}"
            )
        near = get_close_matches(missing[0], sorted(known - {*required}), n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ConfigError(
            f"your reward {self.name} asks for {_quoted(missing)}; the rows have "
            f"{_quoted(columns) or 'no columns'}.{hint} Rename the parameter, or the column by "
            f"--columns {missing[0]}=COLUMN, give the parameter a default, or ask for "
            f"`{standard[2]}`, which is the whole row"
        )

    def _takes_own_answer(self, columns: Collection[str]) -> bool:
        """Return whether `answer` is what the model answered, and not a column of another name.

        A function that compares the completion with `answer` and reads nothing of the row would
        compare the model's text with itself.
        """
        asked = {*self.parameters.required, *self.parameters.optional}
        prompt, completion, example = self.parameters.standard
        # A parameter of these names never receives the column.
        own = {prompt, completion, *CONTEXT_FIELDS}
        reads_row = asked & {example, *columns} - own
        return bool(reads_row) or completion not in asked


@overload
def reward(function: Callable[..., Any], /) -> Reward: ...


@overload
def reward(
    *, batched: bool = False, name: str | None = None
) -> Callable[[Callable[..., Any]], Reward]: ...


def reward(
    function: Callable[..., Any] | None = None, /, *, batched: bool = False, name: str | None = None
) -> Reward | Callable[[Callable[..., Any]], Reward]:
    """Decorate a reward function that takes lists, or that needs another name in reports.

    A batched reward is called once with all samples. `prompts`, `completions`, `examples`, and the
    columns and CONTEXT_FIELDS under their own names are lists. The function returns one value for
    each sample.
    """

    def decorate(function: Callable[..., Any]) -> Reward:
        return Reward(function, name or _name_of(function), batched)

    return decorate(function) if function else decorate


def as_reward(function: object) -> Reward:
    """Return the function as a `Reward`; a `Reward` is returned unchanged."""
    if isinstance(function, Reward):
        return function
    if not callable(function):
        kind = type(function).__name__
        raise ConfigError(f"a reward is {function!r} ({kind}); expected a function")
    return Reward(function, _name_of(function))


def own_copy(value: Any) -> Any:
    """Return a copy that shares nothing with `value` that can be changed.

    This takes a fraction of the time of `deepcopy` for JSON values, which rows mostly hold.
    """
    kind = type(value)
    if kind in _CONSTANTS:
        return value
    if kind is dict:
        return {key: own_copy(item) for key, item in value.items()}
    if kind is list:
        return [own_copy(item) for item in value]
    if kind is MappingProxyType:
        # Only the copy is needed: deepcopy refuses such views.
        return own_copy(dict(value))
    return deepcopy(value)


def _name_of(function: Callable[..., Any]) -> str:
    return function.__name__ if isinstance(function, FunctionType) else type(function).__name__


def _find_reward(module: str, qualname: str) -> Reward:
    """Return the reward that a module holds under this name; unpickling calls this."""
    return as_reward(vars(import_module(module))[qualname])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parameters:
    """Which parameters a call fills: three by position, or the required and optional names."""

    standard: tuple[str, str, str]
    by_position: bool
    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_context: bool
    only_answer: bool
    """Whether `answer` is the only parameter that could show what the model wrote."""


def _takes_three_by_position(parameters: Sequence[inspect.Parameter]) -> bool:
    required = [p for p in parameters if p.default is p.empty]
    positional = [p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    keywords = any(p.kind is p.KEYWORD_ONLY for p in required)
    return not keywords and (len(positional) == 3 or (starred and len(positional) < 3))


def _lists_by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return each column as a list, with None where a row lacks the column."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _quoted(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
