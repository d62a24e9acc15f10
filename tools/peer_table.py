"""Print the table beside other libraries, and check every cell in the code of its library.

python tools/peer_table.py                    download the wheels, check the cells, print the table
python tools/peer_table.py --wheels DIR       keep the wheels in DIR, and use those that are there
python tools/peer_table.py --page README.md   write the table to the page, if every cell holds

peer_table.toml has the cells. A cell names what shows it: a text in a file, the number of words in
lines of a file, or a pattern that no Python file outside of the tests has.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent
TABLE = tomllib.loads((ROOT / "tools" / "peer_table.toml").read_text("utf-8"))
START, END = "<!-- peers -->\n", "<!-- end of peers -->"

Cell = Mapping[str, str]
Files = Mapping[str, str]
"""The texts of a library's Python files and of its metadata, by their paths."""


def main() -> int:
    options = _parse()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.wheels or temporary)
        for key, library in TABLE["libraries"].items():
            packages = library["packages"].items()
            wheels = [download(name, version, folder) for name, version in packages]
            faults += faults_of(key, files_of(wheels) if wheels else own_files())
    print("\n".join(table_lines()))
    for fault in faults:
        print(f"DOES NOT HOLD  {fault}")
    if options.page and not faults:
        options.page.write_text(with_table(options.page.read_text("utf-8")), "utf-8")
    return int(bool(faults))


def _parse() -> Any:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheels", metavar="DIR", help="folder of the wheels")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page to write the table to")
    return parser.parse_args()


def download(name: str, version: str, folder: Path) -> Path:
    """Return the wheel of this version in the folder; it is downloaded if it is not there."""
    pattern = f"{re.sub('[-.]', '_', name)}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), "-q"]
        command = [sys.executable, "-m", "pip", "download", *options, f"{name}=={version}"]
        subprocess.run(command, check=True)
    return next(folder.glob(pattern))


def files_of(wheels: list[Path]) -> Files:
    """Return the Python files and the metadata of some wheels."""
    files: dict[str, str] = {}
    for wheel in wheels:
        with ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith((".py", "/METADATA")):
                    files[name] = archive.read(name).decode("utf-8", errors="replace")
    return files


def own_files() -> Files:
    """Return the Python files of this repository, and its README."""
    paths = [path for part in ("textpolicy", "tests") for path in (ROOT / part).rglob("*.py")]
    paths.append(ROOT / "README.md")
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


def faults_of(library: str, files: Files) -> list[str]:
    """Return the cells of a library that its files do not show, each with the reason."""
    title = TABLE["libraries"][library]["title"]
    reasons = {row["question"]: fault_of(row[library], files) for row in TABLE["rows"]}
    return [f"{title}, {question}: {reason}" for question, reason in reasons.items() if reason]


def fault_of(cell: Cell, files: Files) -> str | None:
    """Return why the files do not show the cell, or None if they do."""
    if pattern := cell.get("nowhere"):
        found = [name for name in files if _is_code(name) and re.search(pattern, files[name])]
        return f"{found[0]} has {pattern!r}" if found else None
    if (text := files.get(cell["file"])) is None:
        return f"there is no file {cell['file']}"
    if "lines" in cell:
        lines = re.findall(cell["lines"], text, re.MULTILINE)
        words = {word for line in lines for word in re.findall(cell["words"], line)}
        is_right = str(len(words)) == cell["is"]
        return None if is_right else f"{cell['file']} has {len(words)}: {', '.join(sorted(words))}"
    return None if cell["text"] in text else f"{cell['file']} lacks {cell['text']!r}"


def _is_code(name: str) -> bool:
    return name.endswith(".py") and "tests" not in Path(name).parts


def with_table(page: str) -> str:
    """Return the page with the table between its marks."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"the page has no {START.strip()} that is followed by {END}")
    lines = "\n".join(table_lines())
    return f"{before}{start}\n{lines}\n\n{end}{after}"


def table_lines() -> Iterator[str]:
    """Yield the lines of the table, and the sentence that says what was read, and when."""
    libraries = TABLE["libraries"]
    yield f"| | {' | '.join(library['title'] for library in libraries.values())} |"
    yield "|---" * (len(libraries) + 1) + "|"
    for row in TABLE["rows"]:
        yield f"| {row['question']} | {' | '.join(row[key]['is'] for key in libraries)} |"
    packages = [
        f"{name} {version}"
        for library in libraries.values()
        for name, version in library["packages"].items()
    ]
    yield ""
    yield f"Read on {TABLE['day']} in the wheels of {', '.join(packages)}."


if __name__ == "__main__":
    sys.exit(main())
