"""Runs the sessions that a page shows: lines after `$` are typed, the lines below are printed.

A line of three dots stands for any lines. Other lines, without three dots at their end, are the
beginnings of printed lines, in this order. Numbers may differ, because they depend on the machine;
rewards on held-out tasks may differ by a little. A command that ends with `&` goes on until the
session ends, from its first printed line on. `# exit code N` says that a command fails.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.test_docs import blocks, write_files
from textpolicy.cli import main

_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
_STEPS = re.compile(r"--steps \d+")
_HELD_OUT = re.compile(r"held-out tasks: (-?[\d.]+) ± [\d.]+ before, (-?[\d.]+) ± [\d.]+ after")


@dataclass(frozen=True)
class Typed:
    """One command of a page, and the lines that the page shows below it."""

    words: list[str]
    shown: list[str]
    exit_code: int = 0


def typed_in(page: str) -> Iterator[Typed]:
    """Yield the commands of a page in their order."""
    for block in blocks(page, "text"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            typed, *shown = part.splitlines()
            line, _, code = typed.partition("  # exit code ")
            lines = [line for line in shown if line.strip()]
            yield Typed(shlex.split(line), lines, int(code or 0))


def masked(line: str) -> str:
    """Return the line with one sign for each number, and single spaces."""
    return " ".join(_NUMBER.sub("#", line).split())


def missing_line(shown: list[str], printed: list[str]) -> str | None:
    """Return the first shown line that was not printed where the page shows it, or None."""
    place, skipped = 0, False
    for line in shown:
        if line == "...":
            skipped = True
            continue
        start = masked(line.removesuffix("..."))
        fits = [masked(one).startswith(start) for one in printed[place:]]
        found = fits.index(True) if True in fits else len(fits)
        if found == len(fits) or (found and not skipped):
            return line
        place, skipped = place + found + 1, False
    return None


def held_out_rewards(lines: list[str]) -> list[float]:
    """Return the rewards before and after that these lines report."""
    return [float(value) for line in lines for pair in _HELD_OUT.findall(line) for value in pair]


def run_shortened(page: str, folder: Path, captured: Callable[[], tuple[str, str]]) -> None:
    """Run the commands of a page with one step of a run each, and compare only their exit codes."""
    write_files(page, folder)
    for typed in typed_in(page):
        line = _STEPS.sub("--steps 1", shlex.join(typed.words))
        code, text = _run_command(shlex.split(line), folder, captured)
        assert code == typed.exit_code, f"{line}\n{text}"


def run_session(page: str, folder: Path, captured: Callable[[], tuple[str, str]]) -> list[str]:
    """Run the commands of a page in this folder, compare what they print, and return it."""
    write_files(page, folder)
    everything: list[str] = []
    with ExitStack() as running:
        for typed in typed_in(page):
            if typed.words[-1] == "&":
                running.enter_context(_in_background(typed.words[:-1], folder))
                continue
            code, text = _run_command(typed.words, folder, captured)
            assert code == typed.exit_code, f"{shlex.join(typed.words)}\n{text}"
            lines = [line for line in text.splitlines() if line.strip()]
            assert missing_line(typed.shown, lines) is None, f"{shlex.join(typed.words)}\n{text}"
            expected = held_out_rewards(typed.shown) or held_out_rewards(lines)
            assert held_out_rewards(lines) == pytest.approx(expected, abs=0.1)
            everything += lines
    return everything


def _run_command(
    words: list[str], folder: Path, captured: Callable[[], tuple[str, str]]
) -> tuple[int, str]:
    """Return the exit code and all that the command printed."""
    program, *arguments = words
    if program == "textpolicy":
        captured()
        code = main(arguments)
        out, err = captured()
        return code, err + out
    assert program == "python"
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@contextmanager
def _in_background(words: list[str], folder: Path) -> Generator[None]:
    """Run a command until the end of the block, and begin the block after its first line."""
    program = {"python": [], "textpolicy": ["-m", "textpolicy"]}[words[0]]
    arguments = [sys.executable, *program, *words[1:]]
    with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline(), shlex.join(words)
        try:
            yield
        finally:
            process.terminate()
