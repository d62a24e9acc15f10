"""Tasks to rollout groups: sample, score, keep exactly what was sampled."""

from collections.abc import Sequence

from textpolicy.rewards import score
from textpolicy.types import Completion, Policy, Prompt, RewardFn, Rollout, RolloutGroup, Task


def collect(
    tasks: Sequence[Task], policy: Policy, reward: RewardFn, *, group_size: int, seed: int
) -> list[RolloutGroup]:
    """`group_size` scored rollouts for each task, in the tasks' order; repeatable by `seed`."""
    completions = policy.generate([task.prompt for task in tasks], n=group_size, seed=seed)
    return [
        RolloutGroup(task=task, rollouts=[_rollout(task, member, reward) for member in members])
        for task, members in zip(tasks, completions, strict=True)
    ]


def prompt_text(prompt: Prompt) -> str:
    """What a reward sees as the prompt: the string, or the last message's content."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _rollout(task: Task, completion: Completion, reward: RewardFn) -> Rollout:
    value = score(reward, prompt_text(task.prompt), completion.text, task.example)
    given, drawn = len(completion.prompt_tokens), len(completion.tokens)
    return Rollout(
        tokens=completion.prompt_tokens + completion.tokens,
        mask=[False] * given + [True] * drawn,
        logprobs=[0.0] * given + completion.logprobs,
        completion=completion.text,
        reward=value,
        stop_reason=completion.stop_reason,
        sampling=completion.sampling,
        version=completion.version,
    )
