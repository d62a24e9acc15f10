"""Files of a run with values of a wrong kind: a page, a list or an error, and no traceback."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from textpolicy.cli import main

ODD: list[Any] = [None, True, -1, 10**30, 0.5, "x", [1], {"a": 1}, [], [[1]], "NaN"]
METRICS = {"step": 0, "reward": 0.5, "time/step": 1.0, "loss": 1.0}
SAMPLE = {
    "step": 0, "group": 0, "member": 0, "task": "t", "prompt": "p", "completion": "c",
    "reward": 1.0, "rewards": {"r": 1.0}, "advantage": 0.1, "version": 1, "stop_reason": "x",
    "tokens": 3, "turns": [{"completion": "a", "reward": 1.0, "replies": []}],
}  # fmt: skip


def spoilt_rows() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield a row of metrics and a row of samples, one of which has an odd value."""
    yield from ((METRICS | {name: value}, SAMPLE) for name in METRICS for value in ODD)
    yield from ((METRICS, SAMPLE | {name: value}) for name in SAMPLE for value in ODD)


@pytest.mark.slow
def test_a_run_with_odd_rows_is_shown_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = 0
    (tmp_path / "config.toml").write_text('[task]\nenv = "add"\n[run]\nsteps = 3\n')
    for metrics, sample in spoilt_rows():
        rows = {"metrics.jsonl": [METRICS, metrics], "samples.jsonl": [SAMPLE, sample]}
        for name, content in rows.items():
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        for argv in (["report", str(tmp_path)], ["runs", str(tmp_path)]):
            shown += main(argv) == 0
            assert "Traceback" not in capsys.readouterr().err
    assert shown > len(ODD) * (len(METRICS) + len(SAMPLE))
