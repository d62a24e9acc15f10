"""Draw a run as one SVG: the curve of its reward, and the panel that a terminal shows.

python tools/run_picture.py runs/sorted --step 42 --output docs/images/run.svg

Both are drawn from the files of the run. The panel is that of `textpolicy train` after the step.
The picture of the README is the README's run with a reward of its own, with `--eval-every 10`.
"""

import json
import re
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import MONOKAI

from textpolicy.runs import RunDirectory
from textpolicy.tracking.live_view import panel
from textpolicy.tracking.run_history import RunHistory

_COLUMNS = 88
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 840, 170, 44, 34, 36
_STYLE = (
    ".curve text{font:14px sans-serif;fill:#57606a}.frame{fill:none;stroke:#8b949e}"
    ".trained{fill:none;stroke:#0b7285;stroke-width:2}.held{fill:#e8590c}"
    "@media(prefers-color-scheme:dark){.curve text{fill:#c9d1d9}.trained{stroke:#3bc9db}"
    ".held{fill:#ffa94d}}"
)
# The format of rich, without the fonts that it loads from another site. {{PLACE}} is filled later.
_TERMINAL = """\
<svg {{PLACE}} viewBox="0 0 {width} {height}">
<style>.{unique_id}-title{{font:18px sans-serif}}
.{unique_id}-matrix text{{font:{char_height}px monospace}}{styles}</style>
<defs>{lines}</defs>{chrome}<g transform="translate({terminal_x},{terminal_y})">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""

Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument(
        "--step", type=int, required=True, help="the last step that the panel shows"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    run = RunDirectory(options.run)
    rows, samples = _read(run.metrics), _read(run.samples)
    shown = [sample for sample in samples if sample["step"] == options.step - 1]
    terminal = terminal_svg(history_until(options.step, rows), shown[0])
    options.output.write_text(picture(rows, terminal), encoding="utf-8")


def _read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def history_until(step: int, rows: Rows) -> RunHistory:
    """Return what the panel knew after this step, with a clock that the recorded times set."""
    steps = [row for row in rows if "time/step" in row]
    history, now = RunHistory(len(steps)), 0.0
    for row in steps[:step]:
        now += row["time/step"] + row.get("time/evaluate", 0)
        history.add(row["step"], dict(row), now)
    return history


def terminal_svg(history: RunHistory, sample: Mapping[str, Any]) -> str:
    """Return the panel as rich draws it, in an SVG that has no place yet."""
    console = Console(record=True, width=_COLUMNS, file=StringIO(), highlight=False)
    console.print(panel(history, sample, _COLUMNS))
    return console.export_svg(
        title="textpolicy train", theme=MONOKAI, code_format=_TERMINAL, unique_id="terminal"
    )


def picture(rows: Rows, terminal: str) -> str:
    """Return an SVG with the curve above the terminal."""
    across, down = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', terminal)[0])
    top, tall = _TOP + _HEIGHT + _GAP, _WIDTH * down / across
    place = f'y="{top}" width="{_WIDTH}" height="{tall:.0f}"'
    curve = "\n".join(curves(rows))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top + tall:.0f}" '
        f'role="img" aria-label="The reward of a run, and the panel of a terminal">\n'
        f"<style>{_STYLE}</style>\n{curve}\n"
        f"{terminal.replace('{PLACE}', place)}</svg>\n"
    )


def curves(rows: Rows) -> Iterator[str]:
    """Yield the reward of the training tasks as a line, and that of held-out tasks as dots."""
    room = _WIDTH - _LEFT - 10
    steps = max(row["step"] for row in rows)

    def place(row: Mapping[str, Any], name: str) -> tuple[float, float]:
        return room * row["step"] / steps, _HEIGHT * (1 - row[name])

    yield f'<g class="curve" transform="translate({_LEFT} {_TOP})">'
    yield f'<path class="frame" d="M0 0v{_HEIGHT}h{room}"/>'
    yield _text(0, -12, "reward of each step; dots: greedy reward on held-out tasks", "start")
    yield _text(-8, 10, "1", "end")
    yield _text(-8, _HEIGHT, "0", "end")
    yield _text(room, _HEIGHT + 20, f"step {steps}", "end")
    line = [place(row, "reward") for row in rows if "reward" in row]
    yield f'<path class="trained" d="M{" ".join(f"{x:.1f},{y:.1f}" for x, y in line)}"/>'
    for x, y in (place(row, "eval/reward") for row in rows if "eval/reward" in row):
        yield f'<circle class="held" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    yield "</g>"


def _text(x: int, y: int, words: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


if __name__ == "__main__":
    main()
