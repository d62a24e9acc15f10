"""One look at a policy: what it answers to held-out tasks, greedily and in several samples."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from textpolicy.errors import RewardError
from textpolicy.evaluation.statistics import MeanReward, pass_at_k
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import Scorer
from textpolicy.rollout.worker import collect
from textpolicy.types import Metrics, Rollout, RolloutGroup, Sampling, StopReason, Task

# The same for every evaluation, so that two of one policy are equal.
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out tasks of an environment, and what scores them; `max_tokens` bounds an answer."""

    name: str
    tasks: Sequence[Task]
    scorer: Scorer
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a policy said to each task: one greedy rollout, and a group of samples, if asked for.

    A sample whose reward is at least `good` is right.
    """

    greedy: Sequence[Rollout]
    sampled: Sequence[RolloutGroup]
    good: float

    @property
    def greedy_reward(self) -> MeanReward:
        """Of the greedy answers."""
        rewards = [rollout.reward for rollout in self.greedy if rollout.reward is not None]
        if not rewards:
            raise RewardError(
                f"the reward declined to score each of {len(self.greedy)} held-out completions"
            )
        return MeanReward.of(rewards)

    def metrics(self, prefix: str = "eval/") -> Metrics:
        """Everything, under names that begin so."""
        score = self.greedy_reward
        lengths = [sum(rollout.mask) for rollout in self.greedy]
        cut = [rollout.stop_reason is StopReason.LENGTH for rollout in self.greedy]
        metrics = {
            "reward": score.reward,
            "standard_error": score.standard_error,
            "mean_length": float(np.mean(lengths)),
            "clipped_ratio": float(np.mean(cut)),
        }
        return {f"{prefix}{name}": value for name, value in (metrics | self._sampled()).items()}

    def _sampled(self) -> Metrics:
        """Over the tasks of which every sample was scored, so that each has as many."""
        rewards_G = [
            [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
            for group in self.sampled
        ]
        count = max(map(len, rewards_G), default=0)
        whole = [rewards for rewards in rewards_G if len(rewards) == count]
        if not count:
            return {}
        right = [sum(reward >= self.good for reward in rewards) for rewards in whole]
        return {f"avg@{count}": float(np.mean(whole))} | {
            f"pass@{k}": float(np.mean([pass_at_k(count, number, k) for number in right]))
            for k in _sizes(count)
        }


def evaluate(
    policy: ModelPolicy,
    heldout: HeldOut,
    *,
    samples: int = 0,
    temperature: float = 1.0,
    good: float = 0.5,
) -> Evaluation:
    """Ask the policy's model, as it is now, for one greedy answer and `samples` others.

    Answers are the same for every call with the same model: two evaluations differ by it alone.
    """

    def ask(temperature: float, count: int) -> list[RolloutGroup]:
        sampling = Sampling(max_tokens=heldout.max_tokens, temperature=temperature)
        asked = ModelPolicy(policy.model, policy.tokenizer, sampling)
        return collect(heldout.tasks, asked, heldout.scorer, group_size=count, seed=_SEED)

    return Evaluation(
        greedy=[group.rollouts[0] for group in ask(0, 1)],
        sampled=ask(temperature, samples) if samples else [],
        good=good,
    )


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates a policy again and again in the same way, on one environment and on `others`.

    A call returns the greedy score on the one, and the metrics of all.
    """

    policy: ModelPolicy
    heldout: HeldOut
    others: Sequence[HeldOut] = ()
    samples: int = 0
    temperature: float = 1.0
    good: float = 0.5

    def __call__(self) -> tuple[MeanReward, Metrics]:
        started = time.perf_counter()
        own = self._evaluate(self.heldout)
        metrics = own.metrics()
        for other in self.others:
            metrics |= self._evaluate(other).metrics(f"eval/{other.name}/")
        return own.greedy_reward, metrics | {"time/evaluate": time.perf_counter() - started}

    def _evaluate(self, heldout: HeldOut) -> Evaluation:
        return evaluate(
            self.policy,
            heldout,
            samples=self.samples,
            temperature=self.temperature,
            good=self.good,
        )


def evaluate_greedy(policy: ModelPolicy, tasks: Sequence[Task], scorer: Scorer) -> MeanReward:
    """The greedy score alone, with answers as long as the policy's own."""
    max_tokens = policy.sampling.max_tokens
    return evaluate(
        policy, HeldOut(name="", tasks=tasks, scorer=scorer, max_tokens=max_tokens)
    ).greedy_reward


def _sizes(count: int) -> list[int]:
    """1, 2, 4, ... below `count`, and `count` itself."""
    return [*(2**power for power in range((count - 1).bit_length())), count]
