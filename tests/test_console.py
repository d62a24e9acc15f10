"""What a person sees while a run goes on."""

import io
import re

import pytest

from textpolicy.tracking.console import Console, spark_line, visible

METRICS = {
    "reward": 0.5,
    "completions/mean_length": 4.25,
    "tokens_per_second": 1234.0,
    "time/step": 0.3,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        """The lines as they look after every carriage return has gone back and overwritten."""
        lines = []
        for line in re.sub(r"\x1b\[[0-9;]*m", "", self.getvalue()).split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


@pytest.fixture
def clock():
    seconds = [0.0]

    def read() -> float:
        return seconds[0]

    read.advance = lambda by: seconds.__setitem__(0, seconds[0] + by)
    return read


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_pipe_gets_the_first_step_the_last_and_one_line_every_two_seconds_between(clock):
    stream = io.StringIO()
    console = Console(stream, 10, clock=clock)
    for step in range(10):
        clock.advance(0.5)
        console.show(step, METRICS)
    steps = [line.split("/")[0] for line in stream.getvalue().splitlines()]
    assert steps == ["step  1", "step  5", "step  9", "step 10"]


def test_a_line_says_step_reward_length_speed_and_time_left(clock):
    stream = io.StringIO()
    console = Console(stream, 4, clock=clock)
    clock.advance(500)  # loading the model is no part of any step
    console.show(0, METRICS | {"time/step": 30.0})
    assert stream.getvalue().split("  ") == [
        "step 1/4",
        "reward 0.500",
        "length 4.2",
        "1,234 tokens/s",
        "30.00 s/step",
        "1:30 left\n",
    ]


def test_a_step_without_any_score_shows_no_reward_and_does_not_stop_the_run(clock):
    stream = io.StringIO()
    Console(stream, 1, clock=clock).show(0, {"reward/unscored": 1.0})
    assert "reward nan" in stream.getvalue()


def test_a_terminal_gets_one_line_that_is_redrawn(clock, terminal):
    console = Console(terminal, 3, clock=clock)
    console.show(0, METRICS | {"tokens_per_second": 1e9})
    console.show(1, METRICS | {"reward": 0.75})
    assert len(terminal.screen) == 1
    assert terminal.screen[0].startswith("step 2/3  reward ▁█ 0.750  length 4.2  1,234 tokens/s")
    assert terminal.screen[0].endswith("left")  # nothing of the longer first line is left over


def test_a_note_on_a_terminal_stays_above_the_live_line(clock, terminal):
    console = Console(terminal, 3, clock=clock)
    console.show(0, METRICS)
    console.note("a note")
    console.show(1, METRICS)
    console.close()
    first, second, end = terminal.screen
    assert first == "a note"
    assert second.startswith("step 2/3")
    assert end == ""


def test_a_live_line_never_wraps(clock, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    Console(terminal, 3, clock=clock).show(0, METRICS)
    assert len(terminal.screen[0]) <= 29


def test_no_color_is_honoured(clock, terminal, monkeypatch):
    Console(terminal, 3, clock=clock).show(0, METRICS)
    assert "\x1b[" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    Console(plain, 3, clock=clock).show(0, METRICS)
    assert "\x1b" not in plain.getvalue()


def test_a_dumb_terminal_gets_plain_lines(clock, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    Console(terminal, 3, clock=clock).show(0, METRICS)
    assert "\r" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")


def test_a_spark_line_rises_with_its_values_and_keeps_to_its_width():
    assert spark_line([], 8) == ""
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
    assert visible(text) == shown
