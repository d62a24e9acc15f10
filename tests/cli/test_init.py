"""`textpolicy init` writes projects whose READMEs work. `textpolicy` alone says where to start."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.judge_server import judge_server
from tests.serving.command import serve_while
from textpolicy.cli import main
from textpolicy.cli.parser import COMMANDS

FLAGS = {"reward": [], "judge": ["--judge"], "environment": ["--env"]}
FILES = {
    "reward": ["README.md", "reward.py", "rows.jsonl", "run.toml"],
    "judge": ["README.md", "reward.py", "rows.jsonl", "run.toml"],
    "environment": ["README.md", "environment.py", "run.toml"],
}
# The embedded model takes the place of a model that a judge would like.
REAL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT = {
    "train": ["--steps", "2", "--groups-per-step", "2", "--count", "8"],
    "eval": ["--count", "8"],
    "check": ["--rows", "8", "--max-tokens", "12"],
}


def lines_of(page: str) -> list[str]:
    """Return the lines of the page's bash blocks."""
    blocks = re.findall(r"^ *```bash\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.strip().splitlines()]


def run_line(line: str, monkeypatch) -> None:
    """Run a line of a README, shortened where it samples; `echo` may give a command its input."""
    said, _, line = line.rpartition(" | ")
    program, command, *rest = shlex.split(line)
    assert program == "textpolicy"
    argv = [command, *rest, *SHORT.get(command, [])]
    if command == "serve":
        code, answer = serve_while([*argv, "--no-token"], ask)
        assert code == 130 and answer.usage.completion_tokens > 0
        return
    text = " ".join(shlex.split(said)[1:])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{text}\n" if text else ""))
    assert main(argv) == 0, line


def ask(client: OpenAI) -> Any:
    *_, model = client.models.list()
    asked = [{"role": "user", "content": "sort 31"}]
    return client.chat.completions.create(model=model.id, messages=asked, max_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_every_line_of_the_readme_of_a_new_project_works(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine", *FLAGS[kind]]) == 0
    monkeypatch.chdir(tmp_path / "mine")
    settings = Path("run.toml")
    settings.write_text(settings.read_text().replace(REAL_MODEL, "tiny"))
    lines = lines_of(Path("README.md").read_text())
    commands = [line.rpartition(" | ")[2].split()[1] for line in lines]
    wanted = {"check", "train", "eval", "report", "chat", "serve"}
    assert wanted <= set(commands) and lines.count("textpolicy train --config run.toml") == 1
    with judge_server() as url:
        monkeypatch.setenv("JUDGE_URL", url)
        for line, command in zip(lines, commands, strict=True):
            # The lines after the training are the same in all projects.
            if kind == "reward" or command in ("check", "envs", "train"):
                run_line(line, monkeypatch)
    capsys.readouterr()
    rows = [json.loads(line) for line in Path("runs/first/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [0, 1]
    assert any(row.get("adapters/delta_norm", 0) > 0 for row in rows)


@pytest.mark.parametrize("kind", FILES)
def test_a_new_project_has_the_files_that_its_readme_names(kind, tmp_path, answer):
    folder = tmp_path / "a b"
    written = answer("init", str(folder), *FLAGS[kind])
    assert written["files"] == FILES[kind] == sorted(path.name for path in folder.iterdir())
    named = re.findall(r"^\| `([\w.]+)` \|", (folder / "README.md").read_text(), re.MULTILINE)
    assert sorted([*named, "README.md"]) == FILES[kind]
    assert shlex.split(written["next"]["go there"])[1].endswith("a b")
    for check in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, "--line-length", "110", folder],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_a_project_starts_in_this_folder_and_never_replaces_a_file(
    tmp_path, monkeypatch, failure, answer
):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine")
    assert "go there" not in answer("init")["next"]
    checked = answer("check", "--config", "run.toml", "--rows", "16", "--sample", "4")
    assert checked["next"] == "textpolicy train --config run.toml"
    own = Path("reward.py").write_text("mine")
    message = failure("init", code=2)
    assert "README.md, reward.py" in message and "textpolicy init DIR" in message
    assert Path("reward.py").read_text() == "mine" and own == 4
    assert "not" in failure("init", "reward.py", code=2)


def test_the_command_alone_says_where_to_start_with_commands_that_exist(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10
    named = [line.split()[1] for line in lines if line.startswith("  textpolicy")]
    assert {"doctor", "demo", "init", "train"} <= set(named) <= {*COMMANDS, "--help"}
