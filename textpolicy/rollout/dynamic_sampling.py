"""Dynamic sampling: replace groups whose rewards are all equal. DAPO, arXiv:2503.14476, 3.2."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from textpolicy.rewards import RewardLike
from textpolicy.rollout.worker import collect
from textpolicy.types import Metrics, Policy, RolloutGroup, Task


@dataclass(frozen=True, kw_only=True)
class SampledGroups:
    """All groups that were sampled, and the groups among them to train on."""

    groups: Sequence[RolloutGroup]
    kept: Sequence[RolloutGroup]
    rounds: int

    @property
    def metrics(self) -> Metrics:
        """The number of sampling rounds and of dropped groups."""
        dropped = len(self.groups) - len(self.kept)
        return {"refill/rounds": float(self.rounds), "refill/dropped": float(dropped)}


def collect_with_dynamic_sampling(
    next_tasks: Callable[[int], Sequence[Task]],
    policy: Policy,
    reward: RewardLike,
    *,
    groups: int,
    group_size: int,
    round_seed: Callable[[int], int],
    rounds: int,
) -> SampledGroups:
    """Sample until `groups` groups have rewards that differ, in at most `rounds` rounds.

    Every round samples as many groups as are missing, so fewer than `groups` may be kept in the
    end. If no group has rewards that differ, all are kept, and the trainer reports the missing
    signal. With one round nothing can be replaced, so all groups are kept: groups without signal
    still count in averages and in the KL term.
    """
    sampled: list[RolloutGroup] = []
    kept: list[RolloutGroup] = []
    done = 0
    while done < rounds and len(kept) < groups:
        tasks = next_tasks(groups - len(kept))
        fresh = collect(tasks, policy, reward, group_size=group_size, seed=round_seed(done))
        sampled += fresh
        kept += [group for group in fresh if rounds == 1 or rewards_differ(group)]
        done += 1
    return SampledGroups(groups=sampled, kept=kept or sampled, rounds=done)


def rewards_differ(group: RolloutGroup) -> bool:
    """Return whether two rollouts of the group have different rewards."""
    rewards = {rollout.reward for rollout in group.rollouts if rollout.reward is not None}
    return len(rewards) > 1
