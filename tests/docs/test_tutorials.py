"""The tutorials print what they show, and the numbers that they teach with come out again."""

import json
from pathlib import Path

import pytest

from tests.docs.transcripts import (
    held_out_rewards,
    masked,
    missing_line,
    run_session,
    run_shortened,
    typed_in,
)

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
SICK_RUNS = json.loads((ROOT / "benchmarks/results/sick_runs.json").read_text("utf-8"))["runs"]


def test_a_session_has_the_typed_words_and_the_lines_below_them():
    page = "```text\n$ textpolicy check 'a b' \n...\nx 1\n$ python c.py\n```\n"
    one, other = typed_in(page)
    assert (one.words, one.shown) == (["textpolicy", "check", "a b"], ["...", "x 1"])
    assert (other.words, other.shown) == (["python", "c.py"], [])


def test_numbers_may_differ_and_words_may_not():
    assert masked("step  1/20  reward 0.684, -3") == masked("step 10/20 reward 1, 4.5")
    assert missing_line(["...", "c 3"], ["a 1", "b 2", "c 4 and more"]) is None
    assert missing_line(["b 2"], ["a 1", "b 2"]) == "b 2"
    assert missing_line(["...", "b", "...", "a"], ["a", "b"]) == "a"
    assert missing_line(["a", "b"], ["a"]) == "b"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_reward.md", "several_turns.md"])
def test_the_commands_of_a_tutorial_that_takes_minutes_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_shortened((TUTORIALS / name).read_text("utf-8"), tmp_path, capsys.readouterr)


# A minute at most: the page trains five times, for up to 60 steps.
@pytest.mark.long
def test_the_first_reward_goes_from_flat_over_hacked_to_learned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (TUTORIALS / "first_reward.md").read_text("utf-8")
    lines = run_session(page, tmp_path, capsys.readouterr)
    measured = [line.split("right ")[1] for line in lines if line.startswith("held out:")]
    before, hacked, start, learned = map(float, measured)
    assert (before, start) == (0, 0)
    assert hacked < 0.05
    assert learned > 0.15


@pytest.mark.slow
def test_demonstrations_give_a_reward_its_signal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (TUTORIALS / "demonstrations_first.md").read_text("utf-8")
    run_session(page, tmp_path, capsys.readouterr)


@pytest.mark.slow
def test_the_check_tells_a_kind_judge_from_a_strict_one_that_a_run_learns_from(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    page = (TUTORIALS / "judge.md").read_text("utf-8")
    lines = run_session(page, tmp_path, capsys.readouterr)
    before, after = held_out_rewards(lines)[-2:]
    assert after > before + 0.1


@pytest.mark.slow
def test_the_vital_numbers_of_a_run_are_printed_as_the_page_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (TUTORIALS / "reading_a_run.md").read_text("utf-8")
    lines = run_session(page, tmp_path, capsys.readouterr)
    assert sum(" -> " in line for line in lines) == 6


def test_the_table_of_sick_runs_is_that_of_the_record():
    columns = {
        "reward": 2,
        "eval/reward": 2,
        "eval/rewards/reward/right": 2,
        "frac_mixed": 2,
        "entropy": 2,
        "completions/mean_length": 1,
        "adapters/delta_norm": 1,
    }
    page = (TUTORIALS / "reading_a_run.md").read_text("utf-8")
    for name, run in SICK_RUNS.items():
        cells = [name]
        for metric, digits in columns.items():
            values = [value for value in run["metrics"][metric] if value is not None]
            ends = f"{values[0]:.{digits}f} → {values[-1]:.{digits}f}" if values else "none"
            cells.append(ends)
        assert f"| {' | '.join(cells)} |" in page


def test_the_sick_runs_show_what_the_pages_say_of_them():
    def ends(name: str, metric: str) -> list[float]:
        values = [value for value in SICK_RUNS[name]["metrics"][metric] if value is not None]
        return [values[0], *values[-3:]]

    assert ends("few rows", "eval/reward")[1:] == pytest.approx([0.54, 0.55, 0.56], abs=0.006)
    assert ends("few rows", "reward")[-1] > 0.99
    assert not SICK_RUNS["hacked"]["alarms"]
    assert ends("hacked", "eval/rewards/reward/right")[-1] == 0
    assert sum(share == 0 for share in SICK_RUNS["no signal"]["metrics"]["frac_mixed"][:60]) == 47
    moved = [
        SICK_RUNS[name]["metrics"]["adapters/delta_norm"][0]
        for name in ("rate too high", "healthy")
    ]
    assert moved == pytest.approx([2.4, 0.12], abs=0.005)
    steps = [step + 1 for step in SICK_RUNS["rate too high"]["alarms"].values()]
    assert (min(steps), max(steps)) == (28, 45)
    assert max(SICK_RUNS["rate too high"]["metrics"]["entropy"][:60]) == pytest.approx(
        4.6, abs=0.05
    )


# A minute at most: imitation and 30 steps of episodes.
@pytest.mark.long
def test_a_reward_for_calls_teaches_nothing_and_one_for_the_answer_teaches_the_tools(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    page = (TUTORIALS / "several_turns.md").read_text("utf-8")
    lines = run_session(page, tmp_path, capsys.readouterr)
    paid, still_paid, before, after = held_out_rewards(lines)
    right = [float(line.split("right ")[1]) for line in lines if line.startswith("held out:")]
    assert (paid, still_paid) == (1, 1)
    assert right[0] == right[1] < 0.7
    assert after > before + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["your_data.md", "to_an_endpoint.md"])
def test_the_tutorial_prints_what_it_shows(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_session((TUTORIALS / name).read_text("utf-8"), tmp_path, capsys.readouterr)
