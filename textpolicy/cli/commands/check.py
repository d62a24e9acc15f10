"""`textpolicy check`: try a reward on rows or on an environment's tasks before training on it."""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.activity import doing
from textpolicy.cli.answer import Answer
from textpolicy.cli.flags import configured
from textpolicy.cli.output import print_note
from textpolicy.cli.progress import showing_progress
from textpolicy.config import TrainConfig
from textpolicy.environments import Dataset, from_dataset
from textpolicy.environments.chat import gold_for_turn, prompt_text
from textpolicy.environments.environment import sum_turn_rewards
from textpolicy.environments.preamble import system_messages
from textpolicy.environments.template import check_template, fill_template
from textpolicy.errors import ConfigError
from textpolicy.experiment.assembly import apply_thread_option, template_arguments_of
from textpolicy.experiment.first_prompt import describe_prompt
from textpolicy.experiment.run_size import read_tokenizer
from textpolicy.experiment.tasks import data_source_of, find_task, with_task_preamble
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.generation.prompts import encode_prompt
from textpolicy.rewards import Rewards, as_rewards, load_reward
from textpolicy.rewards.reward_check import CheckedRow, check_reward, checked_rows
from textpolicy.types import Completion, Prompt, Sampling, Task

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
    if config.task.env:
        rewards, rows, max_tokens = _rows_of_environment(config, options)
        sample = replace(sample, default_max_tokens=max_tokens) if sample else None
    else:
        rewards, rows = _rows_of_data(config, options)
    check = check_reward(rewards, rows, sample=sample, limit=options.rows)
    asked = _describe_asked(config, rows[0])
    data = asdict(check) | {"ok": check.ok, "asked": asked}
    return Answer(data=data, text=f"{check}\n\n{asked}", exit_code=0 if check.ok else 1)


def _rows_of_data(config: TrainConfig, options: Namespace) -> tuple[Rewards, list[CheckedRow]]:
    task = config.task
    if not task.reward:
        raise ConfigError(
            "there is no reward to try on these rows: name it as FILE.py or FILE.py:FUNCTION"
        )
    rewards = as_rewards(load_reward(task.reward))
    if task.reward_timeout:
        rewards = replace(rewards, timeout=task.reward_timeout)
    # Examples may come from any row.
    source, count = data_source_of(task), None if task.few_shot else options.rows
    rows = list(islice(source.rows(), count))
    chosen = checked_rows(rows, prompt=options.prompt_column, gold=task.gold_column)
    if template := task.prompt:
        check_template(template, rows[0])
        filled = [prompt_text(fill_template(template, row)) for row in rows]
        chosen = [replace(one, prompt=text) for one, text in zip(chosen, filled, strict=True)]
    asked = _asked(config, chosen)
    return rewards, [replace(row, asked=one) for row, one in zip(chosen, asked, strict=True)]


def _asked(config: TrainConfig, rows: Sequence[CheckedRow]) -> list[Prompt]:
    """Return what a model is asked for each row, with the system message and examples."""
    task, given = config.task, [row.example.get("prompt") for row in rows]
    # A prompt of several messages is asked as it is, unless a template has made another prompt.
    whole = [one if isinstance(one, list) and not task.prompt else None for one in given]
    prompts: list[Prompt] = [one or row.prompt for one, row in zip(whole, rows, strict=True)]
    if not task.few_shot:
        first = system_messages(task.system)
        return [Task(id="", prompt=prompt, preamble=first).asked for prompt in prompts]
    pairs = zip(rows, prompts, strict=True)
    data = Dataset.from_rows([{**row.example, "prompt": prompt} for row, prompt in pairs])
    environment = from_dataset(data, load_reward(str(task.reward)))
    tasks = with_task_preamble(task, environment, config.run.seed).tasks
    assert isinstance(tasks, Dataset)
    asked = {one.id: one.asked for one in (*tasks.train, *tasks.held_out)}
    return [asked[f"{data.name}/{number}"] for number in range(1, len(rows) + 1)]


def _rows_of_environment(
    config: TrainConfig, options: Namespace
) -> tuple[Rewards, list[CheckedRow], int]:
    task = config.task
    environment, rewards = find_task(task, config.run.seed)
    if environment.reward is sum_turn_rewards and not task.reward:
        raise ConfigError(
            f"environment {task.env} rewards each turn of an episode, and a single answer cannot "
            "show that; check it with textpolicy.environments.check_env, or name a reward of your "
            "own"
        )
    gold = environment.gold
    rows = [
        CheckedRow(
            prompt_text(one.prompt),
            one.example,
            gold_for_turn(gold(one.example), -1) if gold else None,
            one.asked,
        )
        for one in environment.heldout(options.rows)
    ]
    return rewards, rows, environment.max_tokens


def _describe_asked(config: TrainConfig, row: CheckedRow) -> str:
    """Return the prompt of a row as the model would read it."""
    tokenizer = read_tokenizer(config.model)
    arguments = template_arguments_of(config.model, tokenizer)
    tokens = encode_prompt(
        tokenizer,
        row.asked or row.prompt,
        allow_special_tokens=config.model.allow_special_tokens,
        chat_template_kwargs=arguments,
    )
    return describe_prompt(tokenizer, tokens, arguments)


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

    def __call__(self, prompts: Sequence[Prompt]) -> list[list[Completion]]:
        model, tokenizer = load_model(self.config.model.name)
        started = time.monotonic()
        max_tokens = self._tokens_that_fit(model, tokenizer, prompts[:1])
        policy = self._policy(model, tokenizer, max_tokens)
        groups: list[list[Completion]] = []
        size, took = 1, 0.0
        with doing(f"sampling completions of up to {max_tokens} tokens", len(prompts)) as activity:
            while len(groups) < len(prompts) and self._has_time(started, took):
                before, some = time.monotonic(), prompts[len(groups) : len(groups) + size]
                groups += policy.generate(some, n=self.count, seed=len(groups))
                activity.at(len(groups))
                took, size = time.monotonic() - before, 2 * size
        return groups

    def _policy(
        self, model: nn.Module, tokenizer: TokenizerWrapper, max_tokens: int
    ) -> ModelPolicy:
        return ModelPolicy(
            model,
            tokenizer,
            Sampling(max_tokens=max_tokens),
            allow_special_tokens=self.config.model.allow_special_tokens,
            chat_template_kwargs=template_arguments_of(self.config.model, tokenizer),
        )

    def _tokens_that_fit(
        self, model: nn.Module, tokenizer: TokenizerWrapper, prompts: Sequence[Prompt]
    ) -> int:
        """Return how long completions may be, so that one group takes half of the time at most."""
        asked = self.config.sampling.max_tokens or self.default_max_tokens
        probe = self._policy(model, tokenizer, min(asked, _PROBE_TOKENS))
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
