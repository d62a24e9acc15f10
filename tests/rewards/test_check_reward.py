"""`check_reward` finds each kind of mistake in rewards, and the command prints the findings."""

import itertools
import json
import os
import random
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest

import textpolicy as tp
from textpolicy.cli import main
from textpolicy.errors import ConfigError
from textpolicy.rewards.load_reward import READY_REWARDS
from textpolicy.rewards.reward_check import check_reward
from textpolicy.rewards.verifiers import math_equal, number_equal
from textpolicy.user_code import keep_working_directory

ROWS = [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(1, 9)]


def right(completion, answer):
    return float(completion == answer)


def verdicts(check):
    return {finding.name: finding.verdict for finding in check.findings}


def detail(check, name):
    return next(finding.detail for finding in check.findings if finding.name == name)


def test_a_sound_reward_passes_and_the_table_says_so():
    check = check_reward(right, ROWS)
    assert check.ok
    assert verdicts(check) == {
        "finite": "ok",
        "deterministic": "ok",
        "gold highest": "ok",
        "empty low": "ok",
        "speed": "ok",
        "process": "ok",
        "signal": "not checked",
    }
    lines = str(check).splitlines()
    assert lines[0] == "reward right on 8 rows" and len(lines) == 8
    assert lines[1].split() == ["finite", "ok", "56", "calls"]


@pytest.mark.parametrize("batched", [False, True])
def test_a_reward_that_was_written_for_messages_is_told_that_a_completion_is_a_text(batched):
    def chat(completion):
        return float(len(completion[0]["content"]))

    def chats(completions):
        return [chat(one) for one in completions]

    reward = tp.reward(batched=True)(chats) if batched else chat
    found = detail(check_reward(reward, ROWS), "finite")
    assert "string indices" in found and 'leave out [0]["content"]' in found


def test_rows_are_tried_only_until_one_fails_slowly():
    def slow(completion):
        time.sleep(0.3)
        raise ValueError("nothing")

    check = check_reward(slow, ROWS)
    assert "7 of 7 calls" in detail(check, "finite")
    assert "The other 7 rows were not tried" in detail(check, "finite")


def test_nothing_that_needs_a_value_is_checked_if_no_call_has_returned_one():
    def broken(completion):
        return missing  # noqa: F821

    needs_values = ("deterministic", "gold highest", "empty low", "speed")
    check = check_reward(broken, ROWS)
    assert verdicts(check)["finite"] == "FAILED" and "NameError" in detail(check, "finite")
    for name in needs_values:
        assert verdicts(check)[name] == "not checked"
        assert detail(check, name) == "no call has returned a value"

    def only_wrong(completion, answer):
        return 1 / (completion != answer)

    unlucky = verdicts(check_reward(only_wrong, ROWS))
    assert unlucky["gold highest"] == unlucky["empty low"] == "not checked"
    assert unlucky["deterministic"] == "ok"


def test_the_first_failure_of_a_reward_is_shown():
    def fragile(completion, answer):
        return float(int(completion) == int(answer))

    check = check_reward(fragile, ROWS)
    assert not check.ok and verdicts(check)["finite"] == "FAILED"
    assert "40 of 56 calls: reward fragile raised ValueError" in detail(check, "finite")
    assert "on task row 0, prompt '1+1=', completion ''" in detail(check, "finite")


def test_a_reward_that_scores_nothing_fails():
    assert verdicts(check_reward(lambda p, c, e: None, ROWS))["finite"] == "FAILED"


def test_the_note_of_a_reward_that_scores_nothing_is_shown():
    def unsure(completion):
        return tp.Score(None, note=f"the judge wrote 'about {completion}'")

    assert detail(check_reward(unsure, ROWS), "finite").endswith(
        "A judge that gives no grade returns None; the first: the judge wrote 'about 2'"
    )


def test_a_random_reward_is_not_deterministic():
    chance = random.Random(0)
    check = check_reward(lambda p, c, e: chance.random(), ROWS)
    assert verdicts(check)["deterministic"] == "warning"
    assert detail(check, "deterministic").startswith("row 0, the right answer: 0.")


def test_a_reward_that_prefers_something_else_to_the_right_answer_fails():
    check = check_reward(lambda p, c, e: len(c) / 100, ROWS)
    assert verdicts(check)["gold highest"] == "FAILED" and not check.ok
    assert detail(check, "gold highest") == (
        "8 of 8 rows: in row 0 the prompt again, '1+1=', scores 0.04, and the right answer, '2', "
        "0.01"
    )


def test_a_reward_that_cannot_tell_right_from_wrong_gets_a_warning():
    check = check_reward(lambda p, c, e: float(c.isdecimal()), ROWS)
    assert verdicts(check)["gold highest"] == "warning"
    assert detail(check, "gold highest").endswith(
        "right and wrong look alike. In row 0, '4' scores 1, as much as '2', which is right"
    )


@pytest.mark.parametrize("asked", ["{}+{}=", "What is {}+{}?", "Compute {} + {}."])
def test_a_reward_that_pays_a_copy_of_the_question_gets_a_warning(asked):
    rows = [{"question": asked.format(n, 341), "answer": str(n + 341)} for n in range(1, 9)]
    found = detail(check_reward(READY_REWARDS["math_equal"], rows), "gold highest")
    assert found.startswith("in 8 of 8 rows a copy of the prompt scores as much as the right ")
    assert "341' scores 1, and '342', which is right, scores 1" in found.replace("1 + ", "1+")
    assert "number_equal" in found
    numbers = check_reward(READY_REWARDS["number_equal"], rows)
    assert verdicts(numbers)["gold highest"] == "ok"


def test_a_conversation_is_copied_from_its_last_message():
    turns = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "1+1: 2"}]
    rows = [
        {"prompt": [*turns, {"role": "user", "content": f"{n}+50"}], "answer": str(n + 50)}
        for n in range(10, 14)
    ]
    check = check_reward(READY_REWARDS["math_equal"], rows)
    assert "'The answer is 10+50' scores 1" in detail(check, "gold highest")


def test_words_around_an_answer_that_earn_something_are_no_copy():
    def formatted(completion, answer):
        return float("answer" in completion) + number_equal(completion, answer)

    def copied(completion, answer):
        return float("answer" in completion) + math_equal(completion, answer)

    assert verdicts(check_reward(formatted, ROWS))["gold highest"] == "ok"
    assert "scores 2, and '2', which is right, scores 1" in (
        detail(check_reward(copied, ROWS), "gold highest")
    )


def test_the_last_choice_of_a_prompt_is_no_copy():
    rows = [{"question": f"{n}: (A) or (B)?", "answer": "ABAA"[n % 4]} for n in range(8)]
    check = check_reward(READY_REWARDS["choice_match"], rows)
    assert verdicts(check)["gold highest"] == "ok"


def test_a_reward_that_rewards_an_empty_answer_fails():
    check = check_reward(lambda p, c, e: float(c in ("", e["answer"])), ROWS)
    assert verdicts(check)["empty low"] == "FAILED"
    assert "no answer at all scores 1, as much as the right one" in detail(check, "empty low")


@pytest.mark.slow
def test_a_slow_reward_gets_a_warning_that_names_the_row():
    def slow(completion, answer):
        time.sleep(0.11 if answer == "4" else 0)
        return float(completion == answer)

    check = check_reward(slow, ROWS[:3])
    assert check.ok and verdicts(check)["speed"] == "warning"
    assert detail(check, "speed").endswith("ms in row 1")


def test_columns_are_found_named_or_missing():
    rows = [{"q": "1+1=", "result": 2}, {"q": "2+2=", "result": 4}]

    def by_result(prompt, completion, result):
        assert prompt.endswith("=")
        return float(completion == str(result))

    check = check_reward(by_result, rows, prompt="q")
    assert verdicts(check)["gold highest"] == "not checked" and check.ok
    named = check_reward(by_result, rows, prompt="q", gold="result")
    assert verdicts(named)["gold highest"] == "ok"
    made = check_reward(by_result, rows, prompt="q", gold=lambda row: row["result"])
    assert verdicts(made) == verdicts(named)
    with pytest.raises(ConfigError, match="no column 'gold'; the rows have q, result"):
        check_reward(by_result, rows, gold="gold")
    with pytest.raises(ConfigError, match="asks for `answer`; the rows have `q`, `result`"):
        check_reward(right, rows)
    with pytest.raises(ConfigError, match="there are no rows"):
        check_reward(right, [])


def test_endless_rows_are_tried_up_to_the_limit():
    assert str(check_reward(right, itertools.cycle(ROWS), limit=5)).startswith("reward right on 5")


def test_sampling_shows_how_many_groups_have_signal():
    def sample(prompts):
        return [["2", "4", "6"] for _ in prompts]

    check = check_reward(right, ROWS, sample=sample)
    assert verdicts(check)["signal"] == "ok"
    assert detail(check, "signal") == (
        "good: rewards differ inside 3 of 8 groups of 3 completions; mean reward 0.125"
    )
    assert check.signal and check.signal.greedy is None
    low, high = check.signal.shown
    assert (low.prompt, low.answer, low.right_answer, low.reward) == ("1+1=", "4", "2", 0.0)
    assert (high.prompt, high.answer, high.right_answer, high.reward) == ("3+3=", "6", "6", 1.0)
    assert "  sampled answer      4\n    to the prompt     1+1=\n    right answer      2" in str(
        check
    )
    silent = check_reward(right, ROWS, sample=lambda prompts: [["x", "y"] for _ in prompts])
    assert verdicts(silent)["signal"] == "warning" and silent.ok
    assert silent.signal and silent.signal.verdict == "too hard"


def test_a_sampled_answer_that_earns_more_than_the_right_one_is_quoted():
    def long(completion, answer):
        return len(completion) / 10 if completion.startswith("so ") else float(completion == answer)

    check = check_reward(long, ROWS, sample=lambda prompts: [["2", "so it is 16"] for _ in prompts])
    assert verdicts(check)["gold highest"] == "warning" and check.ok
    assert detail(check, "gold highest") == (
        "8 of 16 sampled answers score higher than the right one: 'so it is 16' scores 1.1, and "
        "the right answer, '2', 1. A model learns such answers"
    )


def test_a_number_that_is_0_for_all_sampled_answers_is_named_if_the_rewards_differ():
    def near(completion, answer):
        value = float(completion == answer)
        return tp.Score(value or min(len(completion), 2) / 10, {"exact": value, "faults": 0.0})

    def sample(prompts):
        return [["x", "yy"] for _ in prompts]

    said = str(check_reward(near, ROWS, sample=sample))
    assert "    earns             0.1 (exact 0, faults 0)" in said
    assert "but exact is 0 for each of 16 sampled answers, and 1 for right answers: so" in said
    assert "faults is 0" not in said
    told = str(check_reward(near, ROWS, sample=lambda prompts: [["x", "2"] for _ in prompts]))
    assert "sampled answers, and" not in told


def test_rewards_that_differ_in_a_quarter_of_the_groups_are_not_said_to_differ_often():
    def sample(differing):
        golds = [row["answer"] for row in ROWS]
        return lambda _: [["x", gold if n < differing else "x"] for n, gold in enumerate(golds)]

    seldom, often = (check_reward(right, ROWS, sample=sample(n)).signal for n in (2, 4))
    assert seldom.verdict == often.verdict == "good"
    assert "good: the answers of 2 of 8 groups earn different rewards" in str(seldom)
    assert "good: the answers of a group often earn different rewards" in str(often)


def test_without_right_answers_an_answer_of_each_of_eight_rows_is_shown_to_read():
    rows = [{"prompt": f"Name {n}"} for n in range(12)]
    groups = [["x" * (n + 1), "y" * (n + 2)] for n in range(12)]
    check = check_reward(lambda completion: len(completion), rows, sample=lambda _: groups)
    shown = check.signal.shown
    assert len({one.prompt for one in shown}) == 8
    rewards = [one.reward for one in shown]
    assert rewards == sorted(rewards) and (rewards[0], rewards[-1]) == (1, 13)
    assert len(str(check).splitlines()) < 40


def test_the_first_greedy_score_is_that_of_the_answers_at_temperature_0():
    check = check_reward(
        right,
        ROWS,
        sample=lambda prompts: [["2", "4"] for _ in prompts],
        greedy=lambda prompts: [["2"] for _ in prompts[:4]],
    )
    assert check.signal and check.signal.greedy == 0.25
    assert "first greedy score  0.250 on average over 4 rows" in str(check)


def test_several_rewards_are_checked_together():
    def brief(completion):
        return 1 / (1 + len(completion))

    check = tp.check_reward(tp.Rewards([right, brief], weights=[1, 0.1]), ROWS)
    assert str(check).startswith("reward right + brief on 8 rows") and check.ok


@pytest.fixture
def files(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    (tmp_path / "mine.py").write_text(
        "def right(completion, answer):\n    return float(completion == answer)\n"
        "def long(completion):\n    return len(completion)\n"
        "def other(completion, solution):\n    return 1.0\n"
    )
    return tmp_path


def test_the_command_prints_the_table_and_exits_with_a_code(files, capsys):
    data = ["--data", str(files / "rows.jsonl")]
    assert main(["check", f"{files}/mine.py:right", *data]) == 0
    said = capsys.readouterr().out
    assert said.startswith("reward right on 8 rows\n  finite         ok")
    *_, line = said.splitlines()
    assert line.startswith("  textpolicy check ") and line.endswith(" --sample 8")
    assert "--columns prompt=question" in line and "mine.py:right" in line
    assert main(["check", f"{files}/mine.py:long", *data, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert {f["name"] for f in answer["findings"] if f["verdict"] == "FAILED"} == {"gold highest"}


def test_the_command_says_which_columns_are_missing(files, capsys):
    assert main(["check", f"{files}/mine.py:other", "--data", str(files / "rows.jsonl")]) == 2
    stderr = capsys.readouterr().err
    assert "your reward other asks for `solution`; the rows have `answer`, `question`" in stderr


@pytest.fixture
def found(capsys):
    """Return a function that runs `textpolicy check` and returns what it found."""

    def run(*argv):
        assert main(["check", *argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_the_command_says_that_a_task_is_good_for_a_model_and_how_to_train(found, capsys):
    argv = ["--env", "add", "--rows", "8", "--sample", "4"]
    signal = found(*argv)["signal"]
    assert signal["verdict"] == "good" and signal["differing"] >= 2
    assert signal["greedy"] > 0.2 and 0 < signal["mean"] < 1
    assert [one["reward"] for one in signal["shown"]] == [0.0, 1.0]
    assert main(["check", *argv]) == 0
    text = capsys.readouterr().out
    assert text.startswith("reward on 8 rows")
    assert "of 8 groups of 4 completions; mean reward 0." in text
    assert f"first greedy score  {signal['greedy']:.3f}" in text
    assert "good: the answers of a group often earn different rewards" in text
    assert text.endswith("Train on it:\n  textpolicy train --env add\n")


def test_the_command_says_that_a_task_is_too_hard_and_proposes_solved_examples(found):
    argv = ["--env", "letter", "--rows", "2", "--sample", "2"]
    first, again = found(*argv), found(*argv, "--few-shot", "1")
    assert first["signal"]["verdict"] == again["signal"]["verdict"] == "too hard"
    assert first["next"] == "textpolicy check --env letter --few-shot 4 --rows 2 --sample 2"
    assert again["next"] == "textpolicy envs"


def test_the_command_says_that_a_task_is_too_easy(files, found):
    (files / "mine.py").write_text("def number(completion): return float(completion.isdecimal())")
    rows = str(files / "rows.jsonl")
    easy = found(f"{files}/mine.py", "--data", rows, "--sample", "2")
    assert easy["signal"]["verdict"] == "too easy" and easy["next"] == "textpolicy envs"


def test_the_command_says_that_answers_are_cut_off_and_its_next_command_mends_it(found):
    argv = ["--env", "sort", "--rows", "2", "--sample", "2"]
    short, hurried = found(*argv, "--max-tokens", "4"), found(*argv, "--seconds", "0.01")
    assert short["signal"]["verdict"] == hurried["signal"]["verdict"] == "answers cut off"
    assert short["signal"]["cut"] == 1
    assert hurried["next"] == "textpolicy check --env sort --rows 2 --sample 2 --seconds 0.04"
    mended = found(*shlex.split(short["next"])[2:])
    assert mended["signal"]["cut"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine.py"], "there is nothing to try the reward on: name rows"),
        (["--data", "rows.jsonl"], "there is no reward to try on these rows: name it"),
    ],
)
def test_the_command_says_what_is_missing(arguments, message, capsys):
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_reward_that_fails_a_check_is_not_sampled_for():
    def flat(completion):
        return 1.0

    def sample(prompts):
        raise AssertionError("sampling takes long")

    check = check_reward(flat, ROWS, sample=sample)
    assert not check.ok and check.findings[-1].name == "signal"
    assert check.findings[-1].detail == "mend first: empty low"


def test_sampling_ends_when_its_time_is_over_and_says_so(capsys):
    argv = ["check", "--env", "add", "--rows", "40", "--sample", "8", "--max-tokens", "64"]
    assert main([*argv, "--seconds", "0.01"]) == 0
    shown = capsys.readouterr().out
    assert "of 1 groups of 8 completions" in shown
    assert "39 rows were not sampled, because the time was over" in shown


def test_a_reward_that_changes_its_process_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(keep_working_directory, "users", None)
    monkeypatch.setenv("HOW", "before")
    stop = threading.Event()

    def restless(completion, answer):
        os.chdir(tmp_path)
        os.environ["HOW"] = "after"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if threading.active_count() < 50:
            threading.Thread(target=stop.wait, name="poll").start()
        return float(completion == answer)

    check = check_reward(restless, [{"prompt": "1+1=", "answer": "2"}])
    stop.set()
    said = detail(check, "process")
    for what in ("handler of SIGTERM", "working directory", "variables", "started 'poll'"):
        assert what in said
    assert check.ok and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert Path.cwd() == tmp_path.parent


def test_answers_that_are_cut_off_give_a_signal_if_their_rewards_differ(found):
    """Eight digits fit into eight tokens, and the end of the answer does not."""
    check = found("--env", "sort", "--rows", "4", "--sample", "4", "--max-tokens", "8")
    assert check["signal"]["cut"] == 1
    assert check["signal"]["verdict"] == "good"
