"""No file of the library runs code that was found in data, or loads data that can hold code."""

import ast
from collections.abc import Iterator

import pytest

from tests.test_architecture import (
    BOXED,
    PACKAGE,
    ROOT,
    Source,
    imported_modules,
    parse,
    read_sources,
)

MODULES = {
    *("pickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"),
    *("runpy", "code", "codeop", "imp", "yaml", "sympy", "torch"),
}
NAMES = {"eval", "exec", "compile", "__import__", "sympify", "parse_expr"}
CALLS = {
    *("os.system", "os.popen", "pty.spawn", "commands.getoutput", "subprocess.getoutput"),
    *("subprocess.getstatusoutput", "importlib.__import__"),
}
FAMILIES = ("os.exec", "os.spawn", "os.posix_spawn")
# Only these may start a program or load a file of the user's code.
ALLOWED = {
    "subprocess": (
        "textpolicy.export.gguf.llama_cpp",
        "textpolicy.fast_cpu.compiler",
        "textpolicy.ranks.launcher",
        "textpolicy.untrusted.template_check",
        "textpolicy.user_code.agent_worker",
        "textpolicy.user_code.killable_process",
        "textpolicy.rewards.verifiers.sandbox",
    ),
    "exec_module": ("textpolicy.user_code.load_file",),
}


def unsafe(source: Source) -> Iterator[str]:
    """Yield what the file does that could run data."""
    # The programs of the sandbox are for running code, and run only in a box.
    allowed = {"exec", "compile"} if source.module.startswith(BOXED) else set()
    for line, module in imported_modules(source):
        top = module.split(".")[0]
        if top in MODULES:
            yield f"line {line}: import of {module}"
        if top in ALLOWED and not source.module.startswith(ALLOWED[top]):
            yield f"line {line}: import of {module}; only {ALLOWED[top]} start programs"
        if module in CALLS or module.startswith(FAMILIES):
            yield f"line {line}: import of {module}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name) and node.id in NAMES - allowed:
            yield f"line {node.lineno}: {node.id}"
        elif isinstance(node, ast.Attribute):
            yield from unsafe_attribute(source, node)
        elif isinstance(node, ast.keyword):
            yield from unsafe_keyword(node)
        elif isinstance(node, ast.Dict):
            yield from unsafe_entries(node)


def unsafe_attribute(source: Source, node: ast.Attribute) -> Iterator[str]:
    owner = node.value.id if isinstance(node.value, ast.Name) else ""
    name = f"{owner}.{node.attr}"
    if name in CALLS or name.startswith(FAMILIES) or (node.attr in NAMES and owner in BUILTINS):
        yield f"line {node.lineno}: {name}"
    if node.attr in {"sympify", "parse_expr"}:
        yield f"line {node.lineno}: {name}"
    if node.attr == "exec_module" and source.module not in ALLOWED["exec_module"]:
        yield f"line {node.lineno}: {name}; only user_code/load_file.py loads the user's code"


BUILTINS = {"builtins", "__builtins__"}
DANGEROUS = {"shell", "allow_pickle", "trust_remote_code"}


def unsafe_keyword(node: ast.keyword) -> Iterator[str]:
    if node.arg in DANGEROUS and not is_false(node.value):
        yield f"line {node.value.lineno}: {node.arg} that is not False"


def unsafe_entries(node: ast.Dict) -> Iterator[str]:
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and key.value in DANGEROUS and not is_false(value):
            yield f"line {value.lineno}: {key.value} that is not False"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.proves("S1")
def test_no_file_runs_or_unpickles_what_it_reads(attempts):
    sources = read_sources(PACKAGE)
    found = [f"{source.module}: {text}" for source in sources for text in unsafe(source)]
    assert not found, "\n".join(found)
    attempts(len(sources))


def test_no_setting_of_a_program_lets_a_model_bring_its_code():
    paths = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.*")]
    assert not [path for path in paths if "trust_remote_code=True" in path.read_text("utf-8")]


PLANTED = [
    "eval(completion)",
    "exec(completion)",
    "run = eval\nrun(completion)",
    "compile(completion, 'x', 'exec')",
    "import builtins\nbuiltins.exec(completion)",
    "__import__(completion)",
    "import os\nos.system(completion)",
    "from os import system",
    "from os import execvp",
    "import os\nos.posix_spawn('sh', [], {})",
    "import subprocess",
    "def f():\n    from subprocess import run",
    "run(completion, shell=True)",
    "run(completion, shell=flag)",
    "sympy.sympify(completion)",
    "from sympy.parsing.sympy_parser import parse_expr",
    "import yaml",
    "import pickle",
    "def f():\n    from pickle import loads",
    "import importlib\nimportlib.import_module('pickle')",
    "np.load(path, allow_pickle=True)",
    "torch = __import__('torch')",
    "import torch",
    "load(path, trust_remote_code=True)",
    "load(path, {'trust_remote_code': trust})",
    "spec.loader.exec_module(module)",
    "import runpy",
]


@pytest.mark.proves("S1")
@pytest.mark.parametrize("text", PLANTED)
def test_a_planted_line_is_found(attempts, text):
    assert list(unsafe(parse("envs/add.py", text)))
    attempts.add()


def test_a_program_of_the_sandbox_may_run_code_and_nothing_else_of_this_kind():
    path = f"{BOXED.replace('.', '/')}x.py"
    assert not list(unsafe(parse(path, "exec(compile(code, 'code.py', 'exec'))")))
    assert list(unsafe(parse(path, "eval(answer)")))
    assert list(unsafe(parse(path, "import pickle")))


@pytest.mark.parametrize(
    "text",
    [
        "re.compile('a')",
        "mx.compile(f)",
        "mx.eval(x)\nmodel.eval()",
        "load(path, trust_remote_code=False)",
        "load(path, {'trust_remote_code': False})",
        "np.load(path, allow_pickle=False)",
        "import os\nos.environ",
    ],
)
def test_a_harmless_line_is_passed_over(text):
    assert not list(unsafe(parse("envs/add.py", text)))
