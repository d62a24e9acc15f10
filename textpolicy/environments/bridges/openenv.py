"""Environments of OpenEnv servers, over the official client. Each episode has its own session.

The client of openenv 0.10 imports the server's libraries too, which takes seconds. It is imported
when an environment is loaded.
"""

import json
import time
import urllib.request
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from importlib import import_module
from typing import Any

import gymnasium as gym

from textpolicy.environments.bridges.gymnasium import from_gymnasium
from textpolicy.environments.environment import Environment
from textpolicy.environments.space import AnyText
from textpolicy.errors import ConfigError, TaskError
from textpolicy.untrusted.parsing import parse_json

_MAX_TOKENS = 256
_MAX_TURNS = 50
_SECONDS = 60.0
_MAX_SCHEMA_BYTES = 1 << 20
_CAPACITY_SECONDS = 5.0
"""How long a session is asked for again while the server has no free one."""
_RETRY_SECONDS = 0.1
_NOT_OBSERVED = {"done", "reward", "metadata"}
_NUMBERS: Mapping[str, Callable[[str], Any]] = {"integer": int, "number": float}

ObserveFn = Callable[[Mapping[str, Any]], str]
"""Returns the text that the model reads of an observation."""

ActFn = Callable[[str], Mapping[str, Any]]
"""Returns the action that an answer means, or raises ValueError with what the model should read."""


def load(
    name: str,
    *,
    observe: ObserveFn | None = None,
    act: ActFn | None = None,
    max_turns: int = _MAX_TURNS,
    max_tokens: int = _MAX_TOKENS,
    timeout: float = _SECONDS,
) -> Environment:
    """Return the environment of the OpenEnv server at the URL `name`.

    `observe` is `observation_text` by default, and `act` is `ActionForm.action` with the server's
    schema of actions. An episode is cut off after `max_turns` answers. The server may take
    `timeout` seconds for an answer.
    """
    if not name.startswith(("http://", "https://")):
        raise TaskError(f"openenv:{name} is no URL; expected openenv:http://HOST:PORT")
    try:
        import_module("openenv.core.generic_client")
    except ImportError as error:
        raise ConfigError(
            "environments of OpenEnv need the library: pip install 'textpolicy[openenv]'"
        ) from error
    url = name.rstrip("/")
    act = act or _read_form(url, timeout).action
    make = partial(OpenEnvEnv, url, observe or observation_text, act, max_turns, timeout)
    return from_gymnasium(make, name=f"openenv:{url}", max_tokens=max_tokens)


class OpenEnvEnv(gym.Env[str, str]):
    """An episode in a session of its own with an OpenEnv server.

    An answer that is no action gets an error message and no reward, and the episode continues.
    """

    def __init__(
        self, url: str, observe: ObserveFn, act: ActFn, max_turns: int, timeout: float
    ) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._url = url
        self._observe = observe
        self._act = act
        self._max_turns = max_turns
        self._timeout = timeout
        self._close: Callable[[], Any] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.close()
        self._turns = 0
        self._client, result = _open_session(self._url, self._timeout, seed)
        # An environment that nobody closes must not keep its session.
        finalizer = weakref.finalize(self, self._client.close)
        finalizer.atexit = False
        self._close = finalizer
        self._connection = _connection_of(self._client)
        return self._observe(result.observation), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._turns += 1
        truncated = self._turns >= self._max_turns
        try:
            meant = dict(self._act(action))
        except ValueError as error:
            return f"error: {error}", 0.0, False, truncated, {}
        try:
            result = self._client.step(meant)
        except RuntimeError as error:
            self._check_connection()
            if "VALIDATION_ERROR" not in str(error):
                raise
            return "error: this is no valid action", 0.0, False, truncated, {}
        except TimeoutError as error:
            raise TaskError(
                f"the OpenEnv server gave no answer to a step within {self._timeout:g} s"
            ) from error
        self._check_connection()
        over = bool(result.done)
        text = self._observe(result.observation)
        return text, float(result.reward or 0.0), over, truncated and not over, {}

    def _check_connection(self) -> None:
        if _connection_of(self._client) is not self._connection:
            raise TaskError("the OpenEnv server ended the session in the middle of the episode")

    def close(self) -> None:
        """End the session."""
        if self._close is not None:
            self._close()
            self._close = None


def observation_text(observation: Mapping[str, Any]) -> str:
    """Return the text of an observation with one field of text, or else the observation as JSON.

    Fields without a value, and `done`, `reward` and `metadata`, are left out.
    """
    seen = {
        name: value
        for name, value in observation.items()
        if name not in _NOT_OBSERVED and value is not None
    }
    match [*seen.values()]:
        case [str(text)]:
            return text
        case _:
            return json.dumps(seen, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class ActionForm:
    """The fields of an action with their JSON types, and which of them an action needs."""

    types: Mapping[str, str]
    required: tuple[str, ...]

    @classmethod
    def of(cls, schema: Mapping[str, Any]) -> "ActionForm":
        """Return the form that a JSON schema describes."""
        properties = {
            name: str(field.get("type", "any value"))
            for name, field in schema.get("properties", {}).items()
            if name != "metadata"
        }
        needed = tuple(name for name in schema.get("required", ()) if name in properties)
        return cls(types=properties, required=needed or tuple(properties))

    def action(self, answer: str) -> Mapping[str, Any]:
        """Return the action that an answer means, or raise ValueError.

        A JSON object with fields of an action is the action. Any other answer is the value of the
        only field that an action needs: a text, or a number.
        """
        given = _json_object(answer)
        if given is not None and set(self.required) <= given.keys() <= self.types.keys():
            return given
        if len(self.required) != 1:
            raise ValueError(f"expected a JSON object with {', '.join(self.required)}")
        (name,) = self.required
        kind = self.types[name]
        if kind == "string":
            return {name: answer}
        try:
            return {name: _NUMBERS.get(kind, parse_json)(answer.strip())}
        except ValueError as error:
            raise ValueError(f"expected {name} as JSON: {kind}") from error


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_form(url: str, timeout: float) -> ActionForm:
    """Return the form of actions that the server describes."""
    try:
        with urllib.request.urlopen(f"{url}/schema", timeout=timeout) as response:
            schema = parse_json(response.read(_MAX_SCHEMA_BYTES))
        return ActionForm.of(schema["action"])
    except (OSError, HTTPException) as error:
        raise TaskError(f"no OpenEnv server answers at {url}/schema: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TaskError(
            f"{url}/schema describes no action as OpenEnv does. Pass act=, a function that makes "
            "an action from an answer"
        ) from error


def _open_session(url: str, timeout: float, seed: int | None) -> tuple[Any, Any]:
    """Return a client with a session of its own, and the result of its reset."""
    client_class = import_module("openenv.core.generic_client").GenericEnvClient
    seeds = {} if seed is None else {"seed": seed}
    deadline = time.monotonic() + _CAPACITY_SECONDS
    while True:
        client = client_class(base_url=url, message_timeout_s=timeout).sync()
        try:
            return client, client.reset(**seeds)
        except RuntimeError as error:
            client.close()
            if "CAPACITY_REACHED" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise TaskError(
                    f"the OpenEnv server has no free session: {error}. Every rollout that is "
                    "played at the same time needs one. Start the server with a higher "
                    "max_concurrent_envs, or lower the group size and the number of groups"
                ) from error
        except TimeoutError as error:
            client.close()
            raise TaskError(f"the OpenEnv server gave no answer within {timeout:g} s") from error
        time.sleep(_RETRY_SECONDS)


def _connection_of(client: Any) -> Any:
    """Return the connection of a client of openenv 0.10.

    The client connects again without a word, to an environment that nobody has reset.
    """
    return client.async_client._ws
