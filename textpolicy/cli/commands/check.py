"""`textpolicy check`: try a reward on rows or on an environment's tasks before training on it."""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.activity import doing
from textpolicy.cli.answer import Answer
from textpolicy.cli.flags import configured
from textpolicy.cli.output import print_note
from textpolicy.cli.progress import showing_progress
from textpolicy.config import TrainConfig
from textpolicy.config.train import TaskOptions
from textpolicy.environments.chat import gold_for_turn, prompt_text
from textpolicy.environments.data_files import load_rows
from textpolicy.environments.environment import sum_turn_rewards
from textpolicy.errors import ConfigError
from textpolicy.experiment.assembly import apply_thread_option
from textpolicy.experiment.tasks import find_task
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import as_rewards, load_reward
from textpolicy.rewards.reward_check import CheckedRow, RewardCheck, check_reward
from textpolicy.types import Sampling

_DEFAULT_MAX_TOKENS = 128
_PROBE_TOKENS = 8


def run(options: Namespace) -> Answer:
    """Try the reward; the checks that need no model come first."""
    with showing_progress(print_note):
        return _run(options)


def _run(options: Namespace) -> Answer:
    config = configured(TrainConfig(), options)
    apply_thread_option(config.model)
    if not (config.task.env or config.task.data):
        raise ConfigError(
            "there is nothing to try the reward on: name rows with --data rows.jsonl, or an "
            "environment with --env NAME"
        )
    sample = _Sampler(config, options.sample, options.seconds) if options.sample else None
    check = (_check_on_environment if config.task.env else _check_on_rows)(
        config.task, options, sample
    )
    data = asdict(check) | {"ok": check.ok}
    return Answer(data=data, text=str(check), exit_code=0 if check.ok else 1)


def _check_on_rows(task: TaskOptions, options: Namespace, sample: "_Sampler | None") -> RewardCheck:
    if not task.reward:
        raise ConfigError(
            "there is no reward to try on these rows: name it as FILE.py or FILE.py:FUNCTION"
        )
    rewards = as_rewards(load_reward(task.reward))
    if task.reward_timeout:
        rewards = replace(rewards, timeout=task.reward_timeout)
    return check_reward(
        rewards,
        load_rows(str(task.data)),
        prompt=options.prompt_column,
        gold=options.gold_column,
        sample=sample,
        limit=options.rows,
    )


def _check_on_environment(
    task: TaskOptions, options: Namespace, sample: "_Sampler | None"
) -> RewardCheck:
    environment, rewards = find_task(task)
    if environment.reward is sum_turn_rewards and not task.reward:
        raise ConfigError(
            f"environment {task.env} rewards each turn of an episode, and a single answer cannot "
            "show that; check it with textpolicy.environments.check_env, or name a reward of your "
            "own"
        )
    gold = environment.gold
    rows = [
        CheckedRow(
            prompt_text(task.prompt),
            task.example,
            gold_for_turn(gold(task.example), -1) if gold else None,
        )
        for task in environment.heldout(options.rows)
    ]
    if sample:
        sample = replace(sample, default_max_tokens=environment.max_tokens)
    return check_reward(rewards, rows, sample=sample, limit=options.rows)


@dataclass(frozen=True)
class _Sampler:
    """Samples `count` completions for each prompt from the config's model, which a call loads.

    A call samples one prompt, then two, then four, and ends before `seconds` are over, so it may
    return groups of the first prompts only. `default_max_tokens` applies if the config does not
    say how long a completion may be. On a slow model, completions are cut earlier.
    """

    config: TrainConfig
    count: int
    seconds: float
    default_max_tokens: int = _DEFAULT_MAX_TOKENS

    def __call__(self, prompts: Sequence[str]) -> list[list[str]]:
        model, tokenizer = load_model(self.config.model.name)
        started = time.monotonic()
        max_tokens = self._tokens_that_fit(model, tokenizer, prompts[:1])
        policy = ModelPolicy(model, tokenizer, Sampling(max_tokens=max_tokens))
        groups: list[list[str]] = []
        size, took = 1, 0.0
        with doing(f"sampling completions of up to {max_tokens} tokens", len(prompts)) as activity:
            while len(groups) < len(prompts) and self._has_time(started, took):
                before, some = time.monotonic(), prompts[len(groups) : len(groups) + size]
                fresh = policy.generate(some, n=self.count, seed=len(groups))
                groups += [[completion.text for completion in group] for group in fresh]
                activity.at(len(groups))
                took, size = time.monotonic() - before, 2 * size
        return groups

    def _tokens_that_fit(
        self, model: nn.Module, tokenizer: TokenizerWrapper, prompts: Sequence[str]
    ) -> int:
        """Return how long completions may be, so that one group takes half of the time at most."""
        asked = self.config.sampling.max_tokens or self.default_max_tokens
        probe = ModelPolicy(model, tokenizer, Sampling(max_tokens=min(asked, _PROBE_TOKENS)))
        started = time.monotonic()
        probe.generate(prompts, n=self.count, seed=0)
        seconds_a_token = (time.monotonic() - started) / _PROBE_TOKENS
        fitting = min(asked, max(_PROBE_TOKENS, int(self.seconds / 2 / seconds_a_token)))
        if fitting < asked:
            print_note(
                f"completions are cut at {fitting} of {asked} tokens, because longer ones do not "
                f"fit into {self.seconds:g} s. Raise --seconds to sample longer completions"
            )
        return fitting

    def _has_time(self, started: float, took: float) -> bool:
        # The next, twice as many prompts take at most twice as long.
        return time.monotonic() - started + 2 * took < self.seconds or not took
