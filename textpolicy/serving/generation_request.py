"""A request as the engine takes it, and its rows while they are sampled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.decoding_batch import DecodingRow, StopRule
from textpolicy.generation.sampling import random_keys
from textpolicy.generation.stop_rules import StopAtStrings
from textpolicy.serving.refusal import RefusalError
from textpolicy.types import Sampling, StopReason


@dataclass(frozen=True, slots=True)
class Weights:
    """What an answer was sampled with: the name of a model, and its version."""

    name: str
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """What a client wants to be sampled: `n` rows for each prompt, as token ids, already checked.

    The rows are those that `ModelPolicy.generate` samples for the same prompts, `n` and seed.
    """

    model: str
    prompts: Sequence[list[int]]
    sampling: Sampling
    seed: int
    n: int = 1
    stop_tokens: frozenset[int] = frozenset()
    top_logprobs: int | None = None

    @property
    def longest(self) -> int:
        """The most tokens that a row may have, with its prompt."""
        return max(map(len, self.prompts)) + self.sampling.max_tokens


class Generation:
    """A request in the engine. The engine's thread writes it, and all other threads only read it.

    The first `lengths[i]` tokens of `rows[i]` may be read at any time. `weights` are
    what the rows are sampled with, once they have begun. When `done`, all rows have ended,
    or `refusal` says why they have not.
    """

    def __init__(
        self,
        request: GenerationRequest,
        rule: StopRule,
        on_change: "Callable[[Generation], None]",
        *,
        each_token: bool,
    ) -> None:
        self.request = request
        self.on_change = on_change
        self.each_token = each_token
        self.weights: Weights | None = None
        self.refusal: RefusalError | None = None
        self.done = False
        self.changed = False
        n = request.n
        numbers = [(p, m) for p in range(len(request.prompts)) for m in range(n)]
        keys = random_keys(request.seed, numbers)
        self.rows = [
            DecodingRow(
                context=request.prompts[prompt],
                sampling=request.sampling,
                stop=rule,
                key=key,
                prompt=prompt,
                member=member,
                top_logprobs=request.top_logprobs,
                on_token=self._advance,
                keep_prefix=n == 1,
            )
            for (prompt, member), key in zip(numbers, keys, strict=True)
        ]
        self.lengths = [0] * len(self.rows)
        self.unfinished = len(self.rows)

    def groups(self) -> list[list[DecodingRow]]:
        """Return the rows of each prompt."""
        n = self.request.n
        return [self.rows[start : start + n] for start in range(0, len(self.rows), n)]

    def _advance(self, row: DecodingRow) -> None:
        self.lengths[row.prompt * self.request.n + row.member] = len(row.tokens)
        self.unfinished -= row.stop_reason is not None
        self.changed = True


def stop_rule_for(tokenizer: TokenizerWrapper, request: GenerationRequest) -> StopRule:
    """Return when the rows of a request end."""
    ends = StopAtStrings(tokenizer, request.sampling.stop)
    if not request.stop_tokens:
        return ends

    def rule(tokens: list[int]) -> StopReason | None:
        return StopReason.STOP_TOKEN if tokens[-1] in request.stop_tokens else ends(tokens)

    return rule
