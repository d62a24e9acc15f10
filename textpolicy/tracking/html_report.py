"""The report of a run: one HTML file that needs nothing beside it and runs no script."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from textpolicy.tracking.plot import line_plot

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:760px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td{padding:.1em 1em .1em 0;vertical-align:top}"
    "td:first-child{color:#666}"
)


def write_html_report(
    path: Path,
    title: str,
    *,
    plots: Mapping[str, Sequence[str]],
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, object],
    settings: Mapping[str, object],
) -> None:
    """Write what a run came to: `plots` names the metrics that each plot shows over the steps.

    `rows` are those of a metrics file. Whatever the text holds, it is shown as text.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        _table(facts),
    ]
    for name, metrics in plots.items():
        lines = {m: [(row["step"], row[m]) for row in rows if m in row] for m in metrics}
        parts += [f"<h2>{escape(name)}</h2>", line_plot(lines, x="step", y=name)]
    parts += ["<h2>Settings</h2>", _table(settings), "</body></html>", ""]
    path.write_text("\n".join(parts), encoding="utf-8")


def _table(pairs: Mapping[str, object]) -> str:
    rows = (f"<tr><td>{escape(n)}</td><td>{escape(str(v))}</td></tr>" for n, v in pairs.items())
    return f"<table>{''.join(rows)}</table>"
