"""A run whose reward rises without the task being learned is doubted; a healthy run is not."""

import json
from pathlib import Path

import pytest

from textpolicy.cli import main
from textpolicy.rewards.judge_numbers import COSTS, NO_GRADE
from textpolicy.tracking.doubts import find_doubts
from textpolicy.tracking.named_numbers import describe_numbers

DOCS = Path(__file__).parents[2] / "docs"
SICK_RUNS = Path(__file__).parents[2] / "benchmarks" / "results" / "sick_runs.json"


def run(**ends):
    """Return the rows of a run whose numbers go from the first to the last of each pair."""
    ends = {"eval/reward": (0.1, 0.5), "rewards/reward/exact": (0.0, 0.0)} | ends
    return [
        {"step": step, "eval/standard_error": 0.01, "reward_std": 0.1}
        | {name: first + (last - first) * step / 10 for name, (first, last) in ends.items()}
        for step in range(11)
    ]


def doubts(*, right=None, equal=None, **ends):
    """Return the doubts about a run; `right` is what right answers have."""
    rows = run(**{f"eval/{name.replace('__', '/')}": pair for name, pair in ends.items()})
    for name, value in (("rewards/reward/exact", right), ("equal_answers", equal)):
        if value is not None:
            rows[-1][f"eval/right/{name}"] = value
    return find_doubts(rows)


def test_a_number_that_stays_at_0_while_the_reward_rises_is_named_with_both_rewards():
    (doubt,) = doubts(rewards__reward__exact=(0.0, 0.0))
    assert doubt == (
        "exact stayed at 0.000, although the held-out reward rose from 0.100 to 0.500. If exact "
        "counts right answers, the policy earns the reward without doing the task"
    )
    (sure,) = doubts(rewards__reward__exact=(0.0, 0.0), right=1.0)
    assert "Right answers have 1.000: the policy earns" in sure


def test_a_number_that_right_answers_leave_at_0_too_counts_faults_and_is_no_doubt():
    assert not doubts(rewards__reward__exact=(0.0, 0.0), right=0.0)
    # A number that has fallen may count faults, unless right answers show otherwise.
    assert not doubts(rewards__reward__exact=(0.3, 0.0))
    (fell,) = doubts(rewards__reward__exact=(0.3, 0.0), right=1.0)
    assert fell.startswith("exact went from 0.300 to 0.000, although")


def test_what_a_judge_reports_about_its_own_work_is_never_doubted():
    learned = {"rewards/reward/exact": (0.0, 0.5)}
    (doubt,) = find_doubts(run(**learned, **{"eval/rewards/reward/right": (0.0, 0.0)}))
    assert doubt.startswith("right stayed at 0.000")
    about = (*COSTS, NO_GRADE)
    one = {f"eval/rewards/reward/{name}": (0.0, 0.0) for name in about}
    assert not find_doubts(run(**learned, **one))
    # Of two judges, the name of the function comes first.
    two = {
        f"eval/rewards/{judge}/{name}": (0.0, 0.0) for judge in ("kind", "strict") for name in about
    }
    assert not find_doubts(run(**learned, **two))


@pytest.mark.parametrize("name", sorted(COSTS))
def test_a_number_of_the_users_own_may_have_a_name_that_judges_use(name):
    own = {"rewards/reward/exact": (0.0, 0.5), f"eval/rewards/reward/{name}": (0.0, 0.0)}
    (doubt,) = find_doubts(run(**own))
    assert doubt.startswith(f"{name} stayed at 0.000")
    assert describe_numbers({f"rewards/reward/{name}": 2.0}) == [f"{name} 2.000"]


def test_no_number_is_doubted_if_the_reward_has_hardly_risen_or_the_number_has_risen():
    exact = {"rewards__reward__exact": (0.0, 0.0)}
    assert not doubts(**exact, reward=(0.1, 0.12))
    assert not doubts(**exact, reward=(0.5, 0.1))
    assert not doubts(rewards__reward__exact=(0.0, 0.1))
    assert not find_doubts([]) and not find_doubts(run()[:1])
    sampled = run(**{"rewards/reward/exact": (0.0, 0.2), "eval/rewards/reward/exact": (0.0, 0.0)})
    assert not find_doubts(sampled)


def test_one_of_several_rewards_that_stays_at_0_is_named_by_its_function():
    rows = run(**{"rewards/form/mean": (0.1, 0.9), "rewards/right/mean": (0.0, 0.0)})
    assert "right stayed at 0.000" in " ".join(find_doubts(rows))


def few_rows(*, reward=(0.4, 0.9), held_out=(0.63, 0.65), error=0.035, times_seen=5.0):
    """Return the rows of a run on few rows, whose rewards vary by 0.02 between steps."""
    (first, last), (before, after) = reward, held_out
    rewards = [first + (last - first) * min(1, n / 30) + 0.02 * (-1) ** n for n in range(40)]
    rows = [{"step": n, "reward": one, "reward_std": 0.2} for n, one in enumerate(rewards)]
    rows[0] |= {"eval/reward": before, "eval/standard_error": error}
    end = {"eval/reward": after, "eval/standard_error": error}
    return [*rows, {"step": 40, "data/rows": 270.0, "data/times_seen": times_seen} | end]


def test_a_run_that_learns_its_rows_by_heart_is_doubted_and_other_runs_are_not():
    (doubt,) = find_doubts(few_rows())
    assert doubt.startswith("The reward of the training rows rose by 0.4")
    assert "held-out tasks by 0.020 ± 0.049: the policy may learn its 270 rows by heart" in doubt
    section = doubt.partition('"')[2].partition('"')[0]
    assert f"\n## {section}\n" in (DOCS / "symptoms.md").read_text()
    for other in (
        {"times_seen": 1.0},
        {"reward": (0.4, 0.41)},  # The noise of a step is larger.
        {"held_out": (0.63, 0.75)},  # The held-out reward has risen.
        {"held_out": (0.92, 0.93)},  # The samples have come near the greedy answers.
        {"error": 0.3},  # Too few held-out tasks to tell.
        {"held_out": (0.63, 0.4)},  # The alarm of overfitting is about a fall.
    ):
        assert not find_doubts(few_rows(**other)), other
    assert not find_doubts(
        [{k: v for k, v in row.items() if "data" not in k} for row in few_rows()]
    )


def test_answers_that_become_one_text_are_doubted_unless_the_right_answers_are_few():
    (doubt,) = doubts(rewards__reward__exact=(0.0, 1.0), equal_answers=(0.05, 0.98))
    assert doubt.startswith("98% of the greedy answers to held-out tasks are one and the same text")
    # The right answers of a classification are few, and some models begin with one answer.
    learned = {"rewards__reward__exact": (0.0, 1.0)}
    assert not doubts(**learned, equal_answers=(0.05, 0.98), equal=0.9)
    assert not doubts(**learned, equal_answers=(0.05, 0.6))
    assert not doubts(**learned, equal_answers=(0.7, 0.98))


def rows_of(name):
    columns = json.loads(SICK_RUNS.read_text("utf-8"))["runs"][name]["metrics"]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    known = [{key: value for key, value in row.items() if value is not None} for row in rows]
    return [row | {"step": step} for step, row in enumerate(known)]


@pytest.mark.parametrize("name", ["healthy", "no signal", "hacked", "rate too high", "few rows"])
def test_of_the_recorded_runs_the_hacked_one_alone_is_doubted(name):
    assert len(find_doubts(rows_of(name))) == (name == "hacked")


REWARD = """
import textpolicy as tp

def sevens(completion, total):
    share = completion.count("7") / max(1, len(completion))
    return tp.Score(share, {"exact": completion == total})
"""


def test_a_run_that_is_paid_for_something_else_ends_with_the_doubt(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(REWARD)
    rows = [{"prompt": f"{n}+{n}=", "total": f"{2 * n}!"} for n in range(300, 500)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = ["--data", "rows.jsonl", "--reward", "mine.py", "--gold-column", "total"]
    small = ["--max-tokens", "5", "--lr", "4e-3", "--steps", "6", "--groups-per-step", "4"]
    assert main(["train", *task, *small, "--count", "16", "--output", "run"]) == 0
    told = capsys.readouterr().out
    assert "exact stayed at 0.000, although the held-out reward rose from" in told
    assert "Right answers have 1.000: the policy earns the reward without doing the task" in told
    (line,) = [line for line in told.splitlines() if line.startswith("read the answers: ")]
    assert line.endswith("--show 8") and "textpolicy eval --config run" in line
    # 24 groups of 180 training rows.
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["data/rows"], last["data/times_seen"]) == (180, 24 / 180)
    assert "exact stayed at 0.000" in Path("run/report.html").read_text()
