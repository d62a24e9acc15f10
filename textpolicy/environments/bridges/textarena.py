"""Games of the TextArena library, for one player or against an opponent with a seed."""

import json
import random
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from io import StringIO
from random import Random
from typing import Any

import gymnasium as gym
import numpy as np

from textpolicy.environments.bridges.gymnasium import from_gymnasium
from textpolicy.environments.environment import Environment
from textpolicy.environments.space import AnyText
from textpolicy.errors import ConfigError, TaskError

_MAX_TOKENS = 256
# Games raise errors on numbers of thousands of digits, and no legal move is this long.
_MAX_MOVE_CHARACTERS = 1000
Opponent = Callable[[str, Random], str]
"""Takes the opponent's observation and a random generator; returns the opponent's move."""
_MOVE = re.compile(r"\[[^\[\]\s]+\]")


def load(name: str, opponent: Opponent | None = None) -> Environment:
    """Return the environment of a game, such as "TicTacToe-v0". The model is player 0.

    The default opponent plays a random move of those that the game lists in brackets.
    """
    try:
        registration: Any = import_module("textarena.envs.registration")
    except ImportError as error:
        raise ConfigError(
            "environments of TextArena need the library: pip install 'textpolicy[textarena]'"
        ) from error
    known = list(registration.ENV_REGISTRY)
    if name not in known:
        near = get_close_matches(name, known, n=3)
        raise TaskError(
            f"TextArena has no game {name!r}; the nearest names among its {len(known)} are {near}"
        )
    make = partial(TextArenaEnv, name, opponent or random_listed_move)
    return from_gymnasium(make, name=f"textarena:{name}", max_tokens=_MAX_TOKENS)


def random_listed_move(observation: str, rng: Random) -> str:
    """Return a random move in brackets from the last line that has one, or "" without a move."""
    for line in reversed(observation.splitlines()):
        if moves := _MOVE.findall(line):
            return rng.choice(moves)
    return ""


class TextArenaEnv(gym.Env[str, str]):
    """A game against `opponent`. Each observation has only text that is new.

    The reward comes at the end and is the game's reward of player 0. The game gets at most 1,000
    characters of an answer.
    """

    def __init__(self, name: str, opponent: Opponent = random_listed_move) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._name = name
        self._opponent = opponent

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        number = int(self.np_random.integers(2**31))
        self._rng = Random(number)
        self._states = (Random(number).getstate(), np.random.RandomState(number).get_state())
        self._seen = ""
        with self._own_random_state():
            self._game = _start(self._name, number)
            self._over = False
            problem = _describe_state(self._game.state.game_state)
            self._play_opponent()
            return self._new_text(""), {"problem": problem}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        with self._own_random_state():
            self._over, _ = self._game.step(action[:_MAX_MOVE_CHARACTERS])
            self._play_opponent()
            if not self._over:
                return self._new_text(action), 0.0, False, False, {}
            rewards, infos = self._game.close()
        return str(infos[0].get("reason", "")), float(rewards.get(0, 0)), True, False, {}

    def _play_opponent(self) -> None:
        while not self._over:
            player, observation = self._game.get_observation()
            if player == 0:
                return
            self._over, _ = self._game.step(self._opponent(str(observation), self._rng))

    def _new_text(self, action: str) -> str:
        """Return what player 0 has not seen: the game repeats earlier text and the last action."""
        _, observation = self._game.get_observation()
        seen, self._seen = self._seen, str(observation)
        text = self._seen.removeprefix(seen)
        before, repeated, after = text.partition(action) if action else ("", "", text)
        return after if repeated and "\n" not in before.strip() else text

    @contextmanager
    def _own_random_state(self) -> Generator[None, None, None]:
        """Set Python's and numpy's global generators to this game's own states inside the block.

        Games draw from the global generators, so parallel episodes would change each other.
        """
        outer = (random.getstate(), np.random.get_state())
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
        try:
            with redirect_stdout(StringIO()):
                yield
        finally:
            self._states = (random.getstate(), np.random.get_state())
            random.setstate(outer[0])
            np.random.set_state(outer[1])


def _describe_state(state: Any) -> str:
    """Return the first state of a game as text, with hidden parts such as a secret number.

    Objects give their type alone, because a text with their address would differ in every run.
    """
    return json.dumps(state, default=lambda value: type(value).__name__, skipkeys=True)


def _start(name: str, seed: int) -> Any:
    library: Any = import_module("textarena")
    try:
        game = library.make(name)
    except LookupError as error:
        raise TaskError(
            f"TextArena's {name} needs word lists that are not on this machine and could not be "
            f"downloaded: {str(error).strip().splitlines()[0]}"
        ) from error
    for players in (1, 2):
        try:
            game.reset(num_players=players, seed=seed)
        except (AssertionError, ValueError):
            game = library.make(name)
        else:
            return game
    raise TaskError(f"TextArena's {name} has more than 2 players; expected 1 or 2")
