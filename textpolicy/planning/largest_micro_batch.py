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

# A plan of a micro-batch of more rows is far from what fits, so its last rows need not be counted
# one by one.
_MOST_ROLLOUTS = 2048


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
    tokens: int,
    share_prompts: bool,
) -> MicroBatch:
    """Return the largest micro-batch; `lengths` are the tokens of a prompt and a completion.

    A micro-batch has `size` rows, or as many as fit into `tokens` if `size` is None.
    """
    # Every rollout has a token, and further micro-batches are like the first ones.
    most = tokens if size is None else max(1, size // segments)
    if size is not None and most > _MOST_ROLLOUTS:
        rollouts = min(most, groups * group_size)
        prompts = -(-rollouts // group_size) + rollouts * (segments - 1)
        rows = rollouts * segments
        return MicroBatch(
            rows=rows,
            prompts=prompts if share_prompts else rows,
            is_part=rollouts < groups * group_size,
        )
    groups = min(groups, most // group_size + 2)
    group_size = min(group_size, 2 * most + 2)
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
    parts = split_into_micro_batches(rows, size, share_prompts=share_prompts, tokens=tokens)

    def padded_tokens(part: list[TrainingRow]) -> int:
        return count_padded_tokens(part, share_prompts=share_prompts)

    largest = max(parts, key=padded_tokens)
    prompts = count_prompts(largest, share_prompts=share_prompts)
    return MicroBatch(rows=len(largest), prompts=prompts, is_part=len(parts) > 1)
