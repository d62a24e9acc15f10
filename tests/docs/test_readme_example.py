"""README's example of a reward of one's own raises the held-out reward as the page says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_docs import write_files

PAGE = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
RESULT = re.compile(r"held-out tasks: ([\d.]+) ± ([\d.]+) before, ([\d.]+) ± ([\d.]+) after")


def result_in(text: str) -> tuple[float, float, float]:
    """Return the rewards before and after, and the larger of their standard errors."""
    found = RESULT.search(text)
    assert found, text
    before, error, after, other_error = map(float, found.groups())
    return before, after, max(error, other_error)


@pytest.mark.slow
def test_the_own_reward_of_the_readme_rises_as_the_page_shows(tmp_path):
    write_files(PAGE, tmp_path)
    printed = ""
    for line in re.findall(r"^\$ (.*)$", PAGE, re.MULTILINE):
        program, *words = shlex.split(line)
        argv = words if program == "python" else ["-m", program, *words]
        done = subprocess.run(
            [sys.executable, *argv],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    assert "good: the answers of a group often earn different rewards" in printed
    before, after, error = result_in(printed)
    assert after - before > 4 * error
    shown_before, shown_after, _ = result_in(PAGE)
    assert before == pytest.approx(shown_before, abs=0.01)
    assert after == pytest.approx(shown_after, abs=0.05)
