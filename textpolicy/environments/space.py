"""AnyText: the Gymnasium space of all strings."""

from string import ascii_letters, digits, punctuation
from typing import Any

import numpy as np
from gymnasium import Space

_SAMPLED = ascii_letters + digits + punctuation + " \n" + "äß漢字🙂"
_MAX_SAMPLE_LENGTH = 64


class AnyText(Space[str]):
    """Contains every string: the empty string, any script and any length.

    Gymnasium's own `Text` contains only letters and digits unless it gets a character set, and a
    set of all characters takes seconds to build.
    """

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(shape=(), dtype=str, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> str:
        """Return at most 64 random characters of several scripts."""
        length = int(self.np_random.integers(_MAX_SAMPLE_LENGTH + 1))
        return "".join(map(str, self.np_random.choice(list(_SAMPLED), length)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyText)

    def __hash__(self) -> int:
        return hash(AnyText)

    def __repr__(self) -> str:
        return "AnyText()"
