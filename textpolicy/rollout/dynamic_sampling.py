"""Dynamic sampling: replace groups whose rewards are all equal. DAPO, arXiv:2503.14476, 3.2."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from textpolicy.types import RolloutGroup


@dataclass(kw_only=True)
class GroupGeneration:
    """Groups that are sampled together, in rounds until `wanted` of them have rewards that differ.

    Every round samples as many groups as are missing, in at most `most_rounds` rounds, so fewer
    than `wanted` may be kept in the end. With one round nothing can be replaced, so all groups are
    kept: groups without signal still count in averages and in the KL term.
    """

    step: int
    """The step on which the seeds depend."""
    wanted: int
    most_rounds: int
    rounds: int = 0
    """The number of rounds that are finished."""
    sampled: list[RolloutGroup] = field(default_factory=list[RolloutGroup])
    seconds: float = 0.0
    """The time that workers have sampled, added up, without the time for rewards."""

    @property
    def missing(self) -> int:
        """The number of tasks of the next round; 0 if no round follows."""
        kept = len(self._with_signal)
        return max(0, self.wanted - kept) if self.rounds < self.most_rounds else 0

    @property
    def kept(self) -> Sequence[RolloutGroup]:
        """The groups to train on.

        If no group has rewards that differ, these are all groups, and the trainer reports the
        missing signal.
        """
        return self._with_signal or self.sampled

    @property
    def dropped(self) -> int:
        """The number of sampled groups that are not trained on."""
        return len(self.sampled) - len(self.kept)

    def add_round(self, groups: Sequence[RolloutGroup], seconds: float) -> None:
        """Add the groups of a finished round, and the time that workers have sampled."""
        self.sampled += groups
        self.seconds += seconds
        self.rounds += 1

    @property
    def _with_signal(self) -> list[RolloutGroup]:
        return [one for one in self.sampled if self.most_rounds == 1 or rewards_differ(one)]


def rewards_differ(group: RolloutGroup) -> bool:
    """Return whether two rollouts of the group have different rewards."""
    rewards = {rollout.reward for rollout in group.rollouts if rollout.reward is not None}
    return len(rewards) > 1
