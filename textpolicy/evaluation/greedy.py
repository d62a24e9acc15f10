"""The greedy reward of a policy on held-out tasks: what policies are compared by."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from textpolicy.errors import RewardError
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import Scorer
from textpolicy.rollout.worker import collect
from textpolicy.types import Sampling, Task


@dataclass(frozen=True, kw_only=True)
class Score:
    """The mean reward of greedy completions over `count` tasks."""

    reward: float
    standard_error: float
    count: int

    def __str__(self) -> str:
        return f"{self.reward:.3f} ± {self.standard_error:.3f}"


def measure(policy: ModelPolicy, tasks: Sequence[Task], scorer: Scorer) -> Score:
    """Score greedy completions of the policy's model, as it is now."""
    sampling = Sampling(max_tokens=policy.sampling.max_tokens, temperature=0)
    greedy = ModelPolicy(policy.model, policy.tokenizer, sampling)
    groups = collect(tasks, greedy, scorer, group_size=1, seed=0)
    rewards = [r.reward for group in groups for r in group.rollouts if r.reward is not None]
    if not rewards:
        raise RewardError(f"the reward declined to score each of {len(tasks)} held-out completions")
    return Score(
        reward=float(np.mean(rewards)),
        standard_error=float(np.std(rewards) / np.sqrt(len(rewards))),
        count=len(rewards),
    )
