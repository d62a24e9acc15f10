import json
from dataclasses import replace

import pytest

from tests.test_types import rollout
from textpolicy.buffer import Buffer
from textpolicy.errors import TrainingError
from textpolicy.types import RolloutGroup, Segment, Task


def group(version: int) -> RolloutGroup:
    return RolloutGroup(task=Task(id=str(version), prompt="p"), rollouts=[rollout(version=version)])


@pytest.mark.proves("F17")
def test_take_returns_fresh_groups_in_order_and_counts_the_stale_ones():
    buffer = Buffer(max_staleness=1)
    buffer.extend([group(3), group(4), group(5)])
    assert [g.version for g in buffer.take(version=5)] == [4, 5]
    assert buffer.dropped == 1
    assert len(buffer) == 0


@pytest.mark.proves("F17")
def test_a_group_of_a_version_that_the_trainer_has_not_made_is_an_error():
    buffer = Buffer(max_staleness=4)
    mixed = [rollout(version=2), rollout(version=6)]
    buffer.extend([RolloutGroup(task=Task(id="new", prompt="p"), rollouts=mixed)])
    with pytest.raises(TrainingError, match=r"'new' was sampled with adapter version 6.* above 5"):
        buffer.take(version=5)
    assert len(buffer.take(version=6)) == 1


def test_take_leaves_the_groups_above_the_limit_in_the_buffer():
    buffer = Buffer()
    buffer.extend([group(0), group(0), group(0)])
    assert len(buffer.take(version=0, limit=2)) == 2
    assert len(buffer) == 1
    assert buffer.dropped == 0


def test_a_checkpoint_holds_all_segments_of_a_rollout():
    later = [Segment(tokens=[7, 8], mask=[False, True], logprobs=[0.0, -0.1])]
    given = RolloutGroup(task=Task(id="t", prompt="p"), rollouts=[rollout(later=later), rollout()])
    buffer, restored = Buffer(), Buffer()
    buffer.extend([given])
    restored.restore(json.loads(json.dumps(buffer.state())))
    (group,) = restored.take(version=0)
    assert [r.segments for r in group.rollouts] == [r.segments for r in given.rollouts]


def test_a_checkpoint_of_rollouts_of_one_segment_reads_in_releases_without_segments():
    buffer = Buffer()
    buffer.extend([group(0)])
    (content,) = buffer.state()["groups"][0]["rollouts"]
    assert "later" not in content


def test_a_checkpoint_holds_the_versions_of_tokens_and_names_none_where_all_are_equal():
    later = [Segment(tokens=[7, 8], mask=[False, True], logprobs=[0.0, -0.1], versions=[-1, 5])]
    mixed = rollout(version=3, versions=[-1, 3, 4], later=later)
    plain = rollout(version=3, later=[replace(later[0], versions=[])])
    buffer, restored = Buffer(), Buffer()
    buffer.extend([RolloutGroup(task=Task(id="t", prompt="p"), rollouts=[mixed, plain])])
    state = json.loads(json.dumps(buffer.state()))
    _, content = state["groups"][0]["rollouts"]
    # Earlier releases write and read rollouts without versions of tokens.
    assert "versions" not in content and "versions" not in content["later"][0]
    restored.restore(state)
    (group,) = restored.take(version=3)
    assert [r.segments for r in group.rollouts] == [mixed.segments, plain.segments]
    assert [r.sampled_by_version for r in group.rollouts] == [{3: 1, 4: 1, 5: 1}, {3: 3}]
