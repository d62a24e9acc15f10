"""The nouns of the library. All else imports them; of mlx they import only the array type."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from pathlib import Path
from types import UnionType
from typing import Any, Protocol, SupportsFloat, runtime_checkable

import mlx.core as mx
from jaxtyping import Bool, Float, Int

from textpolicy.errors import ConfigError

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


NOT_SAMPLED = -1
"""The version of rollouts that no policy sampled: their log-probabilities were never recorded."""


class Progress(Enum):
    """What a callback answers: go on, or stop after this event."""

    MORE = auto()
    STOP = auto()


def asks_to_stop(answer: object) -> bool:
    """Whether a callback's answer ends the run. None is MORE; what is no `Progress` is an error."""
    if answer is not None and not isinstance(answer, Progress):
        raise ConfigError(
            f"the callback answered {answer!r:.60}; expected Progress.STOP to end the run, or "
            "Progress.MORE or None to go on"
        )
    return answer is Progress.STOP


class StopReason(StrEnum):
    """Why a completion ended."""

    STOP_TOKEN = "stop_token"
    """A stop token was sampled. It is the completion's last token and is trained on."""
    STOP_STRING = "stop_string"
    """The text came to contain one of the stop strings."""
    LENGTH = "length"
    """`max_tokens` tokens were sampled: the completion is cut off."""


FieldCheck = tuple[type | UnionType, Callable[[Any], bool], str]
"""The type of a field, what else its value must satisfy, and both in words."""


def check_fields(options: object, **checks: FieldCheck) -> None:
    """Raise `ConfigError` for the first field of `options` that fails its check."""
    for name, (kind, holds, expected) in checks.items():
        value = getattr(options, name)
        if not isinstance(value, kind) or not holds(value):
            raise ConfigError(f"{name} is {value!r}; expected {expected}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy decoding."""

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
        """Whether a forward pass gives the probabilities that the tokens were drawn with.

        Truncation and penalties change the distribution in ways that the trainer does not repeat,
        so completions drawn with them are for evaluation, never for a policy loss.
        """
        plain = (self.top_p, self.top_k, self.min_p, self.repetition_penalty) == (1.0, 0, 0.0, 1.0)
        return plain and self.temperature > 0


@runtime_checkable
class TextEnv(Protocol):
    """What an episode needs of a `gymnasium.Env`; observations and actions are text."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]: ...

    def step(self, action: Any, /) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One row: a prompt, and the columns that its reward needs.

    With `env`, each rollout is an episode in an environment of its own, reset with `seed`.
    """

    id: str
    prompt: Prompt
    example: Mapping[str, Any] = field(default_factory=dict[str, Any])
    env: Callable[[], TextEnv] | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a policy returns for one prompt.

    `prompt_tokens` are the ids that were fed, chat template included; `tokens` the ids that were
    drawn, stop token included; `logprobs` their log-probabilities under the distribution that
    they were drawn from. `text` is for people and rewards: special tokens are left out.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str
    stop_reason: StopReason
    sampling: Sampling
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One exchange of an episode: what the policy said, what that earned, what it heard back."""

    completion: str
    reward: float
    replies: Sequence[Message] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One episode, token by token: `tokens`, `mask` and `logprobs` have equal length.

    `mask` is True on every sampled token, the stop token included, and False on prompts and tool
    output. `logprobs` is 0 where `mask` is False. `reward` is None where the reward function
    declined to score: such a rollout is left out of its group's baseline and gets no gradient.
    `completion` is the last turn's text, and `turns` are those played in an environment.
    `stop_reason` is LENGTH if a limit on tokens or turns cut the episode off.
    `rewards` are the parts of it by name, `metrics` other numbers to average over a step under
    their full names, and `error` says what failed in the user's code.
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

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.mask) == len(self.logprobs):
            raise ValueError(
                "a rollout's tokens, mask and logprobs must have equal length; got "
                f"{len(self.tokens)}, {len(self.mask)}, {len(self.logprobs)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """The rollouts of one task: the unit of the baseline and of the buffer."""

    task: Task
    rollouts: Sequence[Rollout]

    @property
    def version(self) -> int:
        """The oldest adapter version that any member was sampled with."""
        return min(rollout.version for rollout in self.rollouts)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Arrays for one forward pass: what follows each prompt, and the prompts themselves, once.

    `tokens` begins after the row's prompt, which is row `owner` of `prompts`; both are padded on
    the right. `rows` and `token_count` are totals over the *whole* optimizer batch, so that a loss
    that divides by them adds up to the same number however the batch is cut into micro-batches.

    `logp_sampled` was recorded while sampling; `logp_old` is what ratios are taken against, and is
    the same unless the trainer computed it afresh. What a trainer was not asked for is None:
    `logp_ref`, and `entropies` (of every counted token of the whole optimizer batch). `entropy` is
    the current policy's, and a loss may differentiate it.
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


Metrics = dict[str, float]


@runtime_checkable
class Policy(Protocol):
    """Generates completions. Rollout workers know policies only through this."""

    @property
    def version(self) -> int:
        """The version of the adapters that the next generation will use."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], *, n: int = 1, seed: int | None = None
    ) -> list[list[Completion]]:
        """`n` completions for each prompt, in the prompts' order. A seed makes them repeatable."""
        ...

    def reload(self, path: str | Path) -> int:
        """Swap to the adapters in `path` before the next generation; returns their version."""
        ...


RespondFn = Callable[[int, int, Completion], Sequence[Message] | None]
"""Given the numbers of a prompt and a member, and what that row said: what it hears, or None."""


@runtime_checkable
class ConversingPolicy(Policy, Protocol):
    """A policy that can go on after an answer, which episodes of several turns need."""

    def converse(
        self,
        prompts: Sequence[Prompt],
        respond: RespondFn,
        *,
        n: int = 1,
        seed: int | None = None,
    ) -> list[list[list[Completion]]]:
        """The turns of `n` rows for each prompt. A turn's `prompt_tokens` begin with all tokens of
        the turn before, read and drawn: nothing is tokenized again. `respond` is asked once after
        each answer, as soon as it is written, and after the last of a row too.
        """
        ...


RewardFn = Callable[..., Any]
"""The user's code: arguments by name, a number or None back. `textpolicy.rewards` has the contract,
and does not import this module: the processes that run rewards do without mlx."""


AdvantageFn = Callable[..., Float[mx.array, "groups group"]]
"""Rewards (groups, group) to advantages of the same shape; NaN marks a rollout without a reward.

It may ask by keyword for more of the same shape: `lengths`, the sampled tokens of each rollout, and
`parts`, a mapping from the names of reward functions to what each gave.
"""


@runtime_checkable
class Curriculum(Protocol):
    """Tasks without end, chosen by how the ones before went."""

    def __next__(self) -> Task: ...

    def observe(self, groups: Sequence[RolloutGroup], /) -> None:
        """Learn how the policy did on tasks that were given out."""
        ...


@runtime_checkable
class LossFn(Protocol):
    """The objective to minimise and its metrics, from one forward pass.

    Both are sums over this batch's rows divided by the whole batch's totals, so that micro-batches
    add up. A metric whose name ends in "max" or "min" is combined by that instead.
    """

    def __call__(
        self, logp: Float[mx.array, "batch time"], batch: Batch, /
    ) -> tuple[Float[mx.array, ""], dict[str, mx.array]]: ...
