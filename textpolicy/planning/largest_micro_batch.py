"""The largest micro-batch of a step whose rollouts all have the planned lengths.

Rollouts of these lengths are cut into micro-batches by the trainer's own function.
"""

from typing import NamedTuple

from textpolicy.training.batch import (
    TrainingRow,
    count_padded_tokens,
    count_prompts,
    split_into_micro_batches,
    training_rows,
)
from textpolicy.types import NOT_SAMPLED, Rollout, RolloutGroup, Sampling, Segment, StopReason, Task


class MicroBatch(NamedTuple):
    """Its rows and their prompts, and whether a step has more than one micro-batch."""

    rows: int
    prompts: int
    is_part: bool


def largest_micro_batch(
    groups: int,
    group_size: int,
    segments: int,
    lengths: tuple[int, int],
    *,
    size: int | None,
    share_prompts: bool,
) -> MicroBatch:
    """Return the largest micro-batch; `lengths` are the tokens of a prompt and a completion."""
    prompt, completion = lengths
    one = Segment(
        tokens=[0] * (prompt + completion),
        mask=[False] * prompt + [True] * completion,
        logprobs=[0.0] * (prompt + completion),
    )
    rollout = Rollout(
        tokens=one.tokens,
        mask=one.mask,
        logprobs=one.logprobs,
        later=(one,) * (segments - 1),
        completion="",
        reward=0.0,
        stop_reason=StopReason.LENGTH,
        sampling=Sampling(),
        version=NOT_SAMPLED,
    )
    group = RolloutGroup(task=Task(id="", prompt=""), rollouts=[rollout] * group_size)
    rows = training_rows([group] * groups)
    parts = split_into_micro_batches(rows, size, share_prompts=share_prompts)

    def tokens(part: list[TrainingRow]) -> int:
        return count_padded_tokens(part, share_prompts=share_prompts)

    largest = max(parts, key=tokens)
    prompts = count_prompts(largest, share_prompts=share_prompts)
    return MicroBatch(rows=len(largest), prompts=prompts, is_part=len(parts) > 1)
