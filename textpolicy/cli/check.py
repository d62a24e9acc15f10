"""`textpolicy check`: a reward tried on rows, before anything is trained on it."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace

from textpolicy.cli.experiment import find_task
from textpolicy.cli.report import Report
from textpolicy.environments.environment import earned
from textpolicy.environments.rows import load_rows
from textpolicy.environments.single_turn import answer_of, prompt_text
from textpolicy.errors import ConfigError
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import as_rewards, load_reward
from textpolicy.rewards.check import Case, RewardCheck, check_cases, check_reward
from textpolicy.types import Sampling


def run(options: Namespace) -> Report:
    if not (options.env or options.data):
        raise ConfigError("name what to try the reward on: --data rows.jsonl, or --env NAME")
    check = _on_environment(options) if options.env else _on_rows(options)
    data = asdict(check) | {"ok": check.ok}
    return Report(data=data, text=str(check), exit_code=0 if check.ok else 1)


def _on_rows(options: Namespace) -> RewardCheck:
    if not options.reward:
        raise ConfigError("name the reward to try on these rows: FILE.py or FILE.py:FUNCTION")
    rewards = as_rewards(load_reward(options.reward))
    if options.reward_timeout:
        rewards = replace(rewards, timeout=options.reward_timeout)
    return check_reward(
        rewards,
        load_rows(options.data),
        prompt=options.prompt_column,
        gold=options.gold_column,
        sample=_Sampler(options) if options.sample else None,
        limit=options.rows,
    )


def _on_environment(options: Namespace) -> RewardCheck:
    environment, rewards = find_task(
        options.env, options.reward, data=options.data, timeout=options.reward_timeout
    )
    if environment.reward is earned and not options.reward:
        raise ConfigError(
            f"environment {options.env} is worth what its turns earn, which single answers do not "
            "show; play it with textpolicy.environments.check_env, or name a reward of your own"
        )
    gold = environment.gold
    cases = [
        Case(
            prompt_text(task.prompt),
            task.example,
            answer_of(gold(task.example), -1) if gold else None,
        )
        for task in environment.heldout(options.rows)
    ]
    options.max_tokens = options.max_tokens or environment.max_tokens
    return check_cases(rewards, cases, sample=_Sampler(options) if options.sample else None)


class _Sampler:
    """Groups of completions of the model that the options name, loaded when they are wanted."""

    def __init__(self, options: Namespace) -> None:
        self._options = options

    def __call__(self, prompts: Sequence[str]) -> list[list[str]]:
        options = self._options
        model, tokenizer = load_model(options.model)
        policy = ModelPolicy(model, tokenizer, Sampling(max_tokens=options.max_tokens or 256))
        groups = policy.generate(prompts, n=options.sample, seed=0)
        return [[completion.text for completion in group] for group in groups]
