"""Evaluate a policy on held-out tasks, with one greedy answer and several samples for each task."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from textpolicy.activity import doing
from textpolicy.errors import RewardError
from textpolicy.generation.policy import ModelPolicy
from textpolicy.ranks import ALONE, Ranks
from textpolicy.rewards import Scorer
from textpolicy.rollout.executors.ranks import collect_with_ranks
from textpolicy.tracking.doubts import EQUAL_ANSWERS
from textpolicy.tracking.named_numbers import ERRORS, REPORTED
from textpolicy.types import Metrics, Rollout, RolloutGroup, Sampling, StopReason, Task

# All evaluations use the same seed, so that two evaluations of one policy are equal.
_SEED = 0
# Fewer held-out tasks leave an error of several hundredths.
_ENOUGH_TASKS = 50


@dataclass(frozen=True, kw_only=True)
class MeanReward:
    """The mean reward of greedy completions over `count` tasks."""

    reward: float
    standard_error: float
    count: int

    @classmethod
    def of(cls, rewards: Sequence[float]) -> "MeanReward":
        """Return the mean of at least one reward."""
        return cls(
            reward=float(np.mean(rewards)),
            standard_error=float(np.std(rewards) / np.sqrt(len(rewards))),
            count=len(rewards),
        )

    def few_tasks_note(self, *, has_more: bool) -> str:
        """Return what a score of few tasks cannot show, or an empty text if there are enough.

        With `has_more`, a higher count measures more tasks.
        """
        if self.count >= _ENOUGH_TASKS:
            return ""
        error = self.standard_error
        known = f"is {error:.3f}, so a gain below about {2 * error:.2f} may be chance"
        tasks = "task is" if self.count == 1 else "tasks are"
        more = "raise --count, or add rows" if has_more else "add rows, because these are all"
        return (
            f"Only {self.count} {tasks} measured. The standard error of their mean reward "
            f"{known if error else 'cannot be told, because all rewards are equal'}. Measure at "
            f"least {_ENOUGH_TASKS}: {more}. Of the rows of --data a tenth is "
            "held out, and the rows of --eval-data are all measured"
        )

    def __str__(self) -> str:
        return f"{self.reward:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out tasks of an environment and their scorer. `max_tokens` limits an answer.

    `split_note` says what a reader of the score must know if the environment has few problems.
    `gold` returns the right answer of a row, or None where it is not known.
    """

    name: str
    tasks: Sequence[Task]
    scorer: Scorer
    max_tokens: int
    split_note: str = ""
    gold: Callable[[Mapping[str, Any]], str | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The answers of a policy: one greedy rollout a task and, if asked for, a group of samples.

    A sample is right if its reward is at least `good`.
    """

    greedy: Sequence[Rollout]
    sampled: Sequence[RolloutGroup]
    good: float

    @property
    def greedy_reward(self) -> MeanReward:
        """The mean reward of the greedy answers. Raise `RewardError` if all rewards are None."""
        rewards = [rollout.reward for rollout in self.greedy if rollout.reward is not None]
        errors = [rollout.error for rollout in self.greedy if rollout.error]
        if not rewards and errors:
            raise RewardError(
                f"none of {len(self.greedy)} held-out completions has a reward, because "
                f"{len(errors)} calls failed; the first: {errors[0]}"
            )
        if not rewards:
            raise RewardError(
                f"the reward function returned None for each of {len(self.greedy)} held-out "
                "completions; expected a number for at least one"
            )
        return MeanReward.of(rewards)

    def metrics(self, prefix: str = "eval/") -> Metrics:
        """Return all numbers of the evaluation, with `prefix` before their names."""
        mean = self.greedy_reward
        lengths = [rollout.sampled for rollout in self.greedy]
        cut = [rollout.stop_reason is StopReason.LENGTH for rollout in self.greedy]
        metrics = {
            "reward": mean.reward,
            "standard_error": mean.standard_error,
            "mean_length": float(np.mean(lengths)),
            "clipped_ratio": float(np.mean(cut)),
            EQUAL_ANSWERS: equal_share([rollout.completion for rollout in self.greedy]),
        }
        metrics |= self._reported_metrics() | self._sample_metrics()
        return {f"{prefix}{name}": value for name, value in metrics.items()}

    def _reported_metrics(self) -> Metrics:
        """Return means and standard errors of what is known beside the greedy rewards."""
        given = [reported_numbers(rollout) for rollout in self.greedy]
        names = dict.fromkeys(name for one in given for name in one)
        means = {name: MeanReward.of([one[name] for one in given if name in one]) for name in names}
        return {name: mean.reward for name, mean in means.items()} | {
            f"{ERRORS}{name.removeprefix(REPORTED)}": mean.standard_error
            for name, mean in means.items()
        }

    def _sample_metrics(self) -> Metrics:
        """Return avg@n and pass@k, over the tasks of which every sample has a reward."""
        rewards_G = [
            [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
            for group in self.sampled
        ]
        count = max(map(len, rewards_G), default=0)
        if not count:
            return {}
        whole = [rewards for rewards in rewards_G if len(rewards) == count]
        right = [sum(reward >= self.good for reward in rewards) for rewards in whole]
        return {f"avg@{count}": float(np.mean(whole))} | {
            f"pass@{k}": float(np.mean([pass_at_k(count, number, k) for number in right]))
            # The values of k are 1, 2, 4, ... below `count`, and `count` itself.
            for k in [*(2**power for power in range((count - 1).bit_length())), count]
        }


@doing("measuring on held-out tasks")
def evaluate(
    policy: ModelPolicy,
    heldout: HeldOut,
    *,
    samples: int = 0,
    temperature: float = 1.0,
    good: float = 0.5,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Return one greedy answer and `samples` sampled answers of the policy's model to each task.

    Every call with the same weights returns the same answers. The `ranks` divide the tasks.
    """

    def answer(temperature: float, count: int) -> list[RolloutGroup]:
        sampling = Sampling(max_tokens=heldout.max_tokens, temperature=temperature)
        return collect_with_ranks(
            heldout.tasks,
            policy.with_sampling(sampling),
            heldout.scorer,
            ranks,
            group_size=count,
            seed=_SEED,
        )

    return Evaluation(
        greedy=[group.rollouts[0] for group in answer(0, 1)],
        sampled=answer(temperature, samples) if samples else [],
        good=good,
    )


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates a policy with the same options in every call, on `heldout` and on `others`.

    A call returns the greedy reward on `heldout`, and the metrics of all held-out tasks.
    """

    policy: ModelPolicy
    heldout: HeldOut
    others: Sequence[HeldOut] = ()
    samples: int = 0
    temperature: float = 1.0
    good: float = 0.5
    ranks: Ranks = ALONE

    def __call__(self) -> tuple[MeanReward, Metrics]:
        started = time.perf_counter()
        own, *others = (
            evaluate(
                self.policy,
                heldout,
                samples=self.samples,
                temperature=self.temperature,
                good=self.good,
                ranks=self.ranks,
            )
            for heldout in (self.heldout, *self.others)
        )
        metrics = own.metrics()
        for heldout, evaluation in zip(self.others, others, strict=True):
            metrics |= evaluation.metrics(f"eval/{heldout.name}/")
        return own.greedy_reward, metrics | {"time/evaluate": time.perf_counter() - started}


def evaluate_greedy(policy: ModelPolicy, tasks: Sequence[Task], scorer: Scorer) -> MeanReward:
    """Return the mean reward of greedy answers, limited by the policy's own `max_tokens`."""
    limit = policy.sampling.max_tokens
    heldout = HeldOut(name="", tasks=tasks, scorer=scorer, max_tokens=limit)
    return evaluate(policy, heldout).greedy_reward


def reported_numbers(rollout: Rollout) -> Metrics:
    """Return the numbers that rewards reported in a `Score`, and the value of each of several.

    The value of a single reward function is the reward.
    """
    reported = {name: x for name, x in rollout.metrics.items() if name.startswith(REPORTED)}
    parts = rollout.rewards if len(rollout.rewards) > 1 else {}
    return reported | {f"{REPORTED}{name}/mean": value for name, value in parts.items()}


def equal_share(texts: Sequence[str]) -> float:
    """Return the share of texts that equal the most frequent one."""
    return Counter(texts).most_common(1)[0][1] / len(texts)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the probability that at least one of `k` answers is right.

    This is the unbiased estimator of Chen et al. 2021, arXiv:2107.03374: of all choices of `k`
    among `samples` answers, of which `right` are right, the share with a right answer.
    """
    return 1 - comb(samples - right, k) / comb(samples, k)
