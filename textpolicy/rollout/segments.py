"""The token sequences of a rollout, from its completions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from textpolicy.types import NOT_SAMPLED, Completion, Segment


@dataclass(slots=True)
class _OpenSegment:
    """A segment that later completions may continue."""

    tokens: list[int] = field(default_factory=list[int])
    mask: list[bool] = field(default_factory=list[bool])
    logprobs: list[float] = field(default_factory=list[float])
    versions: list[int] = field(default_factory=list[int])

    def add(self, turn: Completion) -> None:
        """Add a completion whose prompt begins with all tokens of the segment."""
        read = turn.prompt_tokens[len(self.tokens) :]
        self.tokens += read + turn.tokens
        self.mask += [False] * len(read) + [True] * len(turn.tokens)
        self.logprobs += [0.0] * len(read) + turn.logprobs
        self.versions += [NOT_SAMPLED] * len(read)
        self.versions += turn.versions or [turn.version] * len(turn.tokens)


def join_completions(completions: Sequence[Completion]) -> list[Segment]:
    """Return the segments: a completion continues the longest one that its prompt begins with.

    Shorter prompts come first, so that completions that were sampled at the same time have one
    order. Every sampled token counts in one segment, and is context in the others. The segments
    have versions of their tokens only if the tokens are of several versions.
    """
    segments: list[_OpenSegment] = []
    for turn in sorted(
        completions, key=lambda c: (len(c.prompt_tokens), c.prompt_tokens, c.tokens)
    ):
        continued = [one for one in segments if turn.prompt_tokens[: len(one.tokens)] == one.tokens]
        if not continued:
            segments.append(_OpenSegment())
            continued = segments[-1:]
        max(continued, key=lambda one: len(one.tokens)).add(turn)
    mixed = len({turn.version for turn in completions}) > 1 or any(t.versions for t in completions)
    return [
        Segment(
            tokens=s.tokens,
            mask=s.mask,
            logprobs=s.logprobs,
            versions=s.versions if mixed else [],
        )
        for s in segments
    ]
