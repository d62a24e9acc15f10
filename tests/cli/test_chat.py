"""The command chat: with one model, and with several side by side."""

import io
import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

from tests.thinking_models import write_thinking_model
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.cli import main
from textpolicy.cli.columns import Columns, display_width, wrap
from textpolicy.config import TrainConfig, to_toml
from textpolicy.generation.mlx_generation import create_policy, load_model
from textpolicy.generation.model_files import tiny_model
from textpolicy.runs import RunDirectory
from textpolicy.training.sft import Encoding, load_data

GREEDY = {"max_tokens": 6, "temperature": 0}
CHAT = ["chat", "--temperature", "0", "--max-tokens", "6"]


@pytest.fixture
def say(monkeypatch, capsys):
    """Return a function that pipes lines to `textpolicy chat` and returns what it prints."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        assert main([*CHAT, *options]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def chat(say):
    """Return a function that pipes lines to `chat --json`; it returns replies and conversations."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[list[dict], dict[str, list[dict]]]:
        *replies, last = map(json.loads, say(*lines, options=(*options, "--json")).splitlines())
        return replies, {one["side"]: one["messages"] for one in last["conversations"]}

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the directory of a run with two versions that answer in different ways."""
    model, _ = load_model("tiny", dtype=mx.float32)
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4), seed=3)
    directory = RunDirectory(tmp_path_factory.mktemp("runs") / "own")
    directory.claim()
    directory.write_config(to_toml(TrainConfig()))
    directory.adapters.mkdir()
    for version, size in ((1, 0.2), (2, 0.3)):
        keys = iter(mx.random.split(mx.random.key(version), 100))
        container.swap(
            {
                name: value + size * mx.random.normal(value.shape, key=next(keys))
                for name, value in container.parameters().items()
            },
            version=version,
        )
        container.publish(directory.latest)
        directory.keep_latest_adapter()
    return directory.path


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory):
    """Return the folder of a model whose chat template switches thinking."""
    return str(write_thinking_model(tmp_path_factory.mktemp("models") / "model", "qwen3_5"))


def contents(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages]


# One model


def test_chat_prints_the_answers_to_the_whole_conversation(chat, say, load_tiny):
    replies, conversations = chat("12+30=", "", "sort: 3 1 2")
    messages = conversations["base"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    policy = create_policy(*load_tiny(), GREEDY)
    answers = [reply["answer"] for reply in replies]
    assert policy(messages[:1]).text == messages[1]["content"] == answers[0]
    assert policy(messages[:3]).text == messages[3]["content"] == answers[1]
    assert say("12+30=", "", "sort: 3 1 2").splitlines() == answers


def test_reset_keeps_only_the_system_message_and_quit_ends_the_chat(chat):
    replies, conversations = chat(
        "1+1=", "/reset", "2+2=", "/quit", "3+3=", options=("--system", "Be brief.")
    )
    assert len(replies) == 2
    assert contents(conversations["base"])[:2] == ["Be brief.", "2+2="]
    assert len(conversations["base"]) == 3


def test_a_line_that_does_not_fit_into_the_context_does_not_change_the_conversation(chat, say):
    asked = ("1+1=", "9" * 2000, "2+2=")
    replies, conversations = chat(*asked)
    assert [bool(reply["error"]) for reply in replies] == [False, True, False]
    assert len(conversations["base"]) == 4
    assert len(say(*asked).splitlines()) == 2


def test_a_seed_makes_a_conversation_repeatable(chat):
    def once(seed: str) -> list[str]:
        options = ("--temperature", "2", "--seed", seed)
        return [reply["answer"] for reply in chat("1+1=", "2+2=", options=options)[0]]

    assert once("1") == once("1") != once("2")


def test_again_answers_the_last_question_anew_and_keeps_one_answer(chat):
    options = ("--temperature", "3", "--seed", "1")
    replies, conversations = chat("/again", "1+1=", "/again", options=options)
    assert [reply["question"] for reply in replies] == ["1+1=", "1+1="]
    first, second = (reply["answer"] for reply in replies)
    assert first != second
    assert contents(conversations["base"]) == ["1+1=", second]


def test_an_unknown_command_is_no_question_and_two_slashes_begin_a_question(chat, capsys):
    replies, _ = chat("/sort", "//sort 3 1 2", "/etc/hosts is a file")
    asked = [reply["question"] for reply in replies]
    assert asked == ["/sort 3 1 2", "/etc/hosts is a file"]


@pytest.mark.slow
def test_chat_works_in_a_pipe_and_answers_line_by_line():
    program = "from textpolicy.cli import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *CHAT],
        input="12+30=\n/quit\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1 and "> " not in done.stdout + done.stderr


# Several sides


def test_each_side_answers_as_it_does_alone_and_keeps_its_own_history(chat, run):
    asked = ("12+30=", "sort: 3 1 2")
    sides = {"base": ("--base",), "own@1": (f"{run}@1",), "new": (f"new={run}",)}
    options = ("--base", "--adapter", f"{run}@1", "--adapter", f"new={run}")
    replies, conversations = chat(*asked, options=options)
    assert [reply["side"] for reply in replies] == [*sides] * 2
    assert [reply["version"] for reply in replies] == [0, 1, 2] * 2
    for name, (value,) in sides.items():
        alone = () if name == "base" else ("--adapter", value)
        ((messages),) = chat(*asked, options=alone)[1].values()
        assert conversations[name] == messages
    assert len({tuple(contents(messages)) for messages in conversations.values()}) == 3


def test_all_sides_draw_with_the_same_random_keys(chat, run):
    options = ("--temperature", "3", "--adapter", f"a={run}", "--adapter", f"b={run}")
    (first, second), _ = chat("12+30=", options=options)
    assert first["answer"] == second["answer"]


def test_side_asks_one_side_until_all_are_asked_again(chat, run):
    options = ("--base", "--adapter", f"own={run}")
    replies, conversations = chat(
        "1+1=", "/side own", "2+2=", "/again", "/side", "3+3=", options=options
    )
    assert [reply["side"] for reply in replies] == ["base", "own", "own", "own", "base", "own"]
    assert contents(conversations["base"])[::2] == ["1+1=", "3+3="]
    assert contents(conversations["own"])[::2] == ["1+1=", "2+2=", "3+3="]


def test_in_a_pipe_the_answers_are_below_each_other_with_their_names(say, chat, run):
    options = ("--base", "--adapter", str(run))
    (base, own), _ = chat("12+30=", options=options)
    printed = say("12+30=", options=options)
    assert printed == f"[base] {base['answer']}\n[own] {own['answer']}\n"


def test_sides_of_one_name_are_refused(failure, run):
    said = failure("chat", "--adapter", str(run), "--adapter", str(run), code=2)
    assert "'own'" in said and "--adapter NAME=ADAPTER" in said


def test_save_writes_conversations_that_sft_learns_from_and_overwrites_no_other_file(
    chat, run, tmp_path, load_tiny
):
    file, other = tmp_path / "said.jsonl", tmp_path / "other.txt"
    other.write_text("mine")
    options = ("--base", "--adapter", str(run))
    lines = ("12+30=", f"/save {file}", "1+1=", f"/save {file}", f"/save {other}", "/save /no/such")
    _, conversations = chat(*lines, options=options)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["side"]: row["messages"] for row in rows} == conversations
    assert [row["adapter"] for row in rows] == [None, str(run / "adapters" / "latest.safetensors")]
    assert other.read_text() == "mine"
    data = load_data(file, Encoding(tokenizer=load_tiny()[1]), validation_share=0)
    assert len(data.train) == 2


def test_thinking_and_the_system_message_hold_for_all_sides(chat, run, thinking_model):
    asked = ("--model", thinking_model, "--base", "--adapter", str(run), "--seed", "1")
    asked = (*asked, "--temperature", "2")
    on, off = (chat("12+30=", options=(*asked, "--thinking", way))[0] for way in ("on", "off"))
    assert [reply["side"] for reply in on] == ["base", "own"]
    assert all(a["answer"] != b["answer"] for a, b in zip(on, off, strict=True))
    _, conversations = chat("12+30=", "/reset", options=(*asked, "--system", "Be brief."))
    assert [contents(messages) for messages in conversations.values()] == [["Be brief."]] * 2


# Columns


def screen_of(printed: str) -> list[str]:
    """Return the lines that a terminal shows after this output."""
    return [line.rpartition("\r")[2].rstrip() for line in printed.split("\n")]


def test_columns_show_whole_answers_and_rewrite_only_the_last_line(capsys):
    texts = ["one two three four\nfive", "日本語のテキストです and more words here", ""]
    columns = Columns(["base", "own", "none"], 12)
    for at in range(max(map(len, texts))):
        for number, text in enumerate(texts):
            if text[at : at + 1]:
                columns.add(number, text[at])
            if at == len(text) - 1 or (at == 0 and not text):
                columns.end(number)
    shown = screen_of(capsys.readouterr().out)
    rows = [[cell.strip() for cell in line.split("│")] for line in shown if line]
    assert rows[0] == ["base", "own", "none"]
    left, right, empty = ([row[at] for row in rows[2:] if row[at]] for at in range(3))
    assert left == ["one two", "three four", "five"] and empty == []
    assert right == ["日本語のテキ", "ストです and", "more words", "here"]
    assert all(display_width(line) <= 42 for line in shown)


@pytest.mark.parametrize("width", [5, 8, 13])
def test_wrapped_lines_are_the_same_piece_by_piece_as_at_once(width):
    text = "a bb ccc dddd eeeee ffffff  ggggggg\n\nhhhhhhhhhhhhhhhhhh i"
    lines = [""]
    for character in text:
        lines[-1:] = wrap(lines[-1] + character, width)
    assert lines == wrap(text, width)
    assert all(display_width(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that runs a chat on a terminal so wide, and returns its output."""

    def run(columns: int, question: str, *options: str) -> str:
        reader, writer = os.openpty()
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n"))
        with open(writer, "w") as screen, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            assert main([*CHAT, *options]) == 0
            screen.write("END")
            screen.flush()
            printed = b""
            while not printed.endswith(b"END"):
                printed += os.read(reader, 1 << 16)
        os.close(reader)
        return printed.decode().replace("\r\n", "\n").removesuffix("END")

    return run


def test_a_wide_terminal_shows_columns_and_a_narrow_one_a_list(terminal, chat, run):
    options = ("--base", "--adapter", str(run))
    (base, own), _ = chat("12+30=", options=options)
    wide = screen_of(terminal(100, "12+30=", *options))
    assert [cell.strip() for cell in wide[0].split("│")] == ["base", "own"]
    cells = [line.split("│") for line in wide[2:] if "│" in line]
    for number, reply in enumerate((base, own)):
        shown = " ".join(row[number].strip() for row in cells).strip()
        assert shown.replace(" ", "") == reply["answer"].replace(" ", "").replace("\n", "")
    narrow = terminal(60, "12+30=", *options)
    assert "│" not in narrow and narrow.startswith(f"[base] {base['answer']}\n[own] ")


def test_a_chat_with_a_run_s_adapter_takes_the_model_of_that_run(tmp_path, capsys, monkeypatch):
    """The run was trained on a copy of the embedded model, whose folder its config names."""
    copy = tmp_path / "my-model"
    shutil.copytree(tiny_model(), copy)
    run = ["--env", "add", "--steps", "1", "--count", "2", "--group-size", "2", "--rank", "2"]
    assert main(["train", *run, "--model", str(copy), "--output", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+1=\n"))
    assert main(["chat", "--adapter", str(tmp_path / "run"), "--max-tokens", "2"]) == 0
    assert f"model {copy}" in capsys.readouterr().err.replace("\n", "")
    assert main(["generate", "--adapter", f"{tmp_path}/run", "--prompt", "1+1="]) == 0
    assert f"model {copy}" in capsys.readouterr().err.replace("\n", "")
