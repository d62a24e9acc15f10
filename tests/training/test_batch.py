"""Rows and batches: where the loss begins, and which rows are in memory together."""

from dataclasses import replace
from random import Random

import pytest

from tests.test_types import rollout
from tests.training.rows import batches_of, groups_of
from textpolicy.device_sizes import DeviceSizes, using_sizes
from textpolicy.training.batch import (
    split_into_micro_batches,
    split_into_mini_batches,
    training_rows,
)
from textpolicy.types import RolloutGroup, Task


@pytest.fixture(autouse=True)
def sizes_of_a_cpu():
    with using_sizes(DeviceSizes()):
        yield


def lengths(parts):
    return [[len(row.mask) for row in part] for part in parts]


def test_the_loss_window_begins_where_sampling_began():
    """
    tokens  P P P a b T T c      P prompt, a b c sampled, T tool output
    mask    . . . x x . . x
    window        a b T T c
    """
    member = rollout(
        tokens=[1, 2, 3, 10, 11, 20, 21, 12],
        mask=[False] * 3 + [True, True, False, False, True],
        logprobs=[0, 0, 0, -0.1, -0.2, 0, 0, -0.3],
    )
    other = rollout(tokens=[1, 2, 3, 9], mask=[False] * 3 + [True], logprobs=[0, 0, 0, -0.5])
    (batch,) = batches_of([RolloutGroup(task=Task(id="t", prompt="p"), rollouts=[member, other])])
    assert batch.prompts.tolist() == [[1, 2, 3]]
    assert batch.owner.tolist() == [0, 0]
    assert batch.tokens.tolist() == [[10, 11, 20, 21, 12], [9, 0, 0, 0, 0]]
    assert batch.mask.tolist() == [
        [True, True, False, False, True],
        [True, False, False, False, False],
    ]
    assert batch.logp_old[0].tolist() == pytest.approx([-0.1, -0.2, 0, 0, -0.3])
    assert (batch.rows, batch.token_count) == (2, 4)


def test_a_rollout_without_a_reward_has_no_row():
    (group,) = groups_of((3, [2, 4, 3]))
    rollouts = [replace(r, reward=None) if m == 1 else r for m, r in enumerate(group.rollouts)]
    rows = training_rows([replace(group, rollouts=rollouts)])
    assert [row.member for row in rows] == [0, 2]


def test_mini_batches_are_whole_groups_dealt_by_the_seed():
    rows = training_rows(groups_of(*[(2, [3, 3])] * 4))

    def dealt(seed):
        parts = split_into_mini_batches(rows, 2, Random(seed))
        return [sorted({row.group for row in part}) for part in parts]

    assert dealt(3) == dealt(3)
    assert len({str(dealt(seed)) for seed in range(8)}) > 1
    assert sorted(group for part in dealt(5) for group in part) == [0, 1, 2, 3]


def test_a_group_stays_together_in_its_micro_batch():
    batches = batches_of(groups_of((5, [9, 1, 2]), (5, [3, 3, 3]), (5, [8, 8, 1])), size=3)
    assert [batch.prompts.shape[0] for batch in batches] == [1, 1, 1]
    assert [batch.tokens.shape for batch in batches] == [(3, 3), (3, 8), (3, 9)]
    assert {batch.rows for batch in batches} == {9}


def test_micro_batches_are_whole_groups_within_a_number_of_tokens():
    rows = training_rows(
        groups_of((60, [100, 40]), (60, [300, 300]), (60, [90, 90]), (10, [200, 200]))
    )
    parts = split_into_micro_batches(rows, None)
    # With the third group, the first part would have six rows of 200 and three prompts of 60.
    assert lengths(parts) == [[90, 90, 100, 40], [200, 200], [300, 300]]


def test_a_group_with_more_tokens_is_cut_and_a_pair_is_not():
    (group,) = groups_of((700, [400, 250, 390, 300, 260]))
    assert lengths(split_into_micro_batches(training_rows([group]), None)) == [
        [250, 260],
        [300, 390],
        [400],
    ]
    (pair,) = groups_of((5, [3000, 2000]))
    assert lengths(split_into_micro_batches(training_rows([pair]), None)) == [[2000, 3000]]
    (long_prompt,) = groups_of((5000, [64] * 16))
    assert lengths(split_into_micro_batches(training_rows([long_prompt]), None)) == [[64] * 16]


def test_prompts_that_are_not_shared_count_for_every_row():
    rows = training_rows(groups_of((200, [56] * 8), (200, [20] * 2)))
    assert lengths(split_into_micro_batches(rows, None)) == [[20] * 2 + [56] * 8]
    alone = split_into_micro_batches(rows, None, share_prompts=False)
    assert lengths(alone) == [[20] * 2, [56] * 4, [56] * 4]


def test_groups_without_signal_are_in_parts_of_their_own():
    rows = training_rows(groups_of((5, [3, 3]), (5, [2, 2]), (5, [4, 4])))
    rows = [replace(row, advantage=float(row.group == 2 and row.member)) for row in rows]
    for size in (None, 6):
        parts = split_into_micro_batches(rows, size)
        assert [[row.group for row in part] for part in parts] == [[2, 2], [1, 1, 0, 0]]
