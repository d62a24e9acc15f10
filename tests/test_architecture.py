"""The rules that a machine can keep: who may import whom, and what no file may contain.

A rule is a function from a parsed file to the complaints about it. Every rule is shown a file
that breaks it, so a rule that has stopped looking fails too.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Imports go down this list. Neighbours on one line do not know each other.
LAYERS = (
    ("textpolicy",),
    ("textpolicy.cli",),
    ("textpolicy.experiment",),
    ("textpolicy.loop",),
    ("textpolicy.resume",),
    ("textpolicy.planning",),
    ("textpolicy.evaluation",),
    ("textpolicy.rollout",),
    ("textpolicy.generation",),
    ("textpolicy.training",),
    ("textpolicy.tracking",),
    ("textpolicy.runs",),
    ("textpolicy.buffer",),
    ("textpolicy.environments",),
    ("textpolicy_envs",),
    ("textpolicy.rewards",),
    ("textpolicy.adapters",),
    ("textpolicy.algorithms",),
    ("textpolicy.backend",),
    ("textpolicy.fast_cpu",),
    ("textpolicy.types",),
    ("textpolicy.config",),
    ("textpolicy.user_code",),
    ("textpolicy.errors",),
)
LEVEL = {layer: level for level, layers in enumerate(LAYERS) for layer in layers}
# The trainer receives its two functions, and a worker its policy, as arguments.
BANNED_IMPORTS = {
    ("textpolicy.training", "textpolicy.algorithms"),
    ("textpolicy.rollout", "textpolicy.generation"),
}
BANNED_NAMES = {"utils", "common", "helpers", "core", "manager", "base"}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "os.system", "os.popen", "sympify", "parse_expr", "yaml.load"}


@dataclass(frozen=True)
class Source:
    """One parsed file, under the name it is imported by."""

    module: str
    is_package: bool
    tree: ast.Module

    @property
    def layer(self) -> str:
        return layer_of(self.module)


def layer_of(module: str) -> str:
    """The first two parts of the name; all ready tasks are one layer."""
    top, *rest = module.split(".")
    return top if top != "textpolicy" or not rest else f"{top}.{rest[0]}"


def parse(path: str, text: str) -> Source:
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] == "envs":
        parts[0] = "textpolicy_envs"
    is_package = parts[-1] == "__init__"
    return Source(".".join(parts[:-1] if is_package else parts), is_package, ast.parse(text))


def read_sources() -> list[Source]:
    paths = sorted(path for top in ("textpolicy", "envs") for path in (ROOT / top).rglob("*.py"))
    return [parse(str(path.relative_to(ROOT)), path.read_text("utf-8")) for path in paths]


def absolute(source: Source, node: ast.ImportFrom) -> str:
    """The module that a `from` names, with leading dots resolved."""
    package = source.module.split(".") if source.is_package else source.module.split(".")[:-1]
    base = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


def imported_modules(source: Source) -> Iterator[tuple[int, str]]:
    """Line and name of everything imported, inside functions too."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(source, node)
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}" if module == "textpolicy" else module
        elif isinstance(node, ast.Call) and called_name(node).endswith("import_module"):
            yield from ((node.lineno, text) for text in string_constants(node.args[:1]))


def called_name(node: ast.Call) -> str:
    """`f`, or `module.f`; anything else is not a name."""
    function = node.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def string_constants(nodes: list[ast.expr]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def imports_go_down(source: Source) -> Iterator[str]:
    if source.layer not in LEVEL:
        yield f"{source.layer} is in no layer; give it a place in LAYERS"
        return
    for line, module in imported_modules(source):
        if module.split(".")[0] not in {"textpolicy", "textpolicy_envs"}:
            continue
        # A name imported from the top that is no module comes from the top itself.
        target = layer_of(module) if layer_of(module) in LEVEL else "textpolicy"
        if target != source.layer and LEVEL[target] <= LEVEL[source.layer]:
            yield f"line {line}: {source.layer} imports {module}, which is not below it"
        if (source.layer, target) in BANNED_IMPORTS:
            yield f"line {line}: {source.layer} may not import {target}"


def stars_are_not_imported(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield f"line {node.lineno}: star import"


def only_the_command_prints(source: Source) -> Iterator[str]:
    if source.layer == "textpolicy.cli":
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and called_name(node) == "print":
            yield f"line {node.lineno}: print; return the value or report it to a callback"


def broad_excepts_stay_at_the_boundary(source: Source) -> Iterator[str]:
    if source.module.endswith(".faults") or source.layer == "textpolicy.serving":
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
            if None in kinds or names & {"Exception", "BaseException"}:
                yield f"line {node.lineno}: broad except; name the errors, or let them through"


def nothing_unsafe_is_called(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            name = called_name(node)
            if name in UNSAFE_CALLS or name.rpartition(".")[2] in {"sympify", "parse_expr"}:
                yield f"line {node.lineno}: {name}"
            if any(
                keyword.arg == "shell" and not is_false(keyword.value) for keyword in node.keywords
            ):
                yield f"line {node.lineno}: {name}(shell=...)"
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (f"line {node.lineno}: {name}" for name in sorted(names & UNSAFE_CALLS))
    for line, module in imported_modules(source):
        if module.split(".")[0] in UNSAFE_MODULES:
            yield f"line {line}: {module} runs code found in data"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def names_say_what_is_inside(source: Source) -> Iterator[str]:
    for part in source.module.split("."):
        if part in BANNED_NAMES:
            yield f"'{part}' says nothing about what is inside"


def all_is_written_by_hand(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            value = node.value if isinstance(node, ast.Assign) else None
            elements = value.elts if isinstance(value, ast.List | ast.Tuple) else [None]
            if not all(isinstance(element, ast.Constant) for element in elements):
                yield f"line {node.lineno}: __all__ is not a list of names"


Rule = Callable[[Source], Iterator[str]]
RULES: list[Rule] = [
    imports_go_down,
    stars_are_not_imported,
    only_the_command_prints,
    broad_excepts_stay_at_the_boundary,
    nothing_unsafe_is_called,
    names_say_what_is_inside,
    all_is_written_by_hand,
]
BROKEN: list[tuple[Rule, str, str]] = [
    (imports_go_down, "textpolicy/buffer.py", "from textpolicy.training import Trainer"),
    (imports_go_down, "textpolicy/types.py", "def f():\n    import textpolicy.buffer"),
    (imports_go_down, "textpolicy/rewards/math.py", "from ..environments import load"),
    (imports_go_down, "textpolicy/rewards/math.py", "from .. import environments"),
    (imports_go_down, "textpolicy/loop.py", "from textpolicy import train_rl"),
    (imports_go_down, "textpolicy/loop.py", "import textpolicy as tp"),
    (imports_go_down, "textpolicy/planning/x.py", "from textpolicy.experiment import run"),
    (imports_go_down, "textpolicy/training/trainer.py", "from textpolicy.algorithms import grpo"),
    (imports_go_down, "textpolicy/rollout/worker.py", "from textpolicy.generation import lora"),
    (imports_go_down, "textpolicy/adapters/x.py", "importlib.import_module('textpolicy.loop')"),
    (imports_go_down, "textpolicy/adapters/x.py", "import textpolicy_envs.add"),
    (imports_go_down, "textpolicy/attic.py", ""),
    (imports_go_down, "envs/add.py", "from textpolicy.generation import load_model"),
    (stars_are_not_imported, "textpolicy/buffer.py", "from textpolicy.types import *"),
    (only_the_command_prints, "textpolicy/buffer.py", "print('full')"),
    (broad_excepts_stay_at_the_boundary, "envs/add.py", "try: f()\nexcept: g()"),
    (broad_excepts_stay_at_the_boundary, "envs/add.py", "try: f()\nexcept Exception: g()"),
    (
        broad_excepts_stay_at_the_boundary,
        "textpolicy/rollout/worker.py",
        "try: f()\nexcept (OSError, BaseException): g()",
    ),
    (
        broad_excepts_stay_at_the_boundary,
        "textpolicy/rewards/score.py",
        "try: f()\nexcept Exception: value = 0",
    ),
    (nothing_unsafe_is_called, "envs/add.py", "eval(completion)"),
    (nothing_unsafe_is_called, "envs/add.py", "exec(completion)"),
    (nothing_unsafe_is_called, "envs/add.py", "os.system(completion)"),
    (nothing_unsafe_is_called, "envs/add.py", "from os import system"),
    (nothing_unsafe_is_called, "envs/add.py", "subprocess.run(completion, shell=True)"),
    (nothing_unsafe_is_called, "envs/add.py", "subprocess.run(completion, shell=flag)"),
    (nothing_unsafe_is_called, "envs/add.py", "sympy.sympify(completion)"),
    (nothing_unsafe_is_called, "envs/add.py", "yaml.load(text)"),
    (nothing_unsafe_is_called, "envs/add.py", "import pickle"),
    (nothing_unsafe_is_called, "envs/add.py", "def f():\n    from pickle import loads"),
    (names_say_what_is_inside, "textpolicy/training/utils.py", ""),
    (names_say_what_is_inside, "textpolicy/core/__init__.py", ""),
    (all_is_written_by_hand, "textpolicy/loop.py", "__all__ = [name for name in globals()]"),
    (all_is_written_by_hand, "textpolicy/loop.py", "__all__ = ['a']\n__all__ += other.__all__"),
]
SOUND = [
    ("textpolicy/loop.py", "from textpolicy.types import Policy\nfrom .training import Trainer"),
    ("textpolicy/loop.py", "import mlx.core as mx\nmx.eval(x)\n__all__ = ['train_rl']"),
    ("textpolicy/training/trainer.py", "from textpolicy.training.batch import make_batch"),
    ("textpolicy/training/trainer.py", "from textpolicy import types"),
    ("textpolicy/rollout/faults.py", "try: f()\nexcept Exception as error: g(error)"),
    (
        "textpolicy/user_code/faults.py",
        "try: f()\nexcept Exception as e: raise RewardError() from e",
    ),
    ("textpolicy/environments/load.py", "import textpolicy_envs"),
    ("textpolicy/cli/show.py", "print('done')"),
    ("textpolicy/__init__.py", "from textpolicy.loop import train_rl"),
    ("envs/add.py", "from textpolicy.types import Task\nsubprocess.run(['ls'], shell=False)"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Rule) -> None:
    complaints = [f"{source.module}: {text}" for source in read_sources() for text in rule(source)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_the_rule_notices_a_file_that_breaks_it(rule: Rule, path: str, text: str) -> None:
    assert list(rule(parse(path, text)))


@pytest.mark.parametrize(("path", "text"), SOUND)
def test_no_rule_complains_about_a_sound_file(path: str, text: str) -> None:
    assert not [complaint for rule in RULES for complaint in rule(parse(path, text))]


def test_every_rule_is_shown_a_file_that_breaks_it() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


def test_the_wheel_ships_every_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {path.parent for top in ("textpolicy", "envs") for path in (ROOT / top).rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    renamed = {"textpolicy_envs" if name == "envs" else name for name in packages}
    assert renamed == set(setuptools["packages"])


def run_python(program: str) -> str:
    """What a fresh interpreter writes, to either stream, for a program that must succeed."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    ).stdout


def test_importing_textpolicy_leaves_the_heavy_libraries_alone() -> None:
    heavy = {"mlx_lm", "transformers", "wandb", "gymnasium"}
    loaded = run_python("import sys, textpolicy; print(*sys.modules)").split()
    assert not heavy & set(loaded)


def test_importing_every_module_prints_nothing() -> None:
    modules = [source.module for source in read_sources() if not source.module.endswith("__main__")]
    assert run_python("\n".join(f"import {module}" for module in modules)) == ""
