"""Whatever a command prints, no character of it controls the terminal."""

import unicodedata

import pytest

from tests.bases import trained
from tests.tiny import qwen3_model
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.cli import main

HOSTILE = {
    "clear the screen": "\x1b[2J\x1b[H",
    "colours": "\x1b[31mred\x1b[0m",
    "the title": "\x1b]0;taken\x07",
    "the clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "a link": "\x1b]8;;http://evil.example\x1b\\text\x1b]8;;\x1b\\",
    "an answer of the terminal": "\x1b[6n\x1b[c\x1bZ",
    "a device string": "\x1bP+q544e\x1b\\",
    "an application command": "\x1b_Gi=31;AAAA\x1b\\",
    "keys": "\x1b[?1049h\x1b[?2004h",
    "eight-bit controls": "\x9b2J\x9d0;taken\x9c\x90x\x9c",
    "bell and backspace": "safe\x08\x08\x08\x08rm\x07",
    "carriage return": "failed\rpassed",
    "form feed and vertical tab": "a\x0cb\x0bc",
    "delete": "\x7f\x7f",
    "shift out": "\x0e\x0f",
    "right to left": "\u202egnp.exe",
    "isolates": "\u2066a\u2069\u2067b\u2069",
    "marks": "\u200e\u200f\u061c",
    "invisible": "a\u200bb\u2060c\ufeffd",
    "tags": "\U000e0041\U000e0042",
    "half a pair": "\ud800",
    "separators": "a\u2028b\u2029c",
    "private letters": "\ue000\U000f0000",
    "markup of rich": "[bold red]x[/bold red][/foo][link=http://evil.example]y[/link]",
}
ALLOWED = "\n"


def unsafe(text):
    return [c for c in text if c not in ALLOWED and unicodedata.category(c)[0] == "C"]


@pytest.fixture
def printed(capsys):
    """Return a function that runs a command, and returns what it printed."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        told = capsys.readouterr()
        return code, told.out + told.err

    return run


def commands_that_quote(text, folder):
    """Yield commands that fail, and quote the text."""
    name = text.replace("/", "|")
    yield "generate", "--prompt", "1", "--model", folder / name
    yield "inspect", folder / f"{name}.safetensors"
    yield "sft", "--data", folder / f"{name}.jsonl"
    yield "train", "--env", "add", "--reward", folder / f"{name}.py"
    yield "train", "--env", text
    yield "train", "--env", "add", "--set", f"{text}=1"
    yield "train", "--resume", folder / name
    yield "report", folder / name
    yield "eval", "--env", "add", "--config", folder / f"{name}.toml"


@pytest.mark.proves("S12")
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_message_of_an_error_carries_what_it_quotes(printed, tmp_path, attempts, text):
    for command in commands_that_quote(text, tmp_path):
        code, told = printed(*command)
        assert code == 2 and told
        assert not unsafe(told), command
        attempts.add()


@pytest.mark.proves("S12")
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_row_and_no_exception_of_a_reward_is_printed_raw(printed, tmp_path, attempts, text):
    rows = tmp_path / "rows.jsonl"
    reward = tmp_path / "reward.py"
    escaped = text.encode("unicode_escape").decode()
    reward.write_text(f"def reward(completion):\n    raise ValueError({text!r})\n", "utf-8")
    code, told = printed("check", reward, "--env", "add")
    assert code != 0 and "Traceback" not in told and not unsafe(told), escaped
    if "\ud800" not in text:
        rows.write_text(f'{{"prompt": "1", "answer": 1}}\n{text}\n', "utf-8")
        code, told = printed("train", "--data", rows, "--reward", reward)
        assert code == 2 and not unsafe(told)
    attempts(2)


@pytest.mark.proves("S12")
def test_names_and_origins_in_an_adapter_are_shown_spelled_out(printed, tmp_path, attempts):
    model = qwen3_model()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=2))
    container.swap(trained(container), version=1)
    for number, text in enumerate(HOSTILE.values()):
        folder = tmp_path / f"{number}{text.replace('/', '|')}"
        if "\ud800" in text:
            continue
        folder.mkdir()
        container.publish(folder / "a.safetensors")
        code, told = printed("inspect", folder / "a.safetensors")
        assert code == 0 and not unsafe(told)
        attempts.add()
