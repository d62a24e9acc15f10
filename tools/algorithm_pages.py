"""Write docs/algorithms/NAME.md for every algorithm from the code: its docstring and its defaults.

python tools/algorithm_pages.py          write the pages
python tools/algorithm_pages.py --check  exit with 1 if a page is not what would be written
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from textpolicy import algorithms
from textpolicy.algorithms import Algorithm

PAGES = Path(__file__).parent.parent / "docs" / "algorithms"
ARXIV = "https://arxiv.org/abs/"


def main() -> int:
    pages = {f"{name}.md": page(algorithms.get(name)) for name in algorithms.names()}
    if sys.argv[1:] == ["--check"]:
        found = {path.name: path.read_text() for path in PAGES.glob("*.md")}
        stale = sorted(n for n in pages.keys() | found.keys() if pages.get(n) != found.get(n))
        print(f"stale: {stale}" if stale else "all pages are as the code is")
        return 1 if stale else 0
    PAGES.mkdir(exist_ok=True)
    for old in PAGES.glob("*.md"):
        old.unlink()
    for name, text in pages.items():
        (PAGES / name).write_text(text)
    return 0


def page(algorithm: Algorithm) -> str:
    """The whole page of an algorithm."""
    title = f"# {algorithm.name}"
    parts = [title, *prose(_home(algorithm)), *defaults(algorithm), *use(algorithm)]
    return "\n\n".join(parts) + "\n"


def _home(algorithm: Algorithm) -> ModuleType:
    """The module that is named like the algorithm, or begins like it."""
    fitting = [
        module
        for name, module in vars(sys.modules["textpolicy.algorithms"]).items()
        if isinstance(module, ModuleType) and algorithm.name.startswith(name)
    ]
    return max(fitting, key=lambda module: len(module.__name__))


def prose(module: ModuleType) -> Iterator[str]:
    """The docstring, its indented blocks as fenced ones."""
    for block in inspect.cleandoc(module.__doc__ or "").split("\n\n"):
        if block.startswith("    "):
            yield f"```text\n{inspect.cleandoc(block)}\n```"
        else:
            yield _linked(block)


def _linked(text: str) -> str:
    words = text.split(" ")
    return " ".join(_link(word) for word in words)


def _link(word: str) -> str:
    head, colon, tail = word.partition("arXiv:")
    if not colon:
        return word
    number = tail[:10]
    return f"{head}[arXiv:{number}]({ARXIV}{number}){tail[10:]}"


def defaults(algorithm: Algorithm) -> Iterator[str]:
    """Options with a default, and how the paper trains."""
    rows = [
        f"| `{name}` | {value} | {what} |"
        for what, function in (
            ("advantages", algorithm.compute_advantages),
            ("loss", algorithm.policy_loss),
        )
        for name, value in _options(function)
    ]
    if rows:
        yield "## Defaults"
        yield "\n".join(["| option | default | of |", "|---|---|---|", *rows])
    trainer = [
        f"`{name}={value!r}`"
        for name, value in algorithm.trainer.items()
        if name != "skip_without_advantages"
    ]
    if algorithm.dynamic_sampling:
        trainer.append("dynamic sampling (`refill_rounds` above 1)")
    if trainer:
        yield f"The paper trains with {', '.join(trainer)}; `textpolicy train` does so too."


def _options(function: Any) -> Iterator[tuple[str, str]]:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty:
            value = parameter.default
            yield parameter.name, f"`{value.__name__ if callable(value) else repr(value)}`"


def use(algorithm: Algorithm) -> Iterator[str]:
    """How to ask for it."""
    name = algorithm.name
    lines = [f'algorithms.get("{name}")']
    if name != "distillation":
        lines.append(f"textpolicy train --env add --algorithm {name} --output runs/{name}")
    yield "## Use"
    yield "\n".join(["```text", *lines, "```"])


if __name__ == "__main__":
    sys.exit(main())
