"""Samples answers to the prompts of a check, as many as fit into the time."""

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from textpolicy.activity import doing
from textpolicy.cli.output import print_note
from textpolicy.config import TrainConfig
from textpolicy.experiment.assembly import load_sampled_model, template_arguments_of
from textpolicy.generation.policy import ModelPolicy
from textpolicy.machine import with_busy_note
from textpolicy.types import Completion, Prompt, Sampling

_PROBE_TOKENS = 8
_SHARE_OF_GREEDY = 0.3


class TimedSampler:
    """Samples `count` completions for each prompt from the config's model, then greedy ones.

    Each of the two asks one prompt, then two, then four, and ends before its share of `seconds` is
    over, so it may return groups of the first prompts only. `cut_at` is the limit of tokens that
    was used: on a slow model, completions are cut earlier than at `max_tokens`.
    """

    def __init__(self, config: TrainConfig, count: int, max_tokens: int, seconds: float) -> None:
        self.count = count
        self.max_tokens = max_tokens
        self.cut_at = max_tokens
        self.seconds = seconds
        self._config = config

    def sample(self, prompts: Sequence[Prompt]) -> list[list[Completion]]:
        """Return a group for each prompt, or for the first of them."""
        self._load()
        until = time.monotonic() + self.seconds * (1 - _SHARE_OF_GREEDY)
        self.cut_at = self._tokens_that_fit(prompts[:1])
        what = f"sampling completions of up to {self.cut_at} tokens"
        policy = self._policy(Sampling(max_tokens=self.cut_at))
        return _generate_in_time(policy, prompts, self.count, until, what)

    def greedy(self, prompts: Sequence[Prompt]) -> list[list[Completion]]:
        """Return a group of one greedy completion for each prompt, or for the first of them."""
        until = time.monotonic() + self.seconds * _SHARE_OF_GREEDY
        policy = self._policy(Sampling(max_tokens=self.cut_at, temperature=0.0))
        return _generate_in_time(policy, prompts, 1, until, "answering greedily")

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_sampled_model(self._config)

    def _load(self) -> None:
        """Load the model before the time is taken."""
        _ = self._loaded

    def _policy(self, sampling: Sampling) -> ModelPolicy:
        model, tokenizer = self._loaded
        return ModelPolicy(
            model,
            tokenizer,
            sampling,
            allow_special_tokens=self._config.model.allow_special_tokens,
            chat_template_kwargs=template_arguments_of(self._config.model, tokenizer),
        )

    def _tokens_that_fit(self, prompts: Sequence[Prompt]) -> int:
        """Return how long completions may be, so that one group takes a third of the time."""

        def time_of(tokens: int) -> float:
            probe = self._policy(Sampling(max_tokens=tokens))
            started = time.monotonic()
            probe.generate(prompts, n=self.count, seed=0)
            return time.monotonic() - started

        tokens = min(self.max_tokens, _PROBE_TOKENS)
        # The first call also prepares the model, and every call reads the prompts.
        with doing("measuring how fast the model answers"):
            time_of(1)
            reading, answering = time_of(1), time_of(tokens)
        seconds_a_token = max(answering - reading, answering / 4) / tokens
        fitting = max(_PROBE_TOKENS, int((self.seconds / 3 - reading) / seconds_a_token))
        if fitting < self.max_tokens:
            print_note(
                with_busy_note(
                    f"completions are cut at {fitting} of {self.max_tokens} tokens, because longer "
                    f"ones do not fit into {self.seconds:g} s. Raise --seconds to sample longer "
                    "completions"
                )
            )
        return min(fitting, self.max_tokens)


def _generate_in_time(
    policy: ModelPolicy, prompts: Sequence[Prompt], count: int, until: float, what: str
) -> list[list[Completion]]:
    groups: list[list[Completion]] = []
    size, took = 1, 0.0
    with doing(what, len(prompts)) as activity:
        # The next, twice as many prompts take at most twice as long.
        while len(groups) < len(prompts) and (not groups or time.monotonic() + 2 * took < until):
            before, some = time.monotonic(), prompts[len(groups) : len(groups) + size]
            groups += policy.generate(some, n=count, seed=len(groups))
            activity.at(len(groups))
            took, size = time.monotonic() - before, 2 * size
    return groups
