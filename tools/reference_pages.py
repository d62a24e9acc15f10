"""Write the generated parts of docs/reference: signature, docstring, fields and methods of a name.

python tools/reference_pages.py          write the parts
python tools/reference_pages.py --check  write nothing; exit with 1 if a part is out of date

A part stands between `<!-- textpolicy.NAME -->` and `<!-- end -->`. The rest of a page, its order
and its examples, is written by hand.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

PAGES = Path(__file__).parent.parent / "docs" / "reference"
PART = re.compile(r"^<!-- (textpolicy[\w.]*) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
_WIDTH = 100
_Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.Module


def main() -> int:
    stale: list[str] = []
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text("utf-8")
        if text != (new := written(text)):
            stale.append(path.name)
            if sys.argv[1:] != ["--check"]:
                path.write_text(new, "utf-8")
    if sys.argv[1:] != ["--check"]:
        return 0
    advice = f"out of date: {', '.join(stale)}; run python tools/reference_pages.py"
    print(advice if stale else "all pages are as the code is")
    return int(bool(stale))


def written(page: str) -> str:
    """Return the page with its parts as the code is now."""
    return PART.sub(lambda found: part(found[1]), page)


def part(path: str) -> str:
    """Return the marks of a name, and between them what the code says about the name."""
    lines = "\n\n".join(described(path))
    return f"<!-- {path} -->\n\n{lines}\n\n<!-- end -->"


def described(path: str) -> Iterator[str]:
    """Yield the paragraphs about a name: how it is written, its docstring, its methods."""
    module, _, name = path.rpartition(".")
    node = definition(module, name)
    match node:
        case ast.Module():
            yield from prose(ast.get_docstring(node) or "")
        case ast.Assign():
            yield fenced(ast.unparse(node))
        case _:
            yield fenced("\n".join(signatures(node)))
            yield from prose(ast.get_docstring(node) or "")
            if isinstance(node, ast.ClassDef) and (methods := list(methods_of(node))):
                yield "\n".join(["| member | what it does |", "|---|---|", *methods])


def fenced(text: str) -> str:
    return f"```text\n{text}\n```"


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(import_module(module)))


def definition(module: str, name: str) -> _Definition:
    """Return the syntax that defines a name of a module, which may import the name."""
    found: _Definition | None = None
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            assert node.module is not None
            inside = f"{node.module}.{name}"
            there = vars(import_module(node.module)).get(name)
            # A module that nothing has imported yet is no attribute of its package.
            is_module = there is None or inspect.ismodule(there)
            return tree_of(inside) if is_module else definition(node.module, name)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            found = node  # The last one, which is not an overload.
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            found = node
    if found is None:
        raise SystemExit(f"{module} has no {name}; remove its part from docs/reference")
    return found


def signatures(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    """Yield how a function is called, or how an object of a class is made."""
    if not isinstance(node, ast.ClassDef):
        yield call(node.name, node.args, node.returns)
    elif made := method(node, "__init__"):
        yield call(node.name, made.args, None)
    elif fields := list(fields_of(node)):
        yield f"class {node.name}:"
        yield from (f"    {line}" for line in fields)
    else:
        yield f"class {node.name}"


def method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    found = (one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == name)
    return next(found, None)


def fields_of(node: ast.ClassDef) -> Iterator[str]:
    """Yield the fields of a record, and the members of an enumeration."""
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and not ast.unparse(one.target).startswith("_"):
            yield f"{ast.unparse(one.target)}: {ast.unparse(one.annotation)}{default_of(one.value)}"
        elif isinstance(one, ast.Assign) and not ast.unparse(one.targets[0]).startswith("_"):
            yield ast.unparse(one)


def default_of(value: ast.expr | None) -> str:
    """Return the default of a field. A setting of a run has its default in `option(...)`."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("option", "field"):
        named = {word.arg: word.value for word in value.keywords}
        if factory := named.get("default_factory"):
            return " = {}" if "dict" in ast.unparse(factory) else f" = {ast.unparse(factory)}()"
        value = value.args[0] if value.args else named.get("default")
    return f" = {shown(value)}" if value is not None else ""


def shown(default: ast.expr) -> str:
    """Return a default as Python writes it; the name of a private constant says nothing."""
    text = ast.unparse(default)
    return "..." if text.startswith("_") else text


def call(name: str, arguments: ast.arguments, returned: ast.expr | None) -> str:
    """Return a signature on one line, or with a line for each parameter."""
    end = f" -> {ast.unparse(returned)}" if returned is not None else ""
    given = parameters(arguments)
    line = f"{name}({', '.join(given)}){end}"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {one}," for one in given), f"){end}"])


def parameters(arguments: ast.arguments) -> list[str]:
    """Return the parameters with their types and defaults, without the object itself."""
    first = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(first) - len(arguments.defaults)) + list(arguments.defaults)
    given = [parameter(*one) for one in zip(first, defaults, strict=True)]
    if arguments.posonlyargs:
        given.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        given.append(f"*{parameter(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        given.append("*")
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    given += [parameter(*one) for one in keywords]
    if arguments.kwarg:
        given.append(f"**{parameter(arguments.kwarg, None)}")
    return given[1:] if first and first[0].arg in ("self", "cls") else given


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    typed = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    if default is None:
        return f"{argument.arg}{typed}"
    return f"{argument.arg}{typed} = {shown(default)}"


def methods_of(node: ast.ClassDef) -> Iterator[str]:
    """Yield a row for each public method and property that has a docstring."""
    for one in node.body:
        if isinstance(one, ast.FunctionDef) and not one.name.startswith("_"):
            about = (ast.get_docstring(one) or "").partition("\n\n")[0].replace("\n", " ")
            if about:
                yield f"| `{called(one)}` | {as_markdown(about)} |"


def called(node: ast.FunctionDef) -> str:
    """Return a method as it is called: a property without brackets, parameters without types."""
    if any(ast.unparse(one).endswith("property") for one in node.decorator_list):
        return node.name
    names = [one.partition(":")[0].partition(" ")[0] for one in parameters(node.args)]
    optional = ["=" * (" = " in one) for one in parameters(node.args)]
    words = [f"{n}{o}" for n, o in zip(names, optional, strict=True) if n not in ("*", "/")]
    return f"{node.name}({', '.join(words)})"


def prose(docstring: str) -> Iterator[str]:
    """Yield the paragraphs of a docstring, with fences around the indented ones."""
    for block in inspect.cleandoc(docstring).split("\n\n"):
        if block.startswith("    "):
            yield fenced(inspect.cleandoc(block))
        elif block:
            yield as_markdown(block)


def as_markdown(text: str) -> str:
    """Return a text of a docstring in which marks such as <answer> and ``` stay text."""
    parts = re.split(r"(`[^`\n]+`)", text.replace("```", "&#96;&#96;&#96;"))
    return "".join(one if one.startswith("`") else one.replace("<", "&lt;") for one in parts)


if __name__ == "__main__":
    sys.exit(main())
