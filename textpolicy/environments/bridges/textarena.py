"""Games of TextArena by name, against a seeded opponent where they need one."""

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

from textpolicy.environments.environment import Environment, from_gymnasium
from textpolicy.environments.space import AnyText
from textpolicy.errors import ConfigError, TaskError

_MAX_TOKENS = 256
# Games fall over numbers of thousands of digits; no move is nearly as long.
_MAX_CHARACTERS = 1000
Opponent = Callable[[str, Random], str]
"""Given what the other player sees and a generator: that player's move."""
_MOVE = re.compile(r"\[[^\[\]\s]+\]")


def load(name: str, opponent: Opponent | None = None) -> Environment:
    """The game of that id, such as "TicTacToe-v0"; we are player 0.

    The default opponent draws one of the moves that the game lists in brackets.
    """
    known = _games()
    if name not in known:
        near = get_close_matches(name, known, n=3)
        raise TaskError(f"TextArena has no game {name!r}; the nearest of its {len(known)}: {near}")
    make = partial(TextArenaEnv, name, opponent or random_listed_move)
    return from_gymnasium(make, name=f"textarena:{name}", max_tokens=_MAX_TOKENS)


def random_listed_move(observation: str, rng: Random) -> str:
    """One of the bracketed moves of the last line that has any."""
    for line in reversed(observation.splitlines()):
        if moves := _MOVE.findall(line):
            return rng.choice(moves)
    return ""


class TextArenaEnv(gym.Env[str, str]):
    """A fresh game at each `reset`; observations hold what is new since the last.

    The reward is the game's for player 0, at its end. The game reads 1,000 characters of an answer.
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
        with self._alone():
            self._game = _start(self._name, number)
            self._over = False
            self._oppose()
            return self._news(""), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        with self._alone():
            self._over, _ = self._game.step(action[:_MAX_CHARACTERS])
            self._oppose()
            if not self._over:
                return self._news(action), 0.0, False, False, {}
            rewards, infos = self._game.close()
        return str(infos[0].get("reason", "")), float(rewards.get(0, 0)), True, False, {}

    def _oppose(self) -> None:
        while not self._over:
            player, observation = self._game.get_observation()
            if player == 0:
                return
            self._over, _ = self._game.step(self._opponent(str(observation), self._rng))

    def _news(self, action: str) -> str:
        """What player 0 has not seen yet: the game repeats itself, and our own move."""
        _, observation = self._game.get_observation()
        seen, self._seen = self._seen, str(observation)
        news = self._seen.removeprefix(seen)
        before, said, after = news.partition(action) if action else ("", "", news)
        return after if said and "\n" not in before.strip() else news

    @contextmanager
    def _alone(self) -> Generator[None, None, None]:
        """Games draw from Python's and numpy's global generators: give them those of this game.

        Otherwise what one episode draws would depend on which others are played beside it.
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


def _start(name: str, seed: int) -> Any:
    library: Any = import_module("textarena")
    try:
        game = library.make(name)
    except LookupError as error:
        raise TaskError(
            f"TextArena's {name} needs word lists that are not on this machine; with a network, "
            f"its first use fetches them: {str(error).strip().splitlines()[0]}"
        ) from error
    for players in (1, 2):
        try:
            game.reset(num_players=players, seed=seed)
        except (AssertionError, ValueError):
            game = library.make(name)
        else:
            return game
    raise TaskError(f"TextArena's {name} is for more than 2 players; expected 1 or 2")


def _games() -> list[str]:
    try:
        registration: Any = import_module("textarena.envs.registration")
    except ImportError as error:
        raise ConfigError(
            "environments of TextArena need the library: pip install 'textpolicy[textarena]'"
        ) from error
    return list(registration.ENV_REGISTRY)
