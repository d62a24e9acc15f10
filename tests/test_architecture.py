"""Rules of the architecture: which file may import which, and what no file may contain.

A rule is a function that takes parsed files and yields complaints. A test gives every rule files
that break the rule, so that a rule which has stopped finding anything fails too.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Imports go down this list. docs/architecture.md and AGENTS.md show the same list.
LAYERS = (
    "textpolicy",
    "textpolicy.cli",
    "textpolicy.export",
    "textpolicy.experiment",
    "textpolicy.loop",
    "textpolicy.resume",
    "textpolicy.planning",
    "textpolicy.evaluation",
    "textpolicy.rollout",
    "textpolicy.serving",
    "textpolicy.generation",
    "textpolicy.training",
    "textpolicy.tracking",
    "textpolicy.runs",
    "textpolicy.buffer",
    "textpolicy.environments",
    "textpolicy_envs",
    "textpolicy.rewards",
    "textpolicy.adapters",
    "textpolicy.algorithms",
    "textpolicy.device_sizes",
    "textpolicy.backend",
    "textpolicy.file_writing",
    "textpolicy.machine",
    "textpolicy.layer_gradients",
    "textpolicy.fast_cpu",
    "textpolicy.control_tokens",
    "textpolicy.chat_template",
    "textpolicy.types",
    "textpolicy.config",
    "textpolicy.ranks",
    "textpolicy.user_code",
    "textpolicy.activity",
    "textpolicy.untrusted",
    "textpolicy.errors",
)
LEVEL = {layer: level for level, layer in enumerate(LAYERS)}
# The trainer receives its two functions as arguments, and a rollout worker receives its policy.
BANNED_IMPORTS = {
    ("textpolicy.training", "textpolicy.algorithms"),
    ("textpolicy.rollout", "textpolicy.generation"),
}
# A file name must say to a newcomer what is in the file. These names do not.
BANNED_NAME = re.compile(
    "utils|common|helpers|core|manager|base|fit|forms|kinds|uniform|twin|skeleton|frozen|tree"
    "|targets|scores|scoring|chunks|rejected|wired|course|early|child|probes|pieces"
)
# Names that several files define on purpose: the files of the folder share a contract, and a
# caller reads the name from whichever file it was given. Every ready task in envs/ is such a file.
CONTRACTS = {
    "run": "textpolicy.cli.commands",
    "compute_advantages": "textpolicy.algorithms",
    "policy_loss": "textpolicy.algorithms",
    "DECLARATION": "textpolicy.algorithms",
    "load": "textpolicy.environments.bridges",
}
# Files that may write to the terminal: a run that nobody listens to says what it does, and trackio
# prints by itself, and its output is sent elsewhere.
TERMINAL_WRITERS = {
    "textpolicy.cli.output",
    "textpolicy.experiment.event_lines",
    "textpolicy.tracking.trackio_run",
}
BELOW_FAST_CPU = ("textpolicy.activity", "textpolicy.errors")
# Files that may call Python's readers: they have bounds of their own.
PARSERS = {
    "textpolicy.untrusted.parsing",
    "textpolicy.rewards.verifiers.json_schema",
    "textpolicy.user_code.killable_process",
}
PACKAGE = ("textpolicy", "envs")
SCRIPTS = ("benchmarks", "tools", "examples")
# The programs of the sandbox: running code is what they are for. They run only in a box.
BOXED = "textpolicy.rewards.verifiers.sandbox.inside."


@dataclass(frozen=True)
class Source:
    """One parsed file and the name that imports it."""

    module: str
    is_package: bool
    tree: ast.Module

    @property
    def layer(self) -> str:
        return layer_of(self.module)


def layer_of(module: str) -> str:
    """Return the first two parts of a module's name. All ready tasks are one layer."""
    top, *rest = module.split(".")
    # `python -m textpolicy` runs __main__.py, which is the command.
    part = "cli" if rest == ["__main__"] else next(iter(rest), None)
    return top if top != "textpolicy" or part is None else f"{top}.{part}"


def parse(path: str, text: str) -> Source:
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] == "envs":
        parts[0] = "textpolicy_envs"
    is_package = parts[-1] == "__init__"
    return Source(".".join(parts[:-1] if is_package else parts), is_package, ast.parse(text))


@cache
def read_sources(folders: tuple[str, ...] = PACKAGE) -> list[Source]:
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [parse(str(path.relative_to(ROOT)), path.read_text("utf-8")) for path in paths]


def absolute(source: Source, node: ast.ImportFrom) -> str:
    """Return the module that a `from` import names, with leading dots resolved."""
    package = source.module.split(".") if source.is_package else source.module.split(".")[:-1]
    base = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


def imported_modules(source: Source) -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of every import, also of those inside functions."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(source, node)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node).endswith("import_module"):
            yield from ((node.lineno, text) for text in string_constants(node.args[:1]))


def called_name(node: ast.Call) -> str:
    """Return `f` or `module.f`, or an empty text for a call of anything else."""
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
        # `from textpolicy import train_rl` names no module: the import is of textpolicy itself.
        target = layer_of(module) if layer_of(module) in LEVEL else "textpolicy"
        if target != source.layer and LEVEL[target] <= LEVEL[source.layer]:
            yield f"line {line}: {source.layer} imports {module}, which is not below it"
        if (source.layer, target) in BANNED_IMPORTS:
            yield f"line {line}: {source.layer} may not import {target}"


def stars_are_not_imported(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield f"line {node.lineno}: star import"


def one_file_writes_to_the_terminal(source: Source) -> Iterator[str]:
    if source.module in TERMINAL_WRITERS or source.module.startswith(BOXED):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and called_name(node) == "print":
            yield f"line {node.lineno}: print; return the value or report it to a callback"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"sys.stdout", "sys.stderr"}:
            yield f"line {node.lineno}: {ast.unparse(node)}; textpolicy/cli/output.py writes there"


def one_file_reads_json_and_toml(source: Source) -> Iterator[str]:
    boxed = source.module.startswith(BOXED)
    if boxed or source.module in PARSERS or source.layer == "textpolicy_envs":
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and called_name(node) in {"json.load", "json.loads"}:
            yield f"line {node.lineno}: {called_name(node)}; call parse_json or read_json_file"
    for line, module in imported_modules(source):
        if module.split(".")[0] == "tomllib":
            yield f"line {line}: tomllib; call parse_toml or read_toml_file"


def broad_excepts_stay_at_the_boundary(source: Source) -> Iterator[str]:
    if source.module.endswith(".faults") or source.module.startswith(BOXED):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
            if None in kinds or names & {"Exception", "BaseException"}:
                yield f"line {node.lineno}: broad except; name the errors, or let them through"


def one_file_applies_the_chat_template(source: Source) -> Iterator[str]:
    if source.module == "textpolicy.chat_template":
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr == "apply_chat_template":
            yield f"line {node.lineno}: {node.attr}; call textpolicy.chat_template.render_chat"


def names_say_what_is_inside(source: Source) -> Iterator[str]:
    for part in source.module.split("."):
        if BANNED_NAME.fullmatch(part):
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


def only_the_command_imports_the_command(source: Source) -> Iterator[str]:
    if source.layer == "textpolicy.cli":
        return
    for line, module in imported_modules(source):
        if layer_of(module) == "textpolicy.cli":
            yield f"line {line}: import of {module}; what others need belongs below textpolicy.cli"


def fast_cpu_stands_alone(source: Source) -> Iterator[str]:
    if source.layer != "textpolicy.fast_cpu":
        return
    for line, module in imported_modules(source):
        ours = module.split(".")[0] in {"textpolicy", "textpolicy_envs"}
        if ours and layer_of(module) not in {"textpolicy.fast_cpu", *BELOW_FAST_CPU}:
            below = " and ".join(BELOW_FAST_CPU)
            yield f"line {line}: import of {module}; fast_cpu imports only {below}"


def files_import_in_no_circle(sources: list[Source]) -> Iterator[str]:
    modules = {source.module for source in sources}
    imports = {source.module: imported_files(source, modules) for source in sources}
    reported: set[frozenset[str]] = set()
    for module in imports:
        circle = shortest_circle(imports, module)
        if circle and frozenset(circle) not in reported:
            reported.add(frozenset(circle))
            yield " imports ".join(circle)


def imported_files(source: Source, modules: set[str]) -> set[str]:
    """Return which of these modules a file imports."""
    found = set()
    for _line, name in imported_modules(source):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        found.add(name)
    return found & modules - {source.module}


def shortest_circle(imports: dict[str, set[str]], start: str) -> list[str]:
    """Return the shortest chain of imports that leads from a module to itself, or an empty list."""
    chains, seen = [[start]], set[str]()
    for chain in chains:
        for module in sorted(imports[chain[-1]] - seen):
            if module == start:
                return [*chain, start]
            seen.add(module)
            chains.append([*chain, module])
    return []


def public_names_are_defined_once(sources: list[Source]) -> Iterator[str]:
    modules: dict[str, set[str]] = {}
    for source in sources:
        for name in defined_names(source.tree.body):
            if not name.startswith("_") and not is_contract(name, source):
                modules.setdefault(name, set()).add(source.module)
    for name, found in modules.items():
        if len(found) > 1:
            yield f"{name} is defined in {' and in '.join(sorted(found))}"


def is_contract(name: str, source: Source) -> bool:
    folder = CONTRACTS.get(name)
    in_folder = folder is not None and source.module.startswith(f"{folder}.")
    return in_folder or source.layer == "textpolicy_envs"


def defined_names(statements: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield the functions, classes and variables that a module defines, type aliases included."""
    for node in statements:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name for target in targets for name in ast.walk(target)]
            yield from (name.id for name in names if isinstance(name, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            yield from defined_names([*node.body, *node.orelse])
            for handler in node.handlers if isinstance(node, ast.Try) else []:
                yield from defined_names(handler.body)


def boxed_programs_are_imported_by_nobody(source: Source) -> Iterator[str]:
    inside = source.module.startswith(BOXED)
    for line, module in imported_modules(source):
        if module.startswith(BOXED) and not inside:
            yield f"line {line}: import of {module}, which may run only in a box"
        elif inside and module.startswith("textpolicy") and not module.startswith(BOXED):
            yield f"line {line}: import of {module}, which is not there in a box"


Rule = Callable[[Source], Iterator[str]]
# A rule for one file, and the folders whose files keep the rule.
RULES: dict[Rule, tuple[str, ...]] = {
    imports_go_down: PACKAGE,
    stars_are_not_imported: PACKAGE,
    one_file_writes_to_the_terminal: PACKAGE,
    one_file_reads_json_and_toml: PACKAGE,
    broad_excepts_stay_at_the_boundary: PACKAGE,
    one_file_applies_the_chat_template: PACKAGE,
    names_say_what_is_inside: PACKAGE,
    all_is_written_by_hand: PACKAGE,
    only_the_command_imports_the_command: (*PACKAGE, *SCRIPTS),
    fast_cpu_stands_alone: PACKAGE,
    boxed_programs_are_imported_by_nobody: PACKAGE,
}
PackageRule = Callable[[list[Source]], Iterator[str]]
PACKAGE_RULES: list[PackageRule] = [files_import_in_no_circle, public_names_are_defined_once]
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
    (one_file_applies_the_chat_template, "envs/add.py", "ids = t.apply_chat_template(messages)"),
    (stars_are_not_imported, "textpolicy/buffer.py", "from textpolicy.types import *"),
    (one_file_writes_to_the_terminal, "textpolicy/buffer.py", "print('full')"),
    (one_file_writes_to_the_terminal, "textpolicy/cli/show.py", "print('full')"),
    (one_file_writes_to_the_terminal, "textpolicy/buffer.py", "sys.stderr.write('full')"),
    (one_file_reads_json_and_toml, "textpolicy/buffer.py", "json.loads(text)"),
    (one_file_reads_json_and_toml, "textpolicy/buffer.py", "import tomllib"),
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
    (names_say_what_is_inside, "textpolicy/training/utils.py", ""),
    (names_say_what_is_inside, "textpolicy/adapters/fit.py", ""),
    (names_say_what_is_inside, "textpolicy/core/__init__.py", ""),
    (all_is_written_by_hand, "textpolicy/loop.py", "__all__ = [name for name in globals()]"),
    (all_is_written_by_hand, "textpolicy/loop.py", "__all__ = ['a']\n__all__ += other.__all__"),
    (
        only_the_command_imports_the_command,
        "benchmarks/learning.py",
        "from textpolicy.cli.flags import add_options",
    ),
    (only_the_command_imports_the_command, "tools/page.py", "def f():\n    import textpolicy.cli"),
    (only_the_command_imports_the_command, "examples/circle.py", "from textpolicy import cli"),
    (
        boxed_programs_are_imported_by_nobody,
        "textpolicy/rewards/x.py",
        f"from {BOXED}tester import serve",
    ),
    (
        boxed_programs_are_imported_by_nobody,
        f"{BOXED.replace('.', '/')}x.py",
        "from textpolicy.errors import ConfigError",
    ),
    (fast_cpu_stands_alone, "textpolicy/fast_cpu/blas.py", "from textpolicy.types import Batch"),
    (fast_cpu_stands_alone, "textpolicy/fast_cpu/blas.py", "from textpolicy import config"),
]
CIRCLES: list[dict[str, str]] = [
    {
        "textpolicy/buffer.py": "from textpolicy.types import Rollout",
        "textpolicy/types.py": "def f():\n    from textpolicy import buffer",
    },
    {
        "textpolicy/adapters/layers/dora.py": "from textpolicy.adapters.fuse import fuse",
        "textpolicy/adapters/fuse.py": "from textpolicy.adapters import container",
        "textpolicy/adapters/container.py": (
            "if TYPE_CHECKING:\n    from .layers.dora import DoRALinear"
        ),
    },
    {
        "textpolicy/runs/__init__.py": "from textpolicy.runs.directory import Run",
        "textpolicy/runs/directory.py": "from textpolicy.runs import Run",
    },
]
DEFINED_TWICE: list[dict[str, str]] = [
    {"textpolicy/buffer.py": "class Row: ...", "textpolicy/types.py": "class Row: ..."},
    {"textpolicy/buffer.py": "Row = list[int]", "textpolicy/types.py": "Row: TypeAlias = tuple"},
    {"textpolicy/buffer.py": "T = TypeVar('T')", "textpolicy/types.py": "S, T = f(), g()"},
    {"textpolicy/buffer.py": "def run(): ...", "textpolicy/loop.py": "def run(): ..."},
    {
        "textpolicy/algorithms/grpo.py": "def load(): ...",
        "textpolicy/environments/load.py": "if x:\n    def load(): ...",
    },
]
BROKEN_PACKAGES: list[tuple[PackageRule, dict[str, str]]] = [
    *((files_import_in_no_circle, files) for files in CIRCLES),
    *((public_names_are_defined_once, files) for files in DEFINED_TWICE),
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
    ("textpolicy/cli/output.py", "print('done', file=sys.stderr)"),
    ("textpolicy/untrusted/parsing.py", "import tomllib\njson.loads(text)"),
    ("textpolicy/__init__.py", "from textpolicy.loop import train_rl"),
    ("envs/add.py", "from textpolicy.types import Task"),
    ("textpolicy/cli/main.py", "from textpolicy.cli.flags import add_options"),
    ("textpolicy/fast_cpu/blas.py", "from textpolicy.errors import BackendError\nimport numpy"),
]
SOUND_PACKAGES: list[dict[str, str]] = [
    {
        "textpolicy/algorithms/grpo.py": "def policy_loss(): ...\n_LIMIT = 1",
        "textpolicy/algorithms/dapo.py": "def policy_loss(): ...\n_LIMIT = 2",
        "envs/add.py": "MAX_TOKENS = 4\ndef reward(): ...",
        "envs/sort.py": "MAX_TOKENS = 8\ndef reward(): ...",
        "textpolicy/rewards/contract.py": "@overload\ndef reward(): ...\ndef reward(): ...",
        "textpolicy/cli/commands/train.py": "def run(): ...",
        "textpolicy/cli/commands/check.py": "def run(): ...",
        "textpolicy/experiment/run.py": "def run(): ...",
        "textpolicy/environments/bridges/textarena.py": "def load(): ...",
        "textpolicy/environments/load.py": "def load(): ...\n__all__ = ['load']",
    },
    {
        "textpolicy/runs/__init__.py": "from textpolicy.runs.directory import Run",
        "textpolicy/runs/directory.py": "from textpolicy.runs.lock import Lock",
        "textpolicy/runs/lock.py": "class Lock: ...",
    },
]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Rule) -> None:
    sources = read_sources(RULES[rule])
    complaints = [f"{source.module}: {text}" for source in sources for text in rule(source)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.slow
@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: PackageRule) -> None:
    complaints = list(rule(read_sources()))
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_the_rule_notices_a_file_that_breaks_it(rule: Rule, path: str, text: str) -> None:
    assert list(rule(parse(path, text)))


@pytest.mark.parametrize(("path", "text"), SOUND)
def test_no_rule_complains_about_a_sound_file(path: str, text: str) -> None:
    assert not [complaint for rule in RULES for complaint in rule(parse(path, text))]


@pytest.mark.parametrize(("rule", "files"), BROKEN_PACKAGES)
def test_the_rule_notices_a_package_that_breaks_it(
    rule: PackageRule, files: dict[str, str]
) -> None:
    assert len(list(rule([parse(path, text) for path, text in files.items()]))) == 1


@pytest.mark.parametrize("files", SOUND_PACKAGES)
def test_no_rule_complains_about_a_sound_package(files: dict[str, str]) -> None:
    sources = [parse(path, text) for path, text in files.items()]
    assert not [complaint for rule in PACKAGE_RULES for complaint in rule(sources)]


def test_every_rule_is_given_files_that_break_it() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)
    assert {rule for rule, _ in BROKEN_PACKAGES} == set(PACKAGE_RULES)


def path_of(layer: str) -> Path:
    """Return the folder or the file that holds a layer."""
    folder = ROOT / ("envs" if layer == "textpolicy_envs" else layer.replace(".", "/"))
    return folder if folder.is_dir() else folder.with_suffix(".py")


def test_every_layer_is_a_folder_or_a_file() -> None:
    assert [layer for layer in LAYERS if not path_of(layer).exists()] == []


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("docs/architecture.md", "The layers"),
        ("AGENTS.md", "Layers"),
        ("README.md", "What is where"),
    ],
)
def test_the_page_lists_the_layers_in_their_order(page: str, heading: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    (block,) = re.findall(rf"^## {heading}.*?^```text\n(.*?)^```$", text, re.M | re.S)
    listed = [line.split()[0] for line in block.splitlines()]
    paths = [path_of(layer) for layer in LAYERS if layer != "textpolicy"]
    names = [path.name + "/" * path.is_dir() for path in paths]
    if page == "README.md":  # It shows the repository, where envs/ is beside the package.
        listed = [name for name in listed if name in names and name != "envs/"]
        names.remove("envs/")
    assert listed == names


def test_the_wheel_ships_every_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {path.parent for top in PACKAGE for path in (ROOT / top).rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    renamed = {"textpolicy_envs" if name == "envs" else name for name in packages}
    assert renamed == set(setuptools["packages"])


def run_python(program: str) -> str:
    """Return what a fresh interpreter prints, on both streams, while it runs a program."""
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


@pytest.mark.slow
def test_importing_every_module_prints_nothing() -> None:
    modules = [source.module for source in read_sources() if not source.module.endswith("__main__")]
    assert run_python("\n".join(f"import {module}" for module in modules)) == ""
