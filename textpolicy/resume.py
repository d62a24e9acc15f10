"""Making a checkpoint of a run between two steps, and restoring a run from a checkpoint."""

from typing import Any

from textpolicy.buffer import Buffer
from textpolicy.rewards import Scorer
from textpolicy.rollout.task_source import TaskSource
from textpolicy.training.checkpoint import Checkpoint, random_states, restore_random_states
from textpolicy.training.trainer import Trainer
from textpolicy.types import Policy


def make_checkpoint(
    step: int, trainer: Trainer, tasks: TaskSource, buffer: Buffer, scorer: Scorer
) -> Checkpoint:
    """Return a checkpoint of the state after `step` steps, with all that later steps depend on."""
    arrays, facts = trainer.state()
    parts: dict[str, Any] = {
        "trainer": facts,
        "tasks": tasks.state(),
        "buffer": buffer.state(),
        "scorer": scorer.state(),
        "random": random_states(),
    }
    return Checkpoint(step=step, arrays=arrays, facts=parts)


def restore_checkpoint(
    checkpoint: Checkpoint,
    trainer: Trainer,
    policy: Policy,
    tasks: TaskSource,
    buffer: Buffer,
    scorer: Scorer,
) -> int:
    """Restore every part of the run, and return the number of steps that are already done."""
    parts = checkpoint.facts
    trainer.restore(checkpoint.arrays, parts["trainer"])
    if policy.version != trainer.version:
        policy.reload(trainer.published)
    tasks.restore(parts["tasks"])
    buffer.restore(parts["buffer"])
    scorer.restore(parts["scorer"])
    restore_random_states(parts["random"])
    return checkpoint.step
