"""Play tic-tac-toe against an opponent that wins if it can and otherwise plays a random move.

This environment is a Gymnasium class. The model is X and names a free cell from 1 to 9. The reward
is 1 for a win, 0.5 for a draw, and 0 for a loss or an illegal move.
"""

from functools import cache
from string import printable
from typing import Any

import gymnasium as gym
from gymnasium.spaces import Text

MAX_TOKENS = 4
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
Step = tuple[str, float, bool, bool, dict[str, Any]]


class TicTacToe(gym.Env[str, str]):
    """The seed of `reset` decides who begins, and the opponent's random moves."""

    observation_space = Text(200, charset=printable)
    action_space = Text(1, charset="123456789")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.cells = "." * 9
        if self.np_random.random() < 0.5:
            self._play_opponent()
        return f"You are X. Name a free cell, 1 to 9:\n{self._board()}", self._info()

    def step(self, action: str) -> Step:
        cell = action.strip()
        if cell not in tuple("123456789") or self.cells[int(cell) - 1] != ".":
            return self._end("no free cell", 0.0)
        self.cells = _played(self.cells, int(cell) - 1, "X")
        if not _won(self.cells, "X") and "." in self.cells:
            self._play_opponent()
        if _won(self.cells, "X"):
            return self._end("you win", 1.0)
        if _won(self.cells, "O"):
            return self._end("you lose", 0.0)
        if "." not in self.cells:
            return self._end("a draw", 0.5)
        return self._board(), 0.0, False, False, self._info()

    def _play_opponent(self) -> None:
        free = _free(self.cells)
        wins = [cell for cell in free if _won(_played(self.cells, cell, "O"), "O")]
        cell = wins[0] if wins else int(self.np_random.choice(free))
        self.cells = _played(self.cells, cell, "O")

    def _board(self) -> str:
        return "\n".join(self.cells[start : start + 3] for start in (0, 3, 6))

    def _end(self, text: str, reward: float) -> Step:
        return text, reward, True, False, {}

    def _info(self) -> dict[str, Any]:
        best = max(_free(self.cells), key=lambda cell: -_value(_played(self.cells, cell, "X"), "O"))
        return {"gold": str(best + 1)}


def _free(cells: str) -> list[int]:
    return [cell for cell, mark in enumerate(cells) if mark == "."]


def _played(cells: str, cell: int, mark: str) -> str:
    return f"{cells[:cell]}{mark}{cells[cell + 1 :]}"


def _won(cells: str, mark: str) -> bool:
    return any(all(cells[cell] == mark for cell in line) for line in LINES)


@cache
def _value(cells: str, mark: str) -> int:
    """Return 1 if the player `mark`, who moves next, can force a win, 0 for a draw, else -1."""
    other = "O" if mark == "X" else "X"
    if _won(cells, other):
        return -1
    free = _free(cells)
    return max((-_value(_played(cells, cell, mark), other) for cell in free), default=0)
