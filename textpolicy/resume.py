"""Making a checkpoint of a run between two steps, and restoring a run from a checkpoint."""

from typing import Any

from textpolicy.rewards import Scorer
from textpolicy.rollout.feed import RolloutFeed
from textpolicy.training.checkpoint import Checkpoint, random_states, restore_random_states
from textpolicy.training.trainer import Trainer
from textpolicy.types import Policy


def make_checkpoint(step: int, trainer: Trainer, feed: RolloutFeed, scorer: Scorer) -> Checkpoint:
    """Return a checkpoint of the state after `step` steps, with all that later steps depend on."""
    arrays, facts = trainer.state()
    parts: dict[str, Any] = {
        "trainer": facts,
        **feed.state(),
        "scorer": scorer.state(),
        "random": random_states(),
    }
    return Checkpoint(step=step, arrays=arrays, facts=parts)


def begin_run(trainer: Trainer, feed: RolloutFeed) -> int:
    """Let workers load the adapters that the run begins with, and return 0 steps."""
    if feed.in_background:
        published = trainer.published
        assert trainer.adapters is not None
        trainer.adapters.publish()
        feed.follow(trainer.version, published)
    return 0


def restore_checkpoint(
    checkpoint: Checkpoint, trainer: Trainer, policy: Policy, feed: RolloutFeed, scorer: Scorer
) -> int:
    """Restore every part of the run, and return the number of steps that are already done."""
    parts = checkpoint.facts
    trainer.restore(checkpoint.arrays, parts["trainer"])
    if policy.version != trainer.version:
        policy.reload(trainer.published)
    if feed.in_background:
        # Before the feed submits what was in flight.
        feed.follow(trainer.version, trainer.published)
    feed.restore(parts)
    scorer.restore(parts["scorer"])
    restore_random_states(parts["random"])
    return checkpoint.step
