"""Write the pages and tables of the algorithms from the code: docstrings, defaults, declarations.

python tools/algorithm_pages.py                 write docs/algorithms/NAME.md and the tables
python tools/algorithm_pages.py --check         exit with 1 if a page or a table is out of date
python tools/algorithm_pages.py --docs FOLDER   use another folder of docs
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from textpolicy import algorithms
from textpolicy.algorithms import Algorithm
from textpolicy.algorithms.parts.function_options import NAMED_FUNCTIONS, SYNONYMS

DOCS = Path(__file__).parent.parent / "docs"
ARXIV = "https://arxiv.org/abs/"
_TABLE = "<!-- {}: written by tools/algorithm_pages.py -->\n"
_END = "<!-- end -->"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="FOLDER", help="default: docs")
    options = parser.parse_args()
    files = contents(options.docs)
    present = {path: path.read_text("utf-8") for path in files if path.exists()}
    present |= {p: p.read_text("utf-8") for p in (options.docs / "algorithms").glob("*.md")}
    stale = sorted(p for p in files.keys() | present.keys() if files.get(p) != present.get(p))
    if options.check:
        names = [str(path.relative_to(options.docs)) for path in stale]
        print(f"out of date: {', '.join(names)}" if names else "all pages are as the code is")
        return int(bool(stale))
    for path in stale:
        if path in files:
            path.write_text(files[path], "utf-8")
        else:
            path.unlink()
    return 0


def contents(docs: Path) -> dict[Path, str]:
    """Return the text of every page, by its path."""
    found = [algorithms.get(name) for name in algorithms.names()]
    overview = docs / "algorithms.md"
    text = overview.read_text("utf-8")
    for title, rows in (("algorithms", algorithm_table(found)), ("names", name_table())):
        start = _TABLE.format(title)
        before, marked, rest = text.partition(start)
        if not marked:
            raise SystemExit(f"{overview} has no line {start!r} to write a table under")
        body = "\n".join(rows)
        text = f"{before}{start}\n{body}\n\n{_END}{rest.partition(_END)[2]}"
    pages = {docs / "algorithms" / f"{one.name}.md": page(one) for one in found}
    return {overview: text, **pages}


def algorithm_table(found: list[Algorithm]) -> Iterator[str]:
    """Yield the lines of the table of all algorithms."""
    yield from ("| name | paper | advantages | loss |", "|---|---|---|---|")
    for one in found:
        functions = (one.compute_advantages, one.policy_loss)
        cells = [f"[`{one.name}`](algorithms/{one.name}.md)", _paper(one)]
        yield f"| {' | '.join([*cells, *(_summary(one, function) for function in functions)])} |"


def _paper(algorithm: Algorithm) -> str:
    paper = algorithm.declaration.paper
    return f"[{paper}]({ARXIV}{paper})" if re.fullmatch(r"\d{4}\.\d{5}", paper) else paper


def _summary(algorithm: Algorithm, function: Callable[..., Any]) -> str:
    home = function.__module__.rpartition(".")[2]
    return _first_line(function) if home == algorithm.name else f"as `{home}`"


def _first_line(function: Callable[..., Any]) -> str:
    """Return the first line of a docstring without its verb."""
    line = inspect.getdoc(function).partition("\n")[0]
    return line.removeprefix("Return ").rstrip(".").replace("|", "\\|")


def name_table() -> Iterator[str]:
    """Yield the lines of the table of functions that have names in options."""
    yield from ("| option | name | also called | meaning |", "|---|---|---|---|")
    for option in ("average", "kl", "weights"):
        for name, function in NAMED_FUNCTIONS[option].items():
            numbers = [f"{n}={d}" for n, d in _defaults(function, keywords_only=True)]
            call = f"{name}({', '.join(numbers)})" if numbers else name
            others = ", ".join(f"`{other}`" for other, own in SYNONYMS.items() if own == name)
            yield f"| `{option}` | `{call}` | {others} | {_first_line(function)} |"


def page(algorithm: Algorithm) -> str:
    """Return the whole page of an algorithm."""
    module = import_module(f"textpolicy.algorithms.{algorithm.name}")
    parts = [f"# {algorithm.name}", *prose(module.__doc__ or "")]
    return "\n\n".join([*parts, *defaults(algorithm), *use(algorithm)]) + "\n"


def prose(docstring: str) -> Iterator[str]:
    """Yield the paragraphs of a docstring, with fences around the indented ones."""
    for block in inspect.cleandoc(docstring).split("\n\n"):
        if block.startswith("    "):
            yield f"```text\n{inspect.cleandoc(block)}\n```"
        else:
            yield re.sub(r"arXiv:(\d{4}\.\d{5})", rf"[arXiv:\1]({ARXIV}\1)", block)


def defaults(algorithm: Algorithm) -> Iterator[str]:
    """Yield a table of the options with their defaults, and the keywords of the trainer."""
    functions = {"advantages": algorithm.compute_advantages, "loss": algorithm.policy_loss}
    rows = [
        f"| `{name}` | `{value}` | {what} |"
        for what, function in functions.items()
        for name, value in _defaults(function)
    ]
    if rows:
        yield "## Defaults"
        yield "\n".join(["| option | default | of |", "|---|---|---|", *rows])
    trainer = [f"`{name}={value!r}`" for name, value in algorithm.declaration.trainer.items()]
    if algorithm.declaration.dynamic_sampling:
        trainer.append("dynamic sampling (`refill_rounds` above 1)")
    if trainer:
        yield f"The paper trains with {', '.join(trainer)}; `textpolicy train` does so too."


def _defaults(
    function: Callable[..., Any], *, keywords_only: bool = False
) -> Iterator[tuple[str, str]]:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty:
            yield parameter.name, _name_of(parameter.name, parameter.default)
        elif keywords_only and parameter.kind is parameter.KEYWORD_ONLY:
            yield parameter.name, "N"


def _name_of(option: str, value: Any) -> str:
    """Return the name by which an option knows this function, or the value as Python writes it."""
    known = NAMED_FUNCTIONS.get(option, {})
    return next((name for name, function in known.items() if function is value), repr(value))


def use(algorithm: Algorithm) -> Iterator[str]:
    """Yield how to use the algorithm in Python and in a shell."""
    name = algorithm.name
    teacher = " --reference TEACHER" if algorithm.declaration.needs_teacher else ""
    command = f"textpolicy train --env add --algorithm {name}{teacher} --output runs/{name}"
    yield "## Use"
    yield f'```text\nalgorithms.get("{name}")\n{command}\n```'


if __name__ == "__main__":
    sys.exit(main())
