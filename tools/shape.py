"""Print our file and function sizes beside those of admired codebases.

A line is a physical line. A code line holds more than a comment or a docstring. The count of
parameters leaves out `self` and `cls`.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
HEADER = (
    "package", "files", "median file", "largest file", "fn med / p90", ">60", "broad", "has",
    "doc:code", "max p",
)  # fmt: skip
ANCHORS = (
    ("dm_env", "11", "88", "490", "4 / 14", "0%", "0.00", "12.8", "1.06", "5"),
    ("rlax", "48", "148", "923", "10 / 39", "2%", "0.00", "0.4", "0.78", "14"),
    ("equinox", "72", "134", "1278", "7 / 40", "4%", "0.13", "2.8", "0.47", "15"),
    ("cleanrl", "37", "332", "682", "8 / 23", "0%", "0.08", "0.4", "0.10", "9"),
    ("nanochat", "14", "262", "555", "12 / 47", "6%", "0.88", "0.3", "0.31", "10"),
    ("mlx-lm", "176", "221", "2194", "10 / 35", "3%", "0.27", "1.7", "0.03", "13"),
    ("tinker-cookbook", "376", "197", "2176", "10 / 38", "3%", "1.64", "1.5", "0.35", "16"),
    ("verifiers", "341", "131", "3601", "11 / 48", "6%", "2.13", "2.3", "0.14", "12"),
    ("stable-baselines3", "64", "177", "987", "10 / 42", "4%", "0.06", "1.8", "0.47", "28"),
    ("optax", "131", "192", "2794", "12 / 58", "9%", "0.00", "2.0", "1.00", "18"),
    ("torchtune", "274", "126", "1478", "20 / 74", "13%", "0.22", "0.8", "0.54", "32"),
    ("trl", "153", "164", "3374", "19 / 86", "16%", "0.48", "4.4", "0.27", "25"),
    ("peft", "251", "160", "3494", "15 / 49", "6%", "0.17", "7.9", "0.25", "12"),
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One parsed file. Its name is the path relative to the repository."""

    name: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    def functions(self) -> Iterator[tuple[str, Function]]:
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                yield f"{self.name}:{node.name}", node


def read_sources(folders: list[Path]) -> list[Source]:
    """Return every Python file in the folders that is not empty."""
    paths = sorted(path for folder in folders for path in folder.rglob("*.py"))
    texts = [(path, path.read_text(encoding="utf-8")) for path in paths]
    return [
        Source(path.relative_to(ROOT).as_posix(), text, ast.parse(text, filename=str(path)))
        for path, text in texts
        if text.strip()
    ]


def doc_lines(tree: ast.Module) -> set[int]:
    """Return the line numbers of all docstrings, also of docstrings below attributes."""
    bare_strings = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
    return {
        line
        for node in bare_strings
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def code_lines(source: Source) -> int:
    docs = doc_lines(source.tree)
    return sum(
        number not in docs and bool(line.strip()) and not line.lstrip().startswith("#")
        for number, line in enumerate(source.text.splitlines(), start=1)
    )


def broad_excepts(tree: ast.Module) -> int:
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    return sum(handler.type is None or catches_all(handler.type) for handler in handlers)


def catches_all(kind: ast.expr) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(k, ast.Name) and k.id in {"Exception", "BaseException"} for k in kinds)


def attribute_probes(tree: ast.Module) -> int:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return sum(isinstance(call, ast.Name) and call.id in {"hasattr", "getattr"} for call in calls)


def parameters(function: Function) -> tuple[int, int]:
    """Return the number of parameters, and the number of parameters before `*`."""
    arguments = function.args
    positional = [
        argument.arg
        for argument in arguments.posonlyargs + arguments.args
        if argument.arg not in {"self", "cls"}
    ]
    starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return len(positional) + len(arguments.kwonlyargs) + len(starred), len(positional)


def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def row(package: str, sources: list[Source]) -> tuple[str, ...]:
    """Return the row of one package, in the order of the header."""
    functions = [function for source in sources for _, function in source.functions()]
    lengths = [length(function) for function in functions]
    p90 = quantiles(lengths, n=10)[-1] if len(lengths) > 1 else lengths[0]
    thousands = sum(source.lines for source in sources) / 1000
    docs = sum(len(doc_lines(source.tree)) for source in sources)
    return (
        package,
        str(len(sources)),
        f"{median(source.lines for source in sources):.0f}",
        str(max(source.lines for source in sources)),
        f"{median(lengths):.0f} / {p90:.0f}",
        f"{100 * sum(size > 60 for size in lengths) / len(lengths):.0f}%",
        f"{sum(broad_excepts(source.tree) for source in sources) / thousands:.2f}",
        f"{sum(attribute_probes(source.tree) for source in sources) / thousands:.1f}",
        f"{docs / sum(code_lines(source) for source in sources):.2f}",
        str(max(parameters(function)[0] for function in functions)),
    )


def extremes(sources: list[Source]) -> list[str]:
    """Return one line for each of our largest numbers, with the place of the number."""
    functions = [named for source in sources for named in source.functions()]
    file = max(sources, key=lambda source: source.lines)
    longest = max(functions, key=lambda named: length(named[1]))
    widest = max(functions, key=lambda named: parameters(named[1])[0])
    positional = max(functions, key=lambda named: parameters(named[1])[1])
    return [
        f"largest file             {file.lines:4d}  {file.name}",
        f"longest function         {length(longest[1]):4d}  {longest[0]}",
        f"most parameters          {parameters(widest[1])[0]:4d}  {widest[0]}",
        f"most parameters before * {parameters(positional[1])[1]:4d}  {positional[0]}",
    ]


def main() -> None:
    sources = read_sources([ROOT / "textpolicy", ROOT / "envs"])
    rows = [HEADER, *ANCHORS, row("textpolicy + envs", sources)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEADER))]
    for cells in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]))
    print("\nfn: lines of a function. >60: share of functions above 60 lines.")
    print("broad: `except Exception` or bare, has: `hasattr` and `getattr`, per 1,000 lines.\n")
    print("\n".join(extremes(sources)))


if __name__ == "__main__":
    main()
