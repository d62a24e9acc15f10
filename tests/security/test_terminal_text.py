"""What others wrote reaches the terminal spelled out, by every way out of the program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from tests.faults.attempts import Attempts
from textpolicy.adapters import Adapter, AdapterConfig
from textpolicy.adapters.files.adapter_file import write_adapter_file
from textpolicy.cli import main
from textpolicy.untrusted.bounds import MAX_MESSAGE_CHARACTERS
from textpolicy.untrusted.terminal import terminal_message, terminal_safe

# What terminals act on: escape sequences, titles, links, erasing, directions, invisible letters.
EVIL = [
    *(
        "\x1b[31mred",
        "\x1b]0;title\x07",
        "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\",
        "\x1b[2J\x1b[H",
    ),
    *("\x9b31m", "\x9d0;t\x9c", "\x08\x08\x08", "a\rb", "\x07", "\x00", "\x7f", "\x85", "\x0b\x0c"),
    *("\u202eevil\u202c", "\u2066x\u2069", "\u200bzero", "\ufeff", "\u2028", "\u2029", "\udc80"),
    *("\ue000", "\U000e0041", "\x1bP+q\x1b\\", "\x1b_Gi=1\x1b\\", "\x1b[?1049h", "\x1b[6n"),
]


def is_clean(text: str) -> bool:
    return terminal_safe(text) == text


@pytest.mark.proves("S12")
@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_a_character_that_controls_a_terminal_is_spelled_out(evil: str, attempts: Attempts) -> None:
    shown = terminal_safe(f"a{evil}\n\tb")
    assert shown != f"a{evil}\n\tb" and shown.endswith("\n\tb") and shown.startswith("a")
    assert all(char.isprintable() or char in "\n\t" for char in shown)
    assert is_clean(shown)
    shown.encode()
    attempts.add()


def test_a_message_is_cut_at_a_bounded_length() -> None:
    assert len(terminal_message("x" * 10**7)) < MAX_MESSAGE_CHARACTERS + 100
    assert terminal_message("x" * 10**7).endswith("more characters)")


NAME = "a\x1b[31m\u202eb"
REWARD = 'def reward(completion):\n    raise ValueError("\\x1b[2Jbad \\u202e" + completion)\n'


@pytest.mark.proves("S12")
@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--env", NAME],
        ["train", NAME],
        ["train", f"--{NAME}"],
        ["train", "--lr", NAME],
        ["train", "--set", f"{NAME}=1"],
        ["train", "--config", f"{NAME}.toml"],
        ["train", "--model", NAME, "--env", "add"],
        ["train", "--data", f"{NAME}.jsonl", "--reward", "reward.py"],
        ["check", "reward.py", "--data", "rows.jsonl"],
        ["inspect", f"{NAME}.safetensors"],
        ["inspect", "evil.safetensors"],
        ["sft", "--data", NAME],
        ["sft", "--data", "bad.jsonl"],
        ["report", NAME],
        ["runs", NAME],
        ["envs", NAME],
        [NAME],
    ],
    ids=ascii,
)
def test_no_command_writes_foreign_control_characters(
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    attempts: Attempts,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text(REWARD)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "\x1b[31m", "answer": "\x1b[2J"}) + "\n")
    Path("bad.jsonl").write_text(json.dumps({"\x1b[31m": "\u202e"}) + "\n")
    arrays = {f"layer{NAME}.lora_{part}": mx.zeros((4, 4)) for part in "ab"}
    adapter = Adapter(origin="a test", arrays=arrays, config=AdapterConfig(rank=4))
    write_adapter_file(Path("evil.safetensors"), adapter)
    try:
        main(argv)
    except SystemExit as stop:
        assert stop.code == 2
    stdout, stderr = capsys.readouterr()
    assert stdout or stderr
    assert is_clean(stdout + stderr)
    attempts.add()


PROGRAM = """
import sys, warnings
import textpolicy.cli.commands.doctor as command
def run(options):
    warnings.warn("\\x1b[31mwarned")
    raise ZeroDivisionError("\\x1b[31mraised \\udc80")
command.run = run
from textpolicy.cli.main import main
sys.argv = ["textpolicy", "doctor"]
main()
"""


@pytest.mark.proves("S12")
def test_a_traceback_and_a_warning_pass_the_same_escapes(attempts: Attempts) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=120,
    )
    text = done.stderr.decode("ascii")
    assert "raised" in text and "warned" in text and "Traceback" in text
    assert is_clean(text)
    attempts(2)
