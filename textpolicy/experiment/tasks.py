"""What a run is about: the environment and the reward that the options of a task name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from textpolicy.config.sections import TaskOptions
from textpolicy.environments import Dataset, Environment, from_dataset, load
from textpolicy.environments.task_parts import gold_for_turn, prompt_text
from textpolicy.errors import ConfigError
from textpolicy.rewards import Rewards, as_rewards, load_reward, sample_of, scorer_of


def find_task(options: TaskOptions) -> tuple[Environment, Rewards]:
    """The environment, with its own reward or the one of a file ("FILE.py:FUNCTION").

    Without an environment, the rows of `data` are one. What the options say of time limits and
    failures goes before what the file itself says of them.
    """
    given = load_reward(options.reward) if options.reward else None
    environment = _environment(options, given)
    rewards = as_rewards(given or environment.reward)
    if options.reward_timeout is not None:
        rewards = replace(rewards, timeout=options.reward_timeout)
    if options.on_reward_error is not None:
        rewards = replace(rewards, on_error=options.on_reward_error)
    if options.reward:
        _try(rewards, environment)
    return environment, rewards


def elsewhere(options: TaskOptions, env: str) -> TaskOptions:
    """The same for another environment, with the tasks and the reward of its own."""
    return replace(options, env=env, data=None, prompt=None, reward=None)


def _try(rewards: Rewards, environment: Environment) -> None:
    """Score one answer now: what cannot score is found out before a model loads."""
    (task,) = environment.heldout(1)
    gold = gold_for_turn(environment.gold(task.example), -1) if environment.gold else ""
    with scorer_of(replace(rewards, on_error="fail")) as scorer:
        scorer.score([sample_of(prompt_text(task.prompt), gold, task.example)])


def _environment(options: TaskOptions, reward: Callable[..., Any] | Rewards | None) -> Environment:
    if options.env:
        if options.prompt:
            raise ConfigError(
                f"environment {options.env} writes its prompts itself; --prompt goes with --data"
            )
        return load(options.env, options.data)
    if options.data is None:
        raise ConfigError(
            "there is nothing to train on: name an environment, --env sort (`textpolicy envs` "
            "lists them), or rows and a reward, --data rows.jsonl --reward my_reward.py"
        )
    if reward is None:
        raise ConfigError(
            f"the rows of {options.data} come without a reward: name the file of yours, --reward "
            "my_reward.py, or an environment that knows such rows, --env gsm8k"
        )
    return from_dataset(Dataset.load(options.data, options.prompt), reward)
