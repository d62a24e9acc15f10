"""The scripts of benchmarks/: what they refuse before anything is measured."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
COUNTS = dict.fromkeys(["compiled", "generate", "grpo_step", "prompt_sharing", "scaling"], "--runs")


@pytest.mark.parametrize(("script", "flag"), [*COUNTS.items(), ("sft", "--repeats")])
def test_a_median_of_no_runs_is_not_asked_for(script, flag, monkeypatch, capsys):
    path = str(SCRIPTS / f"{script}.py")
    monkeypatch.setattr(sys, "argv", [path, flag, "0"])
    monkeypatch.syspath_prepend(str(SCRIPTS))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(path, run_name="__main__")
    assert stopped.value.code == 2
    assert f"{flag} is 0; expected at least 1" in capsys.readouterr().err
