"""What to change after an alarm about learning, in words that fit the settings of the run."""

from dataclasses import dataclass

# A rate below this share of the default is hardly the cause of a collapse.
_LOW_SHARE = 0.5
_LOWER = 1 / 3


@dataclass(frozen=True, kw_only=True)
class LearningSettings:
    """The settings that alarms and their advice depend on; None is not known."""

    groups_per_step: int | None = None
    lr: float | None = None
    default_lr: float | None = None
    """The rate that `textpolicy train` chooses for this model."""
    beta: float | None = None

    @property
    def has_low_rate(self) -> bool:
        """Whether the learning rate is far below the default for this model."""
        return bool(self.lr and self.default_lr and self.lr < _LOW_SHARE * self.default_lr)

    @property
    def about_rate(self) -> str:
        """A sentence about the learning rate, without its full stop."""
        if self.lr is None or self.default_lr is None:
            return "Lower the learning rate"
        if self.has_low_rate:
            return (
                f"The learning rate is {self.lr:g}, far below the default of {self.default_lr:g} "
                "for this model, so another cause is more likely"
            )
        if self.lr > self.default_lr:
            return (
                f"Lower the learning rate: it is {self.lr:g}, and the default for this model is "
                f"{self.default_lr:g}"
            )
        return f"Lower the learning rate, for example by --lr {self.lr * _LOWER:.1g}"

    @property
    def about_kl(self) -> str:
        """A sentence about the KL divergence, without its full stop."""
        if self.beta:
            return f"Raise the weight of the KL divergence (--beta, now {self.beta:g})"
        return "Add a KL divergence (--beta)"

    @property
    def about_groups(self) -> str:
        """A sentence about how well the reward of a step is known, without its full stop."""
        now = f", now {self.groups_per_step}" if self.groups_per_step else ""
        return f"Sample more groups a step (--groups-per-step{now})"
