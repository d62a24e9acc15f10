"""The nouns of the library. Read this file first: every other part uses these types."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from itertools import compress
from pathlib import Path
from types import UnionType
from typing import Any, Protocol, SupportsFloat, runtime_checkable

import mlx.core as mx
from jaxtyping import Bool, Float, Int

from textpolicy.errors import ConfigError

Message = Mapping[str, str]
"""A chat message: its "role" and its "content"."""
Prompt = str | Sequence[Message]
"""One user message as a string, or a conversation."""
NOT_SAMPLED = -1
"""The version of a rollout that no policy sampled, so that its log-probabilities are unknown."""


class Progress(Enum):
    """What a callback returns: continue the run, or stop the run after this event."""

    MORE = auto()
    STOP = auto()


def asks_to_stop(answer: object, callback: str) -> bool:
    """Return whether the answer of `callback` ends the run; None and False mean `Progress.MORE`.

    False is what `condition and print(event)` returns.
    """
    if answer is not None and answer is not False and not isinstance(answer, Progress):
        raise ConfigError(
            f"the callback {callback} returned {answer!r:.60}; return Progress.STOP to end the "
            "run, or Progress.MORE or None to continue"
        )
    return answer is Progress.STOP


class StopReason(StrEnum):
    """Why a completion ended."""

    STOP_TOKEN = "stop_token"
    """A stop token was sampled. It is the last token of the completion, and it is trained on."""
    STOP_STRING = "stop_string"
    """The text contains one of the stop strings."""
    LENGTH = "length"
    """The completion was cut off after `max_tokens` tokens."""
    CANCELLED = "cancelled"
    """The caller no longer wanted the completion."""


FieldCheck = tuple[type | UnionType, Callable[[Any], bool], str]
"""The type of a field, a test of its value, and a description of allowed values."""


def check_fields(options: object, **checks: FieldCheck) -> None:
    """Raise `ConfigError` for the first field of `options` whose value is not allowed."""
    for name, (kind, holds, expected) in checks.items():
        value = getattr(options, name)
        if not isinstance(value, kind) or not holds(value):
            raise ConfigError(f"{name} is {value!r}; expected {expected}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a policy samples tokens. `temperature` 0 is greedy decoding."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number = int | float
        check_fields(
            self,
            max_tokens=(int, lambda x: x >= 1, "a whole number, at least 1"),
            temperature=(number, lambda x: x >= 0, "a number, 0 (greedy) or more"),
            top_p=(number, lambda x: 0 < x <= 1, "a number in (0, 1]"),
            top_k=(int, lambda x: x >= 0, "a whole number, 0 (off) or more"),
            min_p=(number, lambda x: 0 <= x < 1, "a number in [0, 1)"),
            repetition_penalty=(number, lambda x: x > 0, "a number above 0 (1 is off)"),
            stop=(tuple, all, "a tuple of non-empty strings"),
        )

    @property
    def usable_for_training(self) -> bool:
        """Whether a policy loss may use completions that were sampled in this way.

        The trainer computes log-probabilities from logits and temperature. It does not repeat
        truncation (top-p, top-k, min-p) or penalties, so these are for evaluation only.
        """
        plain = (self.top_p, self.top_k, self.min_p, self.repetition_penalty) == (1.0, 0, 0.0, 1.0)
        return plain and self.temperature > 0


@runtime_checkable
class TextEnv(Protocol):
    """The part of a `gymnasium.Env` that an episode uses. Observations and actions are text."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]: ...

    def step(self, action: Any, /) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentPlay:
    """One rollout that an agent plays: its task, and how the agent reaches the policy."""

    prompt: Prompt
    example: Mapping[str, Any]
    base_url: str
    api_key: str
    model: str


@dataclass(frozen=True, slots=True)
class AgentOutcome:
    """How a play of an agent ended: the score that the agent gave, or what failed."""

    score: float | None = None
    error: str | None = None


@runtime_checkable
class Agent(Protocol):
    """Code that plays tasks by asking a policy through an OpenAI-compatible server.

    `max_turns` limits the answers that one rollout may ask for.
    """

    @property
    def max_turns(self) -> int: ...

    def play(
        self,
        plays: Sequence[AgentPlay],
        on_end: Callable[[int, AgentOutcome], None],
        stopped: Callable[[], bool],
        /,
    ) -> None:
        """Play all rollouts, several at a time. Call `on_end` with the number of each that ends.

        If `stopped` is true after a call of `wake`, kill all agents that still play, and return.
        """
        ...

    def wake(self) -> None: ...

    def close(self) -> None:
        """End the processes that are kept for further plays."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One row of the data: a prompt, and in `example` the columns that its reward needs.

    With `agent`, each rollout of the task is what the agent asks the policy for. With `env`, each
    rollout is an episode: `env()` makes an environment, and `reset(seed=seed)` starts it.
    `preamble` is what the model reads before the prompt: a system message, and questions with their
    answers as examples.
    """

    id: str
    prompt: Prompt
    example: Mapping[str, Any] = field(default_factory=dict[str, Any])
    env: Callable[[], TextEnv] | None = None
    agent: Agent | None = None
    seed: int = 0
    preamble: Sequence[Message] = ()

    @property
    def asked(self) -> Prompt:
        """What a policy is asked: the prompt, with the preamble before it."""
        if not self.preamble:
            return self.prompt
        own = (
            [{"role": "user", "content": self.prompt}]
            if isinstance(self.prompt, str)
            else self.prompt
        )
        has_system = own[0]["role"] == "system"
        before = [one for one in self.preamble if not (has_system and one["role"] == "system")]
        first = 1 if has_system else 0
        return [*own[:first], *before, *own[first:]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a policy returns for one prompt.

    `prompt_tokens` are the ids that the model read, with the chat template applied. `tokens` are
    the ids that were sampled, with the stop token, and `logprobs` are their log-probabilities
    under the distribution they were sampled from. `text` has no special tokens.

    `versions` are the adapter versions of the tokens, if new adapters came while they were sampled;
    then `version` is the oldest. If `versions` is empty, all tokens are of `version`.

    `in_thought` says that the prompt has opened a thought, so that the text begins inside it.
    `thought` and `answer` are the parts of the text; None if the policy does not tell them apart.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str
    stop_reason: StopReason
    sampling: Sampling
    version: int
    in_thought: bool = False
    thought: str | None = None
    answer: str | None = None
    versions: list[int] = field(default_factory=list[int])


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One turn of an episode: a completion, its reward, and the environment's replies."""

    completion: str
    reward: float
    replies: Sequence[Message] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One token sequence of a rollout.

    `tokens`, `mask` and `logprobs` have equal length. `mask` is True on every sampled token, the
    stop token included, and False on prompts and on an environment's replies. `logprobs` is 0
    where `mask` is False.

    `versions` are the adapter versions of the tokens, and NOT_SAMPLED where `mask` is False. If
    `versions` is empty, all sampled tokens are of the rollout's `version`.
    """

    tokens: list[int]
    mask: list[bool]
    logprobs: list[float]
    versions: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.mask) == len(self.logprobs):
            raise ValueError(
                "a rollout's tokens, mask and logprobs must have equal length; got "
                f"{len(self.tokens)}, {len(self.mask)}, {len(self.logprobs)}"
            )
        if self.versions and len(self.versions) != len(self.tokens):
            raise ValueError(
                f"a rollout has {len(self.versions)} versions for {len(self.tokens)} tokens; give "
                "one for each token, or none if all are of the rollout's version"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One scored answer or episode, token by token.

    `tokens`, `mask`, `logprobs` and `versions` are those of the first `Segment`. `version` is the
    oldest adapter version that a token was sampled with. A rollout has `later`
    segments if an agent rewrote the conversation, so that a prompt did not begin with the tokens
    of the completion before. `completion` is the text of the last turn.

    `reward` is None if the reward function returned None: then the rollout is not part of its
    group's baseline and gets no gradient. `rewards` are the parts of the reward by name, `error`
    is what failed in the user's code, and `metrics` are numbers to average over a step.
    `turns` are the turns with an environment, if the task has one. `stop_reason` is LENGTH if a
    limit on tokens or turns ended the episode.
    """

    tokens: list[int]
    mask: list[bool]
    logprobs: list[float]
    completion: str
    reward: float | None
    rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    stop_reason: StopReason
    sampling: Sampling
    version: int
    error: str | None = None
    turns: Sequence[Turn] = ()
    later: Sequence[Segment] = ()
    versions: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        _ = self.segments  # Raises if the lists of the first segment differ in length.

    @property
    def segments(self) -> list[Segment]:
        """All token sequences of the rollout, in the order in which they began."""
        first = Segment(
            tokens=self.tokens, mask=self.mask, logprobs=self.logprobs, versions=self.versions
        )
        return [first, *self.later]

    @property
    def sampled(self) -> int:
        """The number of sampled tokens in all segments."""
        return sum(self.mask) + sum(sum(segment.mask) for segment in self.later)

    @property
    def sampled_by_version(self) -> Counter[int]:
        """The number of sampled tokens of each adapter version."""
        counts = Counter[int]()
        for segment in self.segments:
            if segment.versions:
                counts.update(compress(segment.versions, segment.mask))
            else:
                counts[self.version] += sum(segment.mask)
        return +counts


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """The rollouts of one task. Most algorithms compare a rollout with the others of its group."""

    task: Task
    rollouts: Sequence[Rollout]

    @property
    def version(self) -> int:
        """The oldest adapter version that a rollout of the group was sampled with."""
        return min(rollout.version for rollout in self.rollouts)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The arrays of one micro-batch, which one forward pass reads. Each prompt is there once.

    Row r of `tokens` is what follows prompt `owner[r]` of `prompts`. Both arrays are padded on the
    right. `rows` and `token_count` are totals of the *whole* optimizer batch: a loss that divides
    by these totals adds up to the same number for every split into micro-batches.

    A row is a segment of a rollout, and `rollout` numbers the rollouts of the micro-batch from 0.
    `rollout` is None if each row is a whole rollout. `rows` counts rollouts, and a micro-batch has
    all segments of its rollouts.

    `logp_sampled` was recorded while sampling. `logp_old` is the denominator of ratios, and equals
    `logp_sampled` unless the trainer computed it again. `entropy` belongs to the current policy,
    and a loss may differentiate it. `entropies` are those of all counted tokens of the whole
    optimizer batch. `logp_ref`, `entropy` and `entropies` are None unless the loss needs them.
    """

    prompts: Int[mx.array, "prompts width"]
    prompt_lengths: Int[mx.array, " prompts"]
    owner: Int[mx.array, " batch"]
    group: Int[mx.array, " batch"]
    tokens: Int[mx.array, "batch time"]
    mask: Bool[mx.array, "batch time"]
    logp_sampled: Float[mx.array, "batch time"]
    logp_old: Float[mx.array, "batch time"]
    logp_ref: Float[mx.array, "batch time"] | None = None
    entropy: Float[mx.array, "batch time"] | None = None
    advantages: Float[mx.array, "batch time"]
    temperature: Float[mx.array, " batch"]
    rows: int
    token_count: int
    max_tokens: int
    entropies: Float[mx.array, " tokens"] | None = None
    rollout: Int[mx.array, " batch"] | None = None


Metrics = dict[str, float]
"""Numbers of one step by name; docs/metrics.md lists the names."""


@runtime_checkable
class Policy(Protocol):
    """Generates completions. Rollout workers use only these methods of a policy."""

    @property
    def version(self) -> int:
        """The version of the adapters that the next generation will use."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], *, n: int = 1, seed: int | None = None, first: int = 0
    ) -> list[list[Completion]]:
        """Return `n` completions for each prompt; the same seed gives the same completions.

        `first` is the place of the first prompt among all prompts of that seed: a part of the
        prompts gives what the whole gives for that part. `first` is passed only if it is not 0.
        """
        ...

    def reload(self, path: str | Path) -> int:
        """Load the adapters in `path` for the next generation, and return their version."""
        ...


@runtime_checkable
class AdaptablePolicy(Policy, Protocol):
    """A policy from which policies with other adapters over the same base can be made."""

    def with_adapter(self, source: str | Path | None) -> "AdaptablePolicy":
        """Return a policy that samples alike, with the adapter of `source` or with none."""
        ...

    def adapter_digest(self) -> str:
        """Return a hash of the tensors of the adapter, which is the same for no adapters."""
        ...


@runtime_checkable
class SwappingPolicy(Policy, Protocol):
    """A policy that may take new adapters between the tokens of a generation."""

    load_newer: Callable[[], bool] | None
    """Loads newer adapters if there are any, and returns whether there were. A policy that takes
    new adapters only between generations does not call it."""


RespondFn = Callable[[int, int, Completion], Sequence[Message] | None]
"""Takes prompt number, member and completion; returns the replies, or None if the row is over."""


@runtime_checkable
class ConversingPolicy(Policy, Protocol):
    """A policy that answers again after replies, as episodes of several turns need."""

    def converse(
        self,
        prompts: Sequence[Prompt],
        respond: RespondFn,
        *,
        n: int = 1,
        seed: int | None = None,
        first: int = 0,
    ) -> list[list[list[Completion]]]:
        """Return the turns of `n` rows for each prompt.

        The `prompt_tokens` of a turn begin with all tokens of the turn before: no token is
        tokenized again. `respond` is called once for each completion as soon as it is finished,
        the last completion of a row included. It may be called from several threads at the same
        time, for different rows.
        """
        ...


RewardFn = Callable[..., Any]
"""The user's reward function; `textpolicy.rewards` describes its arguments and what it returns."""
AdvantageFn = Callable[..., Float[mx.array, "groups group"]]
"""Takes rewards (groups, group) and returns advantages of the same shape; NaN is a missing reward.

The function may have two keyword arguments of the same shape: `lengths`, the number of sampled
tokens of each rollout, and `parts`, which maps each reward function's name to its rewards.
"""


@runtime_checkable
class Curriculum(Protocol):
    """An endless iterator of tasks that chooses each task by earlier results."""

    def __next__(self) -> Task: ...

    def observe(self, groups: Sequence[RolloutGroup], /) -> None:
        """Receive the rollouts of tasks that the iterator gave out."""


@runtime_checkable
class LossFn(Protocol):
    """Returns the loss to minimise and its metrics, from one forward pass.

    Loss and metrics are sums over the rows of this micro-batch, divided by totals of the whole
    batch, so that the numbers of the micro-batches add up. A metric whose name ends in "max" or
    "min" is combined by maximum or minimum instead.
    """

    def __call__(
        self, logp: Float[mx.array, "batch time"], batch: Batch, /
    ) -> tuple[Float[mx.array, ""], dict[str, mx.array]]: ...
