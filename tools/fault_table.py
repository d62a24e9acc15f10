"""Print the table of faults from the report of its tests, or write the table to its page.

python tools/fault_table.py build/faults.xml          print; exit with 1 if a row does not hold
python tools/fault_table.py build/faults.xml --write  and write docs/reliability.md if all rows hold
python tools/fault_table.py --texts                   write the page without the counts of a run
"""

import platform
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"
ROWS = tomllib.loads((ROOT / "tests" / "faults" / "table.toml").read_text("utf-8"))
NO_RUN = "No run is recorded for this version of the table."
NO_COUNT = "not recorded"
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


@dataclass
class Evidence:
    """What the tests of one row did."""

    tests: Counter[str] = field(default_factory=Counter[str])
    attempts: int = 0
    seconds: float = 0
    notes: list[str] = field(default_factory=list[str])

    @property
    def outcome(self) -> str:
        return ", ".join(f"{number} {outcome}" for outcome, number in self.tests.items())


def main() -> int:
    if sys.argv[1:] == ["--texts"]:
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), {}), "utf-8")
        return 0
    evidence = read_evidence(Path(sys.argv[1]))
    failures = [f"{name}: {fault}" for name in evidence for fault in faults(name, evidence[name])]
    show(evidence, failures)
    if "--write" in sys.argv and not failures:
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), evidence), "utf-8")
    return int(bool(failures))


def read_evidence(report: Path) -> dict[str, Evidence]:
    """Return what each row's tests did, from a report that pytest wrote with --junitxml."""
    evidence = {name: Evidence() for name in ROWS}
    evidence["other"] = Evidence()
    for case in ElementTree.parse(report).iter("testcase"):
        properties = [(each.get("name"), each.get("value", "")) for each in case.iter("property")]
        outcome, note = outcome_of(case)
        rows = [value for name, value in properties if name == "proves"] or ["other"]
        for row in (evidence[name] for name in rows):
            row.tests[outcome] += 1
            row.attempts += sum(int(value) for name, value in properties if name == "attempts")
            row.seconds += float(case.get("time", 0))
            row.notes += [note] if note else []
    return evidence


def outcome_of(case: ElementTree.Element) -> tuple[str, str]:
    """Return whether a test passed, failed or was skipped, and the reason."""
    for tag, outcome in OUTCOMES.items():
        if (found := case.find(tag)) is not None:
            reason = (found.get("message") or "").splitlines() or [""]
            return outcome, f"{case.get('name')} {outcome}: {reason[0]}"
    return "passed", ""


def faults(name: str, row: Evidence) -> Iterator[str]:
    """Yield what is wrong with the evidence for a row."""
    if row.tests["failed"]:
        yield f"{row.tests['failed']} tests failed"
    if name == "other":
        return
    if not row.tests:
        yield "no test proves this row"
    elif not row.tests["skipped"] and row.attempts < (least := ROWS[name]["attempts"]):
        yield f"{row.attempts} attempts were made, and the row asks for {least}"


def show(evidence: Mapping[str, Evidence], failures: list[str]) -> None:
    """Print the table, the reasons of skipped and failed tests, and what does not hold."""
    table = Table("", "what is done", "what must hold", "tests", "attempts", "seconds")
    for name, row in evidence.items():
        if name == "other" and not row.tests:
            continue
        texts = ROWS.get(name, {"tried": "tests that prove no row", "holds": ""})
        counts = (row.outcome or "no test", f"{row.attempts:,}", f"{row.seconds:.0f}")
        table.add_row(name, texts["tried"], texts["holds"], *counts)
    width = None if sys.stdout.isatty() else 140
    console = Console(markup=False, highlight=False, width=width)
    console.print(table)
    for name, row in evidence.items():
        for note in row.notes:
            console.print(f"{name}  {note}")
    for failure in failures:
        console.print(f"DOES NOT HOLD  {failure}")
    held = sum(bool(row.tests["passed"]) for row in evidence.values())
    made = sum(row.attempts for row in evidence.values())
    console.print(f"{held} rows hold, {len(failures)} do not; {made:,} attempts")


def with_table(page: str, evidence: Mapping[str, Evidence]) -> str:
    """Return the page with the tables of a run between its marks; no evidence is no run."""
    for letter in ("F", "S"):
        before, mark, rest = page.partition(f"<!-- {letter} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (mark and end):
            raise SystemExit(f"{PAGE} has no <!-- {letter} --> that is followed by <!-- end -->")
        rows = "\n".join(table_lines(letter, evidence))
        page = f"{before}{mark}\n{rows}\n\n{end}{after}"
    return with_machine(page, recorded=bool(evidence))


def table_lines(letter: str, evidence: Mapping[str, Evidence]) -> Iterator[str]:
    """Yield the lines of a table of the page, for the rows that start with the letter."""
    yield "| row | what is done | what must hold | tests | attempts |"
    yield "|---|---|---|---|---|"
    for name, row in ROWS.items():
        if not name.startswith(letter):
            continue
        counts = (NO_COUNT, NO_COUNT)
        if found := evidence.get(name):
            counts = (str(sum(found.tests.values())), f"{found.attempts:,}")
        yield f"| {' | '.join([name, row['tried'], row['holds'], *counts])} |"


def with_machine(page: str, *, recorded: bool) -> str:
    """Return the page with the line that says when and where a run was recorded, if one was."""
    start, mark, rest = page.partition("<!-- run -->\n\n")
    if not mark:
        raise SystemExit(f"{PAGE} has no <!-- run --> before the line about the recorded run")
    _, _, after = rest.partition("\n")
    day = f"{datetime.now(UTC):%d %B %Y}"
    machine = f"{platform.system()} on {platform.machine()}, Python {platform.python_version()}"
    line = f"Recorded by `make faults` on {day}: {machine}." if recorded else NO_RUN
    return f"{start}{mark}{line}\n{after}"


if __name__ == "__main__":
    sys.exit(main())
