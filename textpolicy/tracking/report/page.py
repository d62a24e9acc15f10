"""The page itself: one file, no network, and no script or style but its own."""

import json
import re
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path

from textpolicy.runs import RunDirectory
from textpolicy.tracking.report.charts import charts_for
from textpolicy.tracking.report.runs import read_run

SAMPLE_BYTES = 2_000_000
_SCRIPTS = ("elements.js", "charts.js", "samples.js", "page.js")


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the runs as a page, into the first of them if `output` is None; returns where it is.

    Whatever the runs hold, it is shown as text: the page's content policy lets nothing run but the
    script that is part of it, and nothing load.
    """
    shown = [read_run(path, sample_bytes=SAMPLE_BYTES // len(runs)) for path in runs]
    alive: dict[str, bool] = {}
    for name, points in (item for run in shown for item in run["metrics"].items()):
        alive[name] = alive.get(name, False) or any(value for _, value in points)
    title = " and ".join(run["name"] for run in shown)
    data = {"title": title, "runs": shown, "charts": charts_for(alive)}
    target = output or RunDirectory(runs[0]).report
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(_page(title, data), encoding="utf-8")
    return temporary.replace(target)


def _page(title: str, data: object) -> str:
    style = _part("page.css")
    script = "\n".join(_part(name) for name in _SCRIPTS)
    # In a script element only "<" could end it or open a comment; as an escape it is the same JSON.
    content = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy,
        "TITLE": escape(title),
        "STYLE": style,
        "DATA": content,
        "SCRIPT": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _part("page.html"))


def _part(name: str) -> str:
    return files("textpolicy.tracking.report").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
