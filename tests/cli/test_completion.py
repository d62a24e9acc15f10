"""Tab completion in a real shell."""

import subprocess
import sys

import pytest

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_textpolicy
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    asked = [sys.executable, "-m", "shtab", "--shell=bash", "textpolicy.cli.completion.parser"]
    made = subprocess.run(asked, check=True, capture_output=True, text=True)
    path = tmp_path_factory.mktemp("completion") / "textpolicy"
    path.write_text(made.stdout)
    return path


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], {"train"}),
        (["train", "--quant"], {"--quantize", "--quantize-mode", "--quantize-group"}),
        (["train", "--steps", "3", "--data", "ro"], {"rows.jsonl", "rocks"}),
        (["train", "--resume", "ro"], {"rocks"}),
        (["report", "rock"], {"rocks"}),
        (["inspect", "rows"], {"rows.jsonl"}),
    ],
)
def test_the_shell_offers_commands_flags_and_files(words, offered, script, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "rocks").mkdir()
    asked = ["bash", "-c", ASK, "bash", str(script), "textpolicy", *words]
    shown = subprocess.run(asked, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert set(shown.stdout.split()) == offered
