"""`textpolicy check`: a reward tried on rows, before anything is trained on it."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from textpolicy.cli.answer import Report
from textpolicy.cli.flags import configured
from textpolicy.config import TrainConfig
from textpolicy.config.sections import TaskOptions
from textpolicy.environments.data_files import load_rows
from textpolicy.environments.environment import sum_turn_rewards
from textpolicy.environments.task_parts import gold_for_turn, prompt_text
from textpolicy.errors import ConfigError
from textpolicy.experiment.assembly import apply_thread_option
from textpolicy.experiment.tasks import find_task
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import as_rewards, load_reward
from textpolicy.rewards.reward_check import Case, RewardCheck, check_cases, check_reward
from textpolicy.types import Sampling


def run(options: Namespace) -> Report:
    config = configured(TrainConfig(), options)
    apply_thread_option(config.model)
    if not (config.task.env or config.task.data):
        raise ConfigError("name what to try the reward on: --data rows.jsonl, or --env NAME")
    sample = _Sampler(config, options.sample) if options.sample else None
    check = (_on_environment if config.task.env else _on_rows)(config.task, options, sample)
    data = asdict(check) | {"ok": check.ok}
    return Report(data=data, text=str(check), exit_code=0 if check.ok else 1)


def _on_rows(task: TaskOptions, options: Namespace, sample: "_Sampler | None") -> RewardCheck:
    if not task.reward:
        raise ConfigError("name the reward to try on these rows: FILE.py or FILE.py:FUNCTION")
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


def _on_environment(
    task: TaskOptions, options: Namespace, sample: "_Sampler | None"
) -> RewardCheck:
    environment, rewards = find_task(task)
    if environment.reward is sum_turn_rewards and not task.reward:
        raise ConfigError(
            f"environment {task.env} is worth what its turns earn, which single answers do not "
            "show; play it with textpolicy.environments.check_env, or name a reward of your own"
        )
    gold = environment.gold
    cases = [
        Case(
            prompt_text(row.prompt),
            row.example,
            gold_for_turn(gold(row.example), -1) if gold else None,
        )
        for row in environment.heldout(options.rows)
    ]
    return check_cases(rewards, cases, sample=sample and sample.up_to(environment.max_tokens))


@dataclass(frozen=True)
class _Sampler:
    """Groups of completions of the model that a config names, loaded when they are wanted."""

    config: TrainConfig
    count: int
    usual_tokens: int = 256

    def up_to(self, usual_tokens: int) -> "_Sampler":
        """The same, with completions as long as an environment has them."""
        return replace(self, usual_tokens=usual_tokens)

    def __call__(self, prompts: Sequence[str]) -> list[list[str]]:
        model, tokenizer = load_model(self.config.model.name)
        sampling = Sampling(max_tokens=self.config.sampling.max_tokens or self.usual_tokens)
        policy = ModelPolicy(model, tokenizer, sampling)
        groups = policy.generate(prompts, n=self.count, seed=0)
        return [[completion.text for completion in group] for group in groups]
