"""Every snippet of the README and the docs runs, so that they cannot describe what is not there.

The python blocks of a page run in order in one program, as a reader would paste them. Lines of
bash blocks that start with `textpolicy` run as commands, in one folder a page. A fence with a name
after its language is a file of that folder. What cannot run here is fenced as text.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*) ?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "bash", "text"}
COMMAND = Path(sys.executable).with_name("textpolicy")
# A page trains for a few steps at most.
SECONDS = 300


def blocks(page: str, language: str) -> list[str]:
    """The contents of the page's fences of this language that are not files."""
    return [text for kind, name, text in BLOCK.findall(page) if kind == language and not name]


def write_files(page: str, folder: Path) -> None:
    """The page's fences that have a name, as files."""
    for _, name, text in BLOCK.findall(page):
        if name:
            (folder / name).write_text(text, encoding="utf-8")


def program(page: str) -> str:
    """The page's python blocks as one program, on the lines where the page has them."""
    lines = [""] * len(page.splitlines())
    for match in BLOCK.finditer(page):
        if match[1] == "python" and not match[2]:
            first = page.count("\n", 0, match.start(3))
            body = match[3].splitlines()
            lines[first : first + len(body)] = body
    return "\n".join(lines) + "\n"


def commands(page: str) -> list[list[str]]:
    """The arguments of every `textpolicy` command of the page, in order."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in text.splitlines())
    return [words[1:] for words in lines if words[:1] == ["textpolicy"]]


def run(arguments: list[str | Path], folder: Path) -> None:
    """Run to the end in this folder; a failure or a warning of Python's fails the test."""
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
    """The pages that hold a snippet of one of these languages, as parameters of a test."""
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
def test_the_commands_of_the_page_run(page: str, tmp_path: Path) -> None:
    write_files(page, tmp_path)
    for arguments in commands(page):
        run([COMMAND, *arguments], tmp_path)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_block_is_python_bash_or_text(path: Path) -> None:
    page = path.read_text("utf-8")
    assert {kind for kind, _, _ in BLOCK.findall(page)} <= LANGUAGES
    # A fence that is indented, or made of tildes, would not be seen and not be run.
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
