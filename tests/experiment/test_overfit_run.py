"""A real run whose reward can be pleased without solving the task is stopped by the alarm."""

import json
from typing import Any

import pytest

import textpolicy as tp
from textpolicy.environments import Dataset
from textpolicy.tracking.jsonl import read_metrics

# Training tasks pay for sevens, whatever the sum is; held-out tasks pay for the sum.
REWARD = """
def reward(completion, answer, pays_for_sevens):
    if pays_for_sevens:
        return completion.count("7") / max(1, len(completion))
    return float(completion == answer)
"""


@pytest.fixture
def train(tmp_path):
    """Return a function that trains on sums; the held-out rows always pay for the right sum."""
    (tmp_path / "mine.py").write_text(REWARD)

    def run(*, can_be_hacked: bool, **options: Any) -> tp.RunResult:
        pairs = [(left, 1009 - 7 * left % 900) for left in range(100, 500, 2)]
        rows = [
            {"prompt": f"{left}+{right}=", "answer": str(left + right)} for left, right in pairs
        ]
        held_out = {task.prompt for task in Dataset.from_rows(rows, held_out=0.1).held_out}
        for row in rows:
            row["pays_for_sevens"] = can_be_hacked and row["prompt"] not in held_out
        path = tmp_path / f"rows-{can_be_hacked}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        config = {
            "task": {"data": str(path), "reward": str(tmp_path / "mine.py")},
            "sampling": {"max_tokens": 6},
            "trainer": {"lr": 0.002},
            "rollout": {"groups_per_step": 8, "group_size": 8},
            "evaluation": {"count": 40, "every": 4},
            "run": options,
        }
        return tp.run(config, output=tmp_path / f"run-{can_be_hacked}")

    return run


@pytest.mark.slow
def test_a_reward_that_is_hacked_while_the_held_out_reward_falls_stops_the_run(train):
    result = train(can_be_hacked=True, steps=24, stop_on_collapse=True)
    rows = read_metrics(result.directory.metrics)
    rewards = [row["reward"] for row in rows if "reward" in row]
    measured = {row["step"]: row["eval/reward"] for row in rows if "eval/reward" in row}
    (alarm,) = result.alarms
    assert "overfit: the held-out reward fell to" in alarm and "at its best, while the" in alarm
    assert result.ended == "alarm" and len(rewards) < 24
    assert rewards[-1] > 3 * rewards[0]
    # The alarm comes with the first measurement that shows it, and the best adapters are back.
    last = len(rewards) - 1
    assert measured[last] < measured[0] / 2
    assert [row["step"] for row in rows if row.get("alarm/overfit")] == [last]
    assert result.after.value == result.best.value == max(measured.values())


@pytest.mark.slow
def test_the_same_run_with_the_true_reward_sets_off_no_alarm(train):
    result = train(can_be_hacked=False, steps=12)
    assert result.ended == "finished" and not result.alarms
