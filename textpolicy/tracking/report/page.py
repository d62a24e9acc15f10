"""Write the HTML page of the report. The page loads nothing and runs only its own script."""

import json
import re
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path

from textpolicy.errors import ConfigError
from textpolicy.file_writing import atomic_replace
from textpolicy.runs import RunDirectory
from textpolicy.tracking.report.charts import charts_for
from textpolicy.tracking.report.runs import read_run

SAMPLE_BYTES = 2_000_000
_GENERATOR = b'<meta name="generator" content="textpolicy">'
# File systems allow names of 255 bytes.
_LONGEST_NAME = 60
_SCRIPTS = ("elements.js", "charts.js", "samples.js", "page.js")


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of the runs to `output`, or into the first run. Return the page's path.

    The page of several runs has a name of its own, so that the first run keeps its own page.

    The content of the runs is shown as text. The page's content security policy allows only the
    page's own script and style, and loads nothing.
    """
    shown = [read_run(path, sample_bytes=SAMPLE_BYTES // len(runs)) for path in runs]
    nonzero: dict[str, bool] = {}
    for name, points in (item for run in shown for item in run["metrics"].items()):
        nonzero[name] = nonzero.get(name, False) or any(value for _, value in points)
    title = " and ".join(run["name"] for run in shown)
    data = {"title": title, "runs": shown, "charts": charts_for(nonzero)}
    target = output or _page_of(runs[0], [run["name"] for run in shown[1:]])
    with atomic_replace(target, private=output is None) as temporary:
        temporary.write_text(_page(title, data), encoding="utf-8")
    return target


def _page_of(run: Path, others: Sequence[str]) -> Path:
    """Return the path of the page in a run; raise `ConfigError` if another page is there."""
    own = RunDirectory(run).report
    name = f"compare-{'-'.join(others)[:_LONGEST_NAME]}.html"
    page = own.with_name(name) if others else own
    if page.is_file() and _GENERATOR not in page.read_bytes():
        raise ConfigError(
            f"{page} is not a report that textpolicy wrote, so it is not replaced. Name "
            "another file by --output, or move this one away"
        )
    return page


def _page(title: str, data: object) -> str:
    style = _read_resource("page.css")
    script = "\n".join(map(_read_resource, _SCRIPTS))
    # Only "<" could end the script element or begin a comment. The escape is equal JSON.
    content = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"POLICY": policy, "TITLE": escape(title), "STYLE": style, "DATA": content}
    parts["SCRIPT"] = script
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read_resource("page.html"))


def _read_resource(name: str) -> str:
    return files("textpolicy.tracking.report").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
