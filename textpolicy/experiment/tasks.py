"""The environment and the reward that the task section of a config names."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from textpolicy.activity import doing
from textpolicy.config.train import TaskOptions
from textpolicy.environments import Environment, from_dataset, load
from textpolicy.environments.bridges.gymnasium import skip_faulty_seeds
from textpolicy.environments.chat import gold_for_turn, prompt_text
from textpolicy.environments.data_source import DataSource
from textpolicy.environments.preamble import read_system, with_preamble
from textpolicy.errors import ConfigError
from textpolicy.rewards import Rewards, as_rewards, load_reward, sample_of, scorer_of


@doing("reading the tasks")
def find_task(
    options: TaskOptions, seed: int, *, only_measured: bool = False
) -> tuple[Environment, Rewards]:
    """Return the environment and its reward, or the reward of the file that the options name.

    Without an environment, the rows of `data` become one. Time limits and error policies of the
    options replace those that the reward's file sets. `seed` chooses the examples of `few_shot`.
    With `only_measured`, rows to train on are read only if the tasks need them.
    """
    only_measured = only_measured and not options.few_shot
    environment, rewards = _read_task(options, only_measured)
    if options.reward:
        _try_reward(rewards, environment)
    return with_task_preamble(options, environment, seed), rewards


@doing("reading the tasks")
def find_worker_task(options: TaskOptions) -> tuple[Environment, Rewards]:
    """Return the environment and its reward for a rollout worker, which is sent its tasks.

    These tasks have their system message and examples already.
    """
    return _read_task(options, only_measured=True)


def _read_task(options: TaskOptions, only_measured: bool) -> tuple[Environment, Rewards]:
    given = load_reward(options.reward) if options.reward else None
    environment = _environment(options, given, data_source_of(options, only_measured))
    rewards = as_rewards(given or environment.reward)
    if options.reward_timeout is not None:
        rewards = replace(rewards, timeout=options.reward_timeout)
    if options.on_reward_error is not None:
        rewards = replace(rewards, on_error=options.on_reward_error)
    if rewards.on_error != "fail":
        environment = skip_faulty_seeds(environment)
    return environment, rewards


def data_source_of(options: TaskOptions, only_measured: bool = False) -> DataSource:
    """Return the rows that the options name."""
    return DataSource(
        train=options.data,
        held_out=options.eval_data,
        columns=options.columns or {},
        stream=options.data_stream,
        only_measured=only_measured,
    )


def with_task_preamble(options: TaskOptions, environment: Environment, seed: int) -> Environment:
    """Return the environment with the system message and the examples of the options."""
    return with_preamble(
        environment,
        system=read_system(options.system),
        few_shot=options.few_shot,
        gold_column=options.gold_column,
        seed=seed,
    )


def with_environment(options: TaskOptions, env: str) -> TaskOptions:
    """Return the options for another environment, with that environment's tasks and reward."""
    own = TaskOptions()
    rows = {name: getattr(own, name) for name in ("data", "eval_data", "columns", "data_stream")}
    limits = {"tool_timeout": None, "agent_processes": None}
    return replace(options, env=env, prompt=None, reward=None, **limits, **rows)


@doing("trying the reward on one answer")
def _try_reward(rewards: Rewards, environment: Environment) -> None:
    """Score one answer, so that a reward that cannot score fails before a model is loaded."""
    (task,) = environment.heldout(1)
    gold = gold_for_turn(environment.gold(task.example), -1) if environment.gold else ""
    # A reward may fail on an empty answer, if the user has said what that costs.
    tried = replace(rewards, on_error="fail") if gold else rewards
    with scorer_of(tried) as scorer:
        scorer.score([sample_of(prompt_text(task.prompt), gold, task.example)])


def _environment(
    options: TaskOptions, reward: Callable[..., Any] | Rewards | None, source: DataSource
) -> Environment:
    if options.env:
        if options.prompt:
            raise ConfigError(
                f"--prompt is given with the environment {options.env}, which writes its prompts "
                "itself. Leave out --prompt, or use --data with --prompt"
            )
        return load(
            options.env,
            source,
            env_timeout=options.env_timeout,
            tool_timeout=options.tool_timeout,
            agent_processes=options.agent_processes,
        )
    if options.data is None and not (source.only_measured and options.eval_data):
        raise ConfigError(
            "no task is given. Name an environment, for example --env sort (`textpolicy envs` "
            "lists the environments), or give rows and a reward: --data rows.jsonl --reward "
            "my_reward.py"
        )
    if reward is None:
        raise ConfigError(
            f"the rows of {source} are given without a reward. Name the file of your reward, "
            "--reward my_reward.py, or an environment that reads such rows, --env gsm8k"
        )
    name = Path(options.data or options.eval_data or "").stem
    return from_dataset(source.tasks(options.prompt, name=name), reward)
