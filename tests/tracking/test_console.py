"""The console of a run: a panel on a real terminal, and lines in a file."""

import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from functools import cache

import pytest
import rich.console

from textpolicy.rewards.judge_numbers import COSTS, NO_GRADE
from textpolicy.tracking.console import Console
from textpolicy.tracking.live_view import panel
from textpolicy.tracking.named_numbers import describe_numbers
from textpolicy.tracking.run_history import (
    RunHistory,
    format_duration,
    spark_line,
    time_shares,
)
from textpolicy.tracking.samples import sample_line
from textpolicy.untrusted.terminal import shorten_line, terminal_safe

METRICS = {
    "reward": 0.5,
    "completions/mean_length": 4.25,
    "tokens_per_second": 1234.0,
    "time/step": 0.3,
    "time/generate": 0.12,
    "time/train": 0.17,
    "time/reload": 0.001,
}
SAMPLE = {"prompt": "2+3=", "completion": "5", "reward": 1.0}
# Runs on a terminal, with hostile text from a model.
PROGRAM = r"""
import os, sys, time
from textpolicy.tracking.console import Console
console = Console(sys.stderr, 8)
console.note("before [/bold] 0.5")
for step in range(4):
    metrics = {"reward": step / 10, "reward_std": 0.25, "completions/mean_length": 4.25}
    metrics |= {"entropy": 0.5, "frac_mixed": 0.75, "frac_all_good": 0.25, "frac_all_bad": 0.0}
    metrics |= {"tokens_per_second": 1234.0, "time/step": 1.0, "time/generate": 0.4}
    metrics |= {"time/train": 0.5}
    if step % 2 == 0:
        metrics |= {"eval/reward": 0.25 + step / 8, "eval/standard_error": 0.03}
    text = "5\x1b[2J\x1b]0;taken\x07[/foo]\u202e\n9"
    console.show(step, metrics, [{"prompt": "2+3=", "completion": text, "reward": 1.0}])
    if step == 1:
        console.note("a note")
    time.sleep(0 if os.environ["TERM"] == "dumb" else 0.21)
console.close()
print("after", file=sys.stderr)
"""


class Screen:
    """The part of a terminal that rich uses: cursor up, erase line, carriage returns, colours."""

    def __init__(self, text):
        self.lines, self.row, self.column = [""], 0, 0
        self.unknown = []
        for control, char in re.findall(r"(\x1b\[[?0-9;]*[A-Za-z]|\x1b.)|(.)", text, re.DOTALL):
            self._control(control) if control else self._write(char)

    def _control(self, control):
        if control == "\x1b[1A":
            self.row -= 1
        elif control == "\x1b[2K":
            self.lines[self.row] = ""
        elif not re.fullmatch(r"\x1b\[([0-9;]*m|\?25[hl])", control):
            self.unknown.append(control)

    def _write(self, char):
        if char == "\n":
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif char == "\r":
            self.column = 0
        else:
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + char + line[self.column + 1 :]
            self.column += 1


@cache
def on_terminal(*, width=100, **environment):
    """Return what the program wrote to a terminal of this width."""
    ours, its = pty.openpty()
    ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    inherited = {n: v for n, v in os.environ.items() if n not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=its,
        stdout=its,
        stderr=its,
        env=inherited | {"TERM": "xterm-256color"} | environment,
    )
    os.close(its)
    sent = b""
    # On Linux, reading raises an error once no process holds the terminal open.
    try:
        while part := os.read(ours, 65536):
            sent += part
    except OSError:
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return sent.decode()


@pytest.fixture
def clock():
    seconds = [0.0]

    def read() -> float:
        return seconds[0]

    read.advance = lambda by: seconds.__setitem__(0, seconds[0] + by)
    return read


@pytest.mark.slow
def test_a_terminal_gets_a_panel_that_is_redrawn_in_place_and_notes_above_it():
    screen = Screen(on_terminal())
    lines = [line.rstrip() for line in screen.lines]
    assert lines[:2] == ["before [/bold] 0.5", "a note"]
    assert lines[2].startswith("╭─ step 4/8 ─")
    assert [line.strip("│ ").split()[0] for line in lines[4:12]] == [
        *("reward", "eval", "length", "entropy", "groups", "speed", "time", "sample")
    ]
    assert re.search(r"▁\S+█ +0\.300 +± 0\.25", lines[4])
    # Measured at every other step, so the last value stays.
    assert re.search(r"▁█ +0\.500 +± 0\.03", lines[5])
    assert "75% mixed   25% all good   0% all bad" in lines[8]
    assert re.search(r"1,234 +tokens/s +1\.00 s a step", lines[9])
    assert re.search("█+ +generate 40% +train 50%", lines[10])
    assert re.search(r"─ 0:0\d left ─", lines[12])
    assert lines[13:15] == ["after", ""]


def test_text_of_a_model_neither_moves_the_cursor_nor_becomes_markup():
    sent = on_terminal()
    assert Screen(sent).unknown == []
    assert r"2+3= → 5\x1b[2J\x1b]0;taken\x07[/foo]\u202e⏎9  (reward 1)" in sent
    assert "\x07" not in sent and "\u202e" not in sent


@pytest.mark.slow
def test_a_panel_never_wraps_and_the_cursor_comes_back():
    sent = on_terminal(width=48, NO_COLOR="1")
    lines = [line for line in Screen(sent).lines if line.startswith(("│", "╭", "╰"))]
    # The legend of the times has a line of its own.
    assert len(lines) == 12
    assert {len(line) for line in lines} == {48}
    assert sent.rfind("\x1b[?25h") > sent.rfind("\x1b[?25l") > -1


def test_no_color_is_honoured():
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m", on_terminal())
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", on_terminal(width=48, NO_COLOR="1"))


def test_a_dumb_terminal_gets_plain_lines():
    sent = on_terminal(TERM="dumb")
    assert "\x1b" not in sent
    assert len(re.findall(r"^step \d/8", sent, re.MULTILINE)) == 4


def test_a_pipe_gets_a_line_a_step_and_a_sample_every_ten_seconds(clock):
    stream = io.StringIO()
    console = Console(stream, 10, clock=clock)
    for step in range(10):
        clock.advance(3)
        console.show(step, METRICS, [SAMPLE])
    lines = stream.getvalue().splitlines()
    steps = [line.split("/")[0] for line in lines if line.startswith("step")]
    assert steps == [f"step {step:>2}" for step in range(1, 11)]
    assert [at for at, line in enumerate(lines) if line.startswith("sample")] == [1, 6, 11]
    assert lines[1] == "sample  2+3= → 5  (reward 1)"


def test_a_line_has_step_reward_length_speed_shares_of_time_and_time_left(clock):
    stream = io.StringIO()
    console = Console(stream, 4, clock=clock)
    clock.advance(500)  # loading the model is no part of any step
    times = {"time/generate": 12.0, "time/train": 17.0, "time/checkpoint": 0.9}
    console.show(0, METRICS | {"time/step": 30.0} | times)
    assert stream.getvalue().split("  ") == [
        "step 1/4",
        "reward 0.500",
        "length 4.2",
        "1,234 tokens/s",
        "30.00 s/step",
        "generate 40%, train 57%, checkpoint 3%",
        "1:30 left\n",
    ]


def test_a_step_without_rewards_shows_nan_and_does_not_stop_the_run(clock):
    stream = io.StringIO()
    Console(stream, 1, clock=clock).show(0, {"reward/unscored": 1.0})
    assert "reward nan" in stream.getvalue()


def test_a_step_whose_update_was_skipped_says_so(clock):
    stream = io.StringIO()
    console = Console(stream, 2, clock=clock)
    console.show(0, METRICS | {"update_skipped/no_signal": 1.0})
    console.show(1, METRICS | {"update_skipped/no_signal": 0.0})
    first, second = stream.getvalue().splitlines()
    assert "no update: no signal" in first and "no update" not in second


def test_a_step_of_workers_that_brought_no_new_groups_says_so(clock):
    stream = io.StringIO()
    Console(stream, 1, clock=clock).show(0, {"loss": 0.1, "trainer/idle": 0.0, "time/step": 1.0})
    assert stream.getvalue().split("  ")[1:3] == ["no new groups", "1.00 s/step"]


def test_the_time_left_of_a_resumed_run_is_estimated_from_its_own_steps():
    history = RunHistory(100)
    for step, now in ((90, 10.0), (91, 12.0)):
        history.add(step, {"time/step": 2.0}, now)
    assert history.seconds_left == 16
    assert [format_duration(seconds) for seconds in (16, 61, 3661)] == ["0:16", "1:01", "1:01:01"]


def test_the_time_left_follows_the_last_steps_and_not_the_whole_run():
    history = RunHistory(500)
    for step in range(400):
        history.add(step, {"time/step": 113.0}, now=113.0 * step)
    for step in range(86):
        history.add(400 + step, {"time/step": 5.0}, now=113.0 * 399 + 5.0 * (step + 1))
    assert history.seconds_left == 14 * 5


def test_the_time_left_counts_measurements_apart_from_steps():
    history = RunHistory(10, measured_every=4)
    history.add(0, {"time/step": 2.0, "time/evaluate": 30.0}, now=40.0)
    # Three measurements follow: after 4 steps, after 8 steps and at the end.
    assert history.seconds_left == 9 * 2 + 3 * 30
    for step in (1, 2, 3):
        history.add(step, {"time/step": 2.0}, now=40.0 + 2 * step)
    assert history.seconds_left == 6 * 2 + 3 * 30
    history.add(4, {"time/step": 2.0, "time/evaluate": 20.0}, now=46.0 + 20 + 2)
    assert history.seconds_left == 5 * 2 + 2 * 20


LABELS = ["reward", "eval", "length", "entropy", "groups", "speed", "time", "alarm", "sample"]


@pytest.mark.parametrize("width", [60, 80, 100, 110, 120, 160])
def test_the_panel_keeps_its_labels_and_numbers_whole_on_a_terminal_of_few_columns(width):
    history, times = RunHistory(200), {"generate": 40, "reward": 20, "train": 31, "reload": 3}
    metrics = {"reward": -12345.678, "reward_std": 1234.5, "completions/mean_length": 1234.5}
    metrics |= {"entropy": 0.512, "frac_mixed": 0.125, "frac_all_good": 0.5, "frac_all_bad": 0.375}
    metrics |= {"tokens_per_second": 123456.0, "time/step": 1234.56, "eval/reward": 0.5}
    metrics |= {"eval/standard_error": 0.03, "completions/clipped_ratio": 1.0, "alarm/length": 1.0}
    metrics |= {"alarm/entropy": 1.0, "alarm/reward": 0.0}
    metrics |= {f"time/{n}": 12.3456 * x for n, x in (times | {"checkpoint": 6}).items()}
    for step in range(60):
        history.add(step, metrics | {"reward": -12345.678 + step % 7}, 1234.56 * step)
    stream = io.StringIO()
    terminal = rich.console.Console(file=stream, width=width, force_terminal=True, no_color=True)
    terminal.print(panel(history, SAMPLE | {"completion": "5" + "0" * 200}, width))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert {len(line) for line in lines} == {width}
    rows = [line.strip("│ ") for line in lines[2:-1]]
    assert [row.split()[0] for row in rows if row.split()[0] in LABELS] == LABELS
    # Only the sample is cut.
    assert [row.split()[0] for row in rows if "…" in row] == ["sample"]
    shown = " ".join(" ".join(rows).split())
    for text in ("-12,343 ± 1234.50", "1,234 100% cut off", "123,456 tokens/s 1234.56 s a step"):
        assert text in shown
    assert "12% mixed 50% all good 38% all bad" in shown and "alarm length, entropy" in shown
    for name, share in (times | {"checkpoint": 6}).items():
        assert f"{name} {share}%" in shown


def test_a_pipe_gets_a_bounded_number_of_lines_of_a_long_run(clock):
    stream = io.StringIO()
    console = Console(stream, 400, clock=clock)
    for step in range(400):
        clock.advance(0.75)
        console.show(step, METRICS, [SAMPLE])
    lines = stream.getvalue().splitlines()
    assert 40 <= len(lines) < 60
    assert [line.split("/")[0] for line in (lines[0], lines[-1])] == ["step   1", "step 400"]


def test_a_pipe_gets_a_line_at_least_every_half_minute(clock):
    stream = io.StringIO()
    console = Console(stream, 4000, clock=clock)
    for step in range(20):
        clock.advance(31)
        console.show(step, METRICS)
    assert len(stream.getvalue().splitlines()) == 20


def test_a_line_ends_with_the_alarms_that_are_present(clock):
    stream = io.StringIO()
    alarms = {"alarm/length": 1.0, "alarm/reward": 0.0}
    Console(stream, 1, clock=clock).show(0, METRICS | alarms)
    assert stream.getvalue().endswith("left  alarm: length\n")


def test_shares_of_time_leave_out_parts_below_a_hundredth():
    assert time_shares(METRICS) == {"generate": 0.12 / 0.3, "train": 0.17 / 0.3}
    assert time_shares({}) == {}


def test_a_sample_is_one_short_line():
    chat = [{"role": "system", "content": "no"}, {"role": "user", "content": "2+3="}]
    assert sample_line(SAMPLE | {"prompt": chat, "reward": None}, 80) == "2+3= → 5  (no reward)"
    line = sample_line(SAMPLE | {"completion": "a\nb\tc" + "x" * 500 + " so 5"}, 80)
    assert line.startswith("2+3= → a⏎b cxxx")
    assert line.endswith("x so 5  (reward 1)")
    assert len(line) == 80


def test_the_line_of_a_sample_has_the_numbers_that_its_reward_reported():
    reported = {"metrics": {"exact": 0.0, "length ok": 1.0, "third": 1.0}}
    line = sample_line(SAMPLE | reported, 80)
    assert line == "2+3= → 5  (reward 1, exact 0, length ok 1)"


def test_a_long_prompt_keeps_the_question_at_its_end():
    long = {"prompt": "Think step by step. " * 30 + "What is 2+3?"}
    line = sample_line(SAMPLE | long, 100)
    assert line.startswith("Think step by step.")
    assert line.endswith("What is 2+3? → 5  (reward 1)")
    assert len(line) == 100
    both = sample_line(SAMPLE | long | {"completion": "First, " * 90 + "so 5"}, 100)
    assert "What is 2+3? → First, " in both
    assert both.endswith("so 5  (reward 1)")
    assert len(both) == 100


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 20])
def test_a_line_is_as_long_as_allowed_and_has_the_beginning_and_the_end(limit):
    assert shorten_line("short", 5) == "short"
    line = shorten_line("abcdefghijklmnopqrstuvwxyz", limit)
    assert len(line) == limit
    head, tail = line.split("…")
    assert "abcdefghij".startswith(head)
    assert "klmnopqrstuvwxyz".endswith(tail)


def test_numbers_beside_the_reward_are_on_the_line_of_the_step(clock):
    stream = io.StringIO()
    scores = {"rewards/reward/mean": 0.5, "rewards/reward/std": 0.1, "rewards/reward/right": 0.25}
    Console(stream, 1, clock=clock).show(0, METRICS | scores)
    assert "reward 0.500  length 4.2  right 0.250  1,234 tokens/s" in stream.getvalue()


def test_a_few_numbers_of_reward_functions_are_named_shortly():
    one = {"rewards/mine/mean": 0.5, "rewards/mine/std": 0.1, "rewards/mine/right": 0.25}
    assert describe_numbers(one) == ["right 0.250"]
    assert describe_numbers({f"eval/{name}": value for name, value in one.items()}) == []
    assert describe_numbers({"eval/rewards/mine/right": 1.0}, "eval/") == ["right 1.000"]
    # The numbers of an algorithm have no reward function in their names.
    assert describe_numbers({"rewards/chosen": 1.0, "reward": 0.5}) == []
    two = one | {"rewards/form/mean": 1.0, "rewards/form/std": 0.0}
    assert describe_numbers(two) == ["mine 0.500", "right 0.250", "form 1.000"]
    assert describe_numbers(two | {"rewards/form/right": 0.75})[1:] == [
        "mine.right 0.250",
        "form 1.000",
        "form.right 0.750",
    ]
    measured = {"eval/rewards/mine/right": 0.5, "eval/standard_errors/mine/right": 0.125}
    assert describe_numbers(measured, "eval/") == ["right 0.500 ± 0.125"]
    many = {f"rewards/mine/{name}": 0.0 for name in "abcdefg"}
    assert describe_numbers(many)[3:] == ["d 0.000", "3 more in metrics.jsonl"]
    (hostile,) = describe_numbers({"rewards/mine/\x1b[2J" + "x" * 90: 0.0})
    assert "\x1b" not in hostile and len(hostile) < 40


def test_of_the_numbers_of_a_judge_people_see_how_often_it_gave_no_grade():
    metrics = {f"rewards/strict/{name}": 0.5 for name in (*sorted(COSTS), NO_GRADE, "polite")}
    assert describe_numbers(metrics) == ["no_grade 0.500", "polite 0.500"]
    row = {"prompt": "Q", "completion": "A", "reward": 1.0, "metrics": {"cached": 1.0, NO_GRADE: 0}}
    assert sample_line(row, 80) == "Q → A  (reward 1, no_grade 0)"


def test_a_spark_line_rises_with_its_values_and_keeps_its_width():
    assert spark_line([], 8) == ""
    assert spark_line([float("nan"), 1.0, float("inf"), 2.0], 8) == spark_line([1.0, 2.0], 8)
    assert spark_line([0.3, 0.3], 8) == "▁▁"
    assert spark_line([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert spark_line([0, 0, 2, 2, 7, 7], 3) == "▁▃█"
    assert len(spark_line(list(range(1000)), 16)) == 16


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("5+5=10", "5+5=10"),
        ("é 漢 🙂\n\tnext", "é 漢 🙂\n\tnext"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("right\rleft\b", "right\\rleft\\x08"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202eabc", "\\u202eabc"),
    ],
)
def test_model_text_cannot_move_the_cursor_or_hide(text, shown):
    assert terminal_safe(text) == shown
