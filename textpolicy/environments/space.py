"""The space of all strings, which is what language models observe and do."""

from string import ascii_letters, digits, punctuation
from typing import Any

import numpy as np
from gymnasium import Space

_SAMPLED = ascii_letters + digits + punctuation + " \n" + "äß漢字🙂"
_LONGEST_SAMPLE = 64


class AnyText(Space[str]):
    """Contains every string: empty, of any script, of any length.

    Gymnasium's own `Text` contains letters and digits only, unless it is given all characters
    there are, which takes seconds.
    """

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(shape=(), dtype=str, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> str:
        """Up to 64 characters of several scripts."""
        length = int(self.np_random.integers(_LONGEST_SAMPLE + 1))
        return "".join(
            str(character) for character in self.np_random.choice(list(_SAMPLED), length)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyText)

    def __hash__(self) -> int:
        return hash(AnyText)

    def __repr__(self) -> str:
        return "AnyText()"
