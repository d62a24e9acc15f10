"""Checks of what `reset` and `step` of an environment return, which is the user's code.

Call these functions inside `environment_errors`: the methods of the values may raise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from textpolicy.errors import TaskError
from textpolicy.rewards.returned_numbers import MAX_REWARD, check_metrics, to_number
from textpolicy.types import Message, Prompt, TextEnv
from textpolicy.user_code import describe_value

_MAX_CHARACTERS = 200_000
"""No model has a context for more, and reading such a text into tokens takes minutes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What `step` returned, checked. `messages` are what the model gets to read."""

    messages: Sequence[Message]
    reward: float
    terminated: bool
    truncated: bool
    info: Mapping[str, Any]
    metrics: Mapping[str, float]


def open_episode(env: TextEnv, seed: int | None) -> tuple[Prompt, Mapping[str, Any]]:
    """Call `reset`. Return the prompt, which is `info["messages"]` or the observation, and info.

    Raise `TaskError` if a value has another type.
    """
    opened: Any = env.reset(seed=seed)
    if not isinstance(opened, tuple) or len(opened) != 2:
        what = f"{len(opened)} values" if isinstance(opened, tuple) else describe_value(opened)
        raise TaskError(f"reset returned {what}; expected 2 values: observation and info")
    info = _check_info(opened[1])
    if messages := _messages_in(info):
        return messages, info
    if not isinstance(opened[0], str):
        raise TaskError(
            f"the environment starts with {describe_value(opened[0])}; expected text. Wrap the "
            "environment so that observations and actions are strings"
        )
    return _check_text("the first observation", opened[0]), info


def check_step_result(step: Any) -> StepResult:
    """Return what `step` returned, or raise `TaskError` if a value has another type."""
    if not isinstance(step, tuple) or len(step) != 5:
        what = f"{len(step)} values" if isinstance(step, tuple) else describe_value(step)
        names = "observation, reward, terminated, truncated and info"
        raise TaskError(f"step returned {what}; expected 5 values: {names}")
    observation, reward, terminated, truncated, given = step
    text = _check_text("the observation", observation)
    if not abs(number := to_number(reward)) <= MAX_REWARD:
        raise TaskError(
            f"the reward is {describe_value(reward)}; expected a finite number from -1e12 to 1e12"
        )
    info = _check_info(given)
    metrics = check_metrics(info.get("metrics", {}))
    if isinstance(metrics, str):
        raise TaskError(f"info has {metrics}")
    return StepResult(
        messages=_messages_in(info) or [{"role": "user", "content": text}],
        reward=number,
        terminated=_check_flag("terminated", terminated),
        truncated=_check_flag("truncated", truncated),
        info=info,
        metrics=metrics,
    )


def gold_in(info: Mapping[str, Any]) -> str:
    """Return the gold answer to the last observation; raise `TaskError` if there is none."""
    if "gold" not in info:
        raise TaskError(
            "info has no key 'gold', so the gold answer is not known; expected the right answer to "
            "the last observation"
        )
    return _check_text("info['gold']", info["gold"])


def _check_text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TaskError(f"{what} is {describe_value(value)}; expected text")
    # A subclass of str could have methods of its own; `join` copies the characters.
    text = "".join([value])
    if len(text) > _MAX_CHARACTERS:
        raise TaskError(f"{what} has {len(text)} characters; expected at most {_MAX_CHARACTERS}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TaskError(
            f"{what} cannot be encoded: {error}; expected text without half surrogate pairs"
        ) from error
    return text


def _check_info(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TaskError(f"info is {describe_value(value)}; expected a mapping")
    return dict(value)


def _messages_in(info: Mapping[str, Any]) -> list[Message]:
    given = info.get("messages")
    if not isinstance(given, list | tuple | None):
        raise TaskError(f"info['messages'] is {describe_value(given)}; expected a list of messages")
    checked = [_check_message(message) for message in given or ()]
    if sum(len(message["content"]) for message in checked) > _MAX_CHARACTERS:
        raise TaskError(
            f"info['messages'] has more than {_MAX_CHARACTERS} characters; expected fewer"
        )
    return checked


def _check_message(message: Any) -> Message:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise TaskError(
            f"info['messages'] holds {describe_value(message)}; expected mappings with the keys "
            "role and content"
        )
    texts = {
        key: _check_text(f"the {key} of a message", message[key]) for key in ("role", "content")
    }
    return dict(message) | texts


def _check_flag(name: str, value: Any) -> bool:
    # numpy's booleans are not Python's.
    if not isinstance(value, bool | np.bool_):
        raise TaskError(f"{name} is {describe_value(value)}; expected True or False")
    return bool(value)
