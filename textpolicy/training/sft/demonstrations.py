"""What is imitated: token ids, and which of them are learned."""

from dataclasses import dataclass, replace

from textpolicy.errors import TrainingError


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """One sequence to imitate: `mask` is True on the answer, its stop token included."""

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

    def cut(self, length: int) -> "Demonstration | None":
        """Its first `length` tokens; None if nothing of what is learned is among them."""
        if len(self.tokens) <= length:
            return self
        if not any(self.mask[:length]):
            return None
        return replace(self, tokens=self.tokens[:length], mask=self.mask[:length])
