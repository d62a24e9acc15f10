"""Every snippet of the README and the docs runs, and every path that the guides name exists.

The python blocks of a page run in order as one program, as a reader would paste them. Lines of
bash blocks that start with `textpolicy` run as commands; all commands of a page run in one folder.
A fence with a name after its language becomes a file in that folder. Snippets that cannot run here
are fenced as text.
"""

import contextlib
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from textpolicy.cli import main
from textpolicy.config import SFTConfig, TrainConfig, settings_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*) ?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "bash", "text"}
COMMAND = Path(sys.executable).with_name("textpolicy")
# A page trains for a few steps at most.
SECONDS = 300
# Pages that say where things are, and the folders that a path on such a page may start from.
GUIDES = ["AGENTS.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/coming_from.md"]
STARTS = [ROOT, ROOT / "textpolicy", ROOT / "docs"]


def blocks(page: str, language: str) -> list[str]:
    """Return the texts of the page's fences in this language, without the fences that are files."""
    return [text for kind, name, text in BLOCK.findall(page) if kind == language and not name]


def write_files(page: str, folder: Path) -> None:
    """Write every fence of the page that has a name as a file of this name."""
    for _, name, text in BLOCK.findall(page):
        if name:
            (folder / name).write_text(text, encoding="utf-8")


def program(page: str) -> str:
    """Return the page's python blocks as one program, on the same lines as in the page."""
    lines = [""] * len(page.splitlines())
    for match in BLOCK.finditer(page):
        if match[1] == "python" and not match[2]:
            first = page.count("\n", 0, match.start(3))
            body = match[3].splitlines()
            lines[first : first + len(body)] = body
    return "\n".join(lines) + "\n"


def commands(page: str) -> list[list[str]]:
    """Return the arguments of every `textpolicy` command of the page, in order."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in text.splitlines())
    return [words[1:] for words in lines if words[:1] == ["textpolicy"]]


def run(arguments: list[str | Path], folder: Path) -> None:
    """Run a command in this folder, and fail the test if the command fails."""
    done = subprocess.run(
        arguments,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{shlex.join(map(str, arguments))}\n{done.stdout[-4000:]}"


def run_program(page: str, folder: Path) -> None:
    write_files(page, folder)
    script = folder / "page.py"
    script.write_text(program(page), encoding="utf-8")
    run([sys.executable, "-W", "error", script], folder)


def having(*languages: str) -> list[object]:
    """Return the pages that have a snippet in one of these languages, as parameters of a test."""
    return [
        pytest.param(path.read_text("utf-8"), id=path.name)
        for path in PAGES
        if any(blocks(path.read_text("utf-8"), language) for language in languages)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", having("python"))
def test_the_python_of_the_page_runs(page: str, tmp_path: Path) -> None:
    run_program(page, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", having("bash"))
def test_the_commands_of_the_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for arguments in commands(page):
        code = main(arguments)
        printed = "".join(capfd.readouterr())
        assert code == 0, f"{shlex.join(arguments)}\n{printed[-4000:]}"


@pytest.mark.slow
def test_commands_run_as_programs_too(tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    found = [words for words in commands(page) if words[0] in ("generate", "doctor")]
    assert len(found) == 2
    for arguments in found:
        run([COMMAND, *arguments], tmp_path)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_block_is_python_bash_or_text(path: Path) -> None:
    page = path.read_text("utf-8")
    assert {kind for kind, _, _ in BLOCK.findall(page)} <= LANGUAGES
    # The tests do not see fences that are indented or made of tildes, so a page may have none.
    assert 2 * len(BLOCK.findall(page)) == len(re.findall(r"```|~~~", page))


def test_the_pages_hold_snippets_to_run() -> None:
    assert having("python")
    assert any(commands(path.read_text("utf-8")) for path in PAGES)


def test_a_page_with_a_false_statement_fails(tmp_path: Path) -> None:
    page = "# Sum\n\n```python\ntotal = 1 + 1\n```\n\nso\n\n```python\nassert total == 3\n```\n"
    with pytest.raises(AssertionError, match="line 10, in <module>"):
        run_program(page, tmp_path)


def test_a_page_that_warns_fails(tmp_path: Path) -> None:
    page = "```python\nimport warnings\nwarnings.warn('old', DeprecationWarning)\n```\n"
    with pytest.raises(AssertionError, match="DeprecationWarning: old"):
        run_program(page, tmp_path)


def test_a_command_that_does_not_exist_fails(tmp_path: Path) -> None:
    page = "```bash\npip install textpolicy\ntextpolicy conjure \\\n  --now  # soon\n```\n"
    (arguments,) = commands(page)
    assert arguments == ["conjure", "--now"]
    with pytest.raises(AssertionError, match="conjure"):
        run([COMMAND, *arguments], tmp_path)


def test_text_blocks_are_left_alone(tmp_path: Path) -> None:
    page = "```text\ntextpolicy conjure\n```\n"
    assert not commands(page)
    run_program(page, tmp_path)


def missing_paths(page: str) -> list[str]:
    """Return the paths between backticks and in links of a page that do not exist.

    A bare file name may be anywhere in the package, and for a path with NAME its folder must exist.
    """
    words = re.findall(r"`([\w.*/-]+)`", page) + re.findall(r"\]\(([\w./-]+)", page)
    paths = [
        word for word in words if word.endswith("/") or re.search(r"\w\.(py|md|toml|txt)$", word)
    ]
    return [path for path in paths if not exists(path)]


def exists(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    if "NAME" in name:
        return bool(folder) and exists(f"{folder}/")
    anywhere = (ROOT / "textpolicy").rglob(name) if name and not folder else []
    return any((start / path).exists() for start in STARTS) or any(anywhere)


@pytest.mark.parametrize("guide", GUIDES)
def test_every_path_that_the_guide_names_exists(guide: str) -> None:
    assert missing_paths((ROOT / guide).read_text("utf-8")) == []


def test_a_guide_that_names_a_missing_path_fails() -> None:
    page = """
    `textpolicy/loop.py`, `loop.py`, `faults.py`, `config/train.py`, `envs/`, `envs/NAME.py`,
    `tests/algorithms/test_NAME.py`, [page](metrics.md), `mx.load`, `rewards`, `--env FILE.py`,
    `textpolicy/lop.py`, `attic.py`, `loops/`, `loops/NAME.py`, [page](attic.md)
    """
    assert missing_paths(page) == [
        *("textpolicy/lop.py", "attic.py", "loops/", "loops/NAME.py", "attic.md")
    ]


def missing_names(page: str) -> list[str]:
    """Return the dotted names of a page that do not exist.

    A name may start at `textpolicy` or at one of its folders. Keys of settings are names too.
    """
    keys = {
        setting.key for config in (TrainConfig(), SFTConfig()) for setting in settings_of(config)
    }
    rooms = {path.name for path in (ROOT / "textpolicy").iterdir() if path.is_dir()}
    words = re.findall(r"`((?:\w+\.)+\w+)(?:\([^`]*\))?`", page)
    names = [word for word in words if word.split(".")[0] in rooms | {"textpolicy"}]
    return [name for name in names if name not in keys and not resolves(name)]


def resolves(name: str) -> bool:
    parts = name.removeprefix("textpolicy.").split(".")
    found: object = importlib.import_module("textpolicy")
    for number, part in enumerate(parts, 1):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(".".join(["textpolicy", *parts[:number]]))
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("path", [*PAGES, ROOT / "AGENTS.md"], ids=lambda path: path.name)
def test_every_dotted_name_of_the_page_exists(path: Path) -> None:
    assert missing_names(path.read_text("utf-8")) == []


def test_a_page_that_names_a_missing_function_fails() -> None:
    page = """
    `training.optimizer.build_optimizer`, `textpolicy.buffer.Buffer(1)`, `trainer.lr`, `mx.eval`,
    `training.optimizer.build_optimiser`, `textpolicy.buffers`, `evaluation.nothing`
    """
    assert missing_names(page) == [
        *("training.optimizer.build_optimiser", "textpolicy.buffers", "evaluation.nothing")
    ]
