"""Dynamic sampling: groups that teach nothing are replaced. DAPO, arXiv:2503.14476, section 3.2."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from textpolicy.rewards import RewardLike
from textpolicy.rollout.worker import collect
from textpolicy.types import Metrics, Policy, RolloutGroup, Task


@dataclass(frozen=True, kw_only=True)
class SampledGroups:
    """What was sampled, and the part of it that has something to teach."""

    sampled: Sequence[RolloutGroup]
    kept: Sequence[RolloutGroup]
    rounds: int

    @property
    def metrics(self) -> Metrics:
        """How much sampling the kept groups took."""
        dropped = len(self.sampled) - len(self.kept)
        return {"refill/rounds": float(self.rounds), "refill/dropped": float(dropped)}


def collect_with_dynamic_sampling(
    next_tasks: Callable[[int], Sequence[Task]],
    policy: Policy,
    reward: RewardLike,
    *,
    groups: int,
    group_size: int,
    seeds: Callable[[int], int],
    rounds: int,
) -> SampledGroups:
    """Sample until `groups` groups have rewards that differ, in at most `rounds` rounds.

    Every round samples as many groups as are missing. After the last there may be fewer; if none
    has signal all are kept, for the trainer to say so. With one round nothing could be replaced,
    and everything is kept: groups without signal still count for averages and divergences.
    """
    sampled: list[RolloutGroup] = []
    kept: list[RolloutGroup] = []
    done = 0
    while done < rounds and len(kept) < groups:
        tasks = next_tasks(groups - len(kept))
        fresh = collect(tasks, policy, reward, group_size=group_size, seed=seeds(done))
        sampled += fresh
        kept += [group for group in fresh if rounds == 1 or has_signal(group)]
        done += 1
    return SampledGroups(sampled=sampled, kept=kept or sampled, rounds=done)


def has_signal(group: RolloutGroup) -> bool:
    """Whether the rewards inside the group differ."""
    rewards = {rollout.reward for rollout in group.rollouts if rollout.reward is not None}
    return len(rewards) > 1
