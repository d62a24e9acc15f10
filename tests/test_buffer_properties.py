"""The buffer does what a plain list would do, whatever the order of calls."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.strategies import examples, rollouts
from tests.test_types import rollout
from textpolicy.buffer import Buffer
from textpolicy.types import RolloutGroup, Task
from textpolicy.untrusted.parsing import parse_json


class BufferMachine(RuleBasedStateMachine):
    """The model is a list of groups, and the number that were dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.version, self.made, self.dropped = 0, 0, 0
        self.groups: list[RolloutGroup] = []
        self.buffer = Buffer()

    @initialize(staleness=st.integers(0, 3))
    def choose_staleness(self, staleness: int) -> None:
        self.buffer = Buffer(max_staleness=staleness)

    @rule(
        ages=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=2), min_size=1, max_size=3)
    )
    def extend(self, ages: list[list[int]]) -> None:
        groups = []
        for members in ages:
            self.made += 1
            # Small draws: hypothesis gives up on long sequences of large ones.
            numbers = {"reward": self.made / 8, "turns": []}
            drawn = [rollout(version=self.version - age, **numbers) for age in members]
            task = Task(id=f"task {self.made}", prompt="p", example={"answer": "4"})
            groups.append(RolloutGroup(task=task, rollouts=drawn))
        self.buffer.extend(iter(groups))
        self.groups += groups

    @rule(steps=st.integers(1, 2))
    def train(self, steps: int) -> None:
        self.version += steps

    # Nearly all draws would take from an empty buffer otherwise.
    @precondition(lambda self: self.groups)
    @rule(limit=st.none() | st.integers(0, 4))
    def take(self, limit: int | None) -> None:
        fresh = []
        for group in self.groups:
            oldest = min(rollout.version for rollout in group.rollouts)
            if self.version - oldest <= self.buffer.max_staleness:
                fresh.append(group)
            else:
                self.dropped += 1
        expected = fresh if limit is None else fresh[:limit]
        self.groups = fresh[len(expected) :]
        taken = self.buffer.take(self.version, limit)
        assert list(map(essence, taken)) == list(map(essence, expected))

    @rule()
    def restore_from_a_checkpoint(self) -> None:
        state = parse_json(json.dumps(self.buffer.state(), allow_nan=False))
        self.buffer = Buffer(max_staleness=self.buffer.max_staleness)
        self.buffer.restore(state)

    @invariant()
    def holds_what_the_list_holds(self) -> None:
        assert len(self.buffer) == len(self.groups)
        assert self.buffer.dropped == self.dropped


def essence(group: RolloutGroup) -> tuple:
    """What a checkpoint keeps of a group: all but the columns that only rewards need."""
    return group.task.id, group.task.prompt, list(group.rollouts)


BufferMachine.TestCase.settings = settings(examples(2), stateful_step_count=12)
TestBuffer = BufferMachine.TestCase


@given(st.lists(rollouts(st.integers(0, 9)), min_size=1, max_size=2))
def test_a_checkpoint_keeps_every_field_of_a_rollout(members):
    buffer, restored = Buffer(9), Buffer(9)
    group = RolloutGroup(task=Task(id="t", prompt="p"), rollouts=members)
    buffer.extend([group])
    restored.restore(parse_json(json.dumps(buffer.state(), allow_nan=False)))
    (found,) = restored.take(version=9)
    assert essence(found) == essence(group)
