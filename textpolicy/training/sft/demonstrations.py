"""Demonstrations: token ids, and which of them are learned."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from textpolicy.errors import TrainingError


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """One sequence to imitate. `mask` is True on the answer, stop token included."""

    tokens: list[int]
    mask: list[bool]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.mask):
            raise ValueError(
                "a demonstration's tokens and mask must have equal length; got "
                f"{len(self.tokens)} and {len(self.mask)}"
            )
        if not any(self.mask) or self.mask[0]:
            raise TrainingError(
                "a demonstration needs at least one token to learn, and a token before it: "
                f"mask is {self.mask}"
            )

    def truncate(self, length: int) -> "Demonstration | None":
        """Return the first `length` tokens, or None if none of them is learned."""
        if len(self.tokens) <= length:
            return self
        if not any(self.mask[:length]):
            return None
        return replace(self, tokens=self.tokens[:length], mask=self.mask[:length])


PackedRow = Sequence[Demonstration]
"""One row of a batch: one demonstration, or several packed one after another."""
