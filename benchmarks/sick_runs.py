"""Record a healthy run and sick runs of the embedded model, and draw their curves side by side.

    python benchmarks/sick_runs.py --output benchmarks/results/sick_runs.json \
        --plot docs/images/sick_runs.svg

The rows and the rewards are the files of the tutorial `docs/tutorials/first_reward.md`. Each run is
the command that the record shows. `--from FILE` draws a record without running anything.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from setting import setting

_ROOT = Path(__file__).resolve().parents[1]
_PAGE = _ROOT / "docs" / "tutorials" / "first_reward.md"
_FILE = re.compile(r"^```python (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EVERY = "--data rows.jsonl --max-tokens 12 --steps 60 --eval-every 15"
COMMANDS = {
    "healthy": f"train {_EVERY} --reward places.py",
    "no signal": f"train {_EVERY} --reward exact.py",
    "hacked": f"train {_EVERY} --reward order.py",
    "rate too high": f"train {_EVERY} --reward places.py --lr 1e-2",
    "few rows": f"train {_EVERY} --reward places.py --data few.jsonl --eval-data others.jsonl",
}
METRICS = (
    "reward",
    "eval/reward",
    "eval/rewards/reward/right",
    "frac_mixed",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "reward_std",
    "grad_norm",
    "adapters/delta_norm",
)
_FEW, _MEASURED = 6, 100


def write_inputs(folder: Path) -> None:
    """Write the files of the tutorial and its rows to a folder, a few of them apart from others."""
    for name, text in _FILE.findall(_PAGE.read_text("utf-8")):
        (folder / name).write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, "make_rows.py"], cwd=folder, check=True)
    rows = (folder / "rows.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(rows[:_FEW]), encoding="utf-8")
    (folder / "others.jsonl").write_text("".join(rows[-_MEASURED:]), encoding="utf-8")


def record(name: str, command: str, folder: Path) -> dict[str, Any]:
    """Run one command and return its metrics, one list each, and the alarms that went off."""
    output = folder / "runs" / name.replace(" ", "-")
    words = [sys.executable, "-m", "textpolicy", *shlex.split(command), "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stderr}")
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    alarms = {key: row["step"] for row in reversed(rows) for key in row if _is_alarm(key, row)}
    samples = [json.loads(line) for line in (output / "samples.jsonl").open(encoding="utf-8")]
    return {
        "command": f"textpolicy {command}",
        "metrics": {metric: [_rounded(row.get(metric)) for row in rows] for metric in METRICS},
        "alarms": alarms,
        "last_group": [[sample["completion"], sample["reward"]] for sample in samples[-8:]],
    }


def _is_alarm(key: str, row: Mapping[str, float]) -> bool:
    return key.startswith("alarm/") and row[key] == 1


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


_COLUMNS = (
    ("reward, held out dashed", ("reward", "eval/reward"), 1.0),
    ("right (held out)", ("eval/rewards/reward/right",), 1.0),
    ("frac_mixed", ("frac_mixed",), 1.0),
    ("entropy", ("entropy",), None),
    ("mean_length", ("completions/mean_length",), 12.0),
    ("delta_norm", ("adapters/delta_norm",), None),
)
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _LEFT, _TOP = 130, 70, 40, 34, 110, 40
_STYLE = (
    "text{font:12px sans-serif;fill:#57606a}path{fill:none;stroke-width:2}"
    ".frame{stroke:#8b949e;stroke-width:1}.curve0{stroke:#0b7285}"
    ".curve1{stroke:#e8590c;stroke-dasharray:4 3}.name{font-weight:bold}"
    "@media(prefers-color-scheme:dark){text{fill:#c9d1d9}.curve0{stroke:#3bc9db}"
    ".curve1{stroke:#ffa94d}}"
)


def plot(runs: Mapping[str, Any]) -> str:
    """Return an SVG with a row of charts for each run; charts of a column share their axis."""
    width = _LEFT + len(_COLUMNS) * (_WIDTH + _GAP_X)
    height = _TOP + len(runs) * (_HEIGHT + _GAP_Y)
    body: list[str] = []
    for column, (title, names, top) in enumerate(_COLUMNS):
        x = _LEFT + column * (_WIDTH + _GAP_X)
        body.append(f'<text x="{x}" y="{_TOP - 14}">{title}</text>')
        high = top or max(max(_values(run, name)) for run in runs.values() for name in names)
        for row, run in enumerate(runs.values()):
            place = f"{x} {_TOP + row * (_HEIGHT + _GAP_Y)}"
            body.append(f'<g transform="translate({place})">')
            body += _chart(run, names, high)
            body.append("</g>")
    for row, name in enumerate(runs):
        y = _TOP + row * (_HEIGHT + _GAP_Y) + _HEIGHT / 2
        body.append(f'<text class="name" x="6" y="{y:.0f}">{name}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Curves of a healthy run and of sick runs">\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(body) + "\n</svg>\n"
    )


def _values(run: Mapping[str, Any], name: str) -> list[float]:
    return [value for value in run["metrics"][name] if value is not None] or [0.0]


def _chart(run: Mapping[str, Any], names: Sequence[str], high: float) -> Iterator[str]:
    yield f'<path class="frame" d="M0 0v{_HEIGHT}h{_WIDTH}"/>'
    yield f'<text x="-5" y="8" text-anchor="end">{_short(high)}</text>'
    yield f'<text x="-5" y="{_HEIGHT}" text-anchor="end">0</text>'
    for number, name in enumerate(names):
        values = run["metrics"][name]
        points = " ".join(
            f"{_WIDTH * step / (len(values) - 1):.1f},{_HEIGHT * (1 - value / high):.1f}"
            for step, value in enumerate(values)
            if value is not None
        )
        if points:
            yield f'<path class="curve{number}" d="M{points}"/>'


def _short(value: float) -> str:
    return f"{math.ceil(value * 10) / 10:g}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="a record to draw")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the record to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the charts to this file")
    options = parser.parse_args()
    if options.source:
        runs = json.loads(options.source.read_text("utf-8"))["runs"]
    else:
        with TemporaryDirectory() as folder:
            write_inputs(Path(folder))
            runs = {name: record(name, command, Path(folder)) for name, command in COMMANDS.items()}
    for name, run in runs.items():
        print(f"{name:<14} reward {run['metrics']['reward'][-2]}  alarms {run['alarms']}")
    if options.output:
        text = json.dumps({"setting": setting(), "runs": runs}, separators=(",", ":"))
        options.output.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        options.plot.write_text(plot(runs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
