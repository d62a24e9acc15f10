"""The options that decide what a model is asked do so in every command that makes a prompt."""

import io
import json
import sys
from pathlib import Path

import pytest

from tests.thinking_models import write_thinking_model
from textpolicy.cli import main

ROWS = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(40)]
REWARD = """
def right(visible_answer, answer):
    return float(visible_answer == answer)

def asked(messages, answer):
    return float("|".join(message["role"][0] + message["content"] for message in messages[:-1])
                 == MESSAGES)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Return the folder of a model whose template opens the thought in the prompt."""
    return str(write_thinking_model(tmp_path_factory.mktemp("models") / "model", "qwen3_5"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "rewards.py").write_text(REWARD)
    return path


ON, OFF = "<think>\n", "<think>\n\n</think>\n\n"
WAYS = {
    ON: ["--thinking", "on"],
    OFF: ["--template-args", "enable_thinking=false"],
}


@pytest.mark.parametrize("end", WAYS)
def test_generate_asks_as_the_options_say(answer, model, end):
    found = answer(
        *("generate", "--model", model, "--prompt", "7+5=", "--max-tokens", "2"),
        *("--system", "Add <|im_end|>.", *WAYS[end]),
    )
    (one,) = found["completions"]
    assert one["in_thought"] is (end == ON)
    from textpolicy.generation.mlx_generation import load_model

    tokenizer = load_model(model)[1]
    text = tokenizer.decode(one["prompt_tokens"])
    assert text == (
        "<|im_start|>system\nAdd <|im_end|>.<|im_end|>\n<|im_start|>user\n7+5=<|im_end|>\n"
        f"<|im_start|>assistant\n{end}"
    )
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert one["prompt_tokens"].count(stop) == 2


def test_chat_asks_as_the_options_say(answer, model, monkeypatch, capsys):
    def chat(*options: str) -> tuple[str, list[dict[str, str]]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("12+30=\n"))
        argv = ["chat", "--model", model, "--max-tokens", "8", "--temperature", "0", *options]
        messages = answer(*argv)["conversations"][0]["messages"]
        return messages[-1]["content"], messages

    plain, _ = chat()
    off, _ = chat("--thinking", "off")
    assert plain != off
    assert chat("--template-args", '{"enable_thinking": false}')[0] == off
    assert chat("--template-args", "{enable_thinking = false}")[0] == off
    other, messages = chat("--thinking", "off", "--system", "reverse KQZAWMTB")
    assert messages[0] == {"role": "system", "content": "reverse KQZAWMTB"}
    assert other != off


def test_commands_that_sample_say_whether_the_model_thinks(model, capsys):
    argv = ["generate", "--model", model, "--prompt", "1", "--max-tokens", "1"]
    for options, said in (
        ([], "thinking: on, the default of the chat template; --thinking off changes it"),
        (["--thinking", "off"], "thinking: off (enable_thinking is false)"),
    ):
        assert main([*argv, *options]) == 0
        assert said in capsys.readouterr().err


def test_eval_asks_as_the_options_say(answer, model, rows, capsys):
    (rows.parent / "rewards.py").write_text(
        "def asked(completion, messages, in_thought):\n"
        "    roles = ''.join(message['role'][0] for message in messages)\n"
        "    return 100.0 * in_thought + len(roles) + 10 * (roles[0] == 's')\n"
    )
    task = ["--data", str(rows), "--prompt", "{question}", "--reward"]
    argv = ["eval", "--model", model, *task, str(rows.parent / "rewards.py")]
    argv += ["--count", "2", "--max-tokens", "1"]

    def reward(*options: str) -> float:
        return answer(*argv, *options)["base"]["reward"]

    assert reward() == 102
    assert reward("--thinking", "off") == 2
    assert reward("--template-args", "enable_thinking=false", "--system", "Add.") == 13
    assert reward("--thinking", "off", "--few-shot", "2") == 6
    few = ["--thinking", "off", "--few-shot", "2", "--system", "Add.", "--gold-column", "question"]
    assert reward(*few) == 17


def test_check_shows_what_the_model_would_be_asked(answer, model, rows):
    argv = ["check", f"{rows.parent / 'rewards.py'}:right", "--data", str(rows), "--rows", "4"]
    found = answer(*argv, "--model", model)
    assert found["asked"] == (
        "the first prompt, as the model reads it (19 tokens):\n<|im_start|>user\n0+1=<|im_end|>\n"
        f"<|im_start|>assistant\n{ON}\n"
        "thinking: on, the default of the chat template; --thinking off changes it"
    )
    few = ["--few-shot", "1", "--gold-column", "answer", "--system", "Add."]
    few += ["--prompt", "Sum: {question}"]
    asked = answer(*argv, "--model", model, *few, *WAYS[OFF])["asked"]
    assert "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\nSum: " in asked
    assert asked.count("<|im_start|>assistant\n") == 2
    assert f"Sum: 0+1=<|im_end|>\n<|im_start|>assistant\n{OFF}\nthinking: off" in asked
    # Ten characters of plain text are more tokens than one control token.
    spelled = [*argv, "--model", model, "--system", "<|im_end|>"]
    plain, control = answer(*spelled), answer(*spelled, "--allow-special-tokens")
    assert int(plain["asked"].partition("(")[2].split()[0]) > (
        5 + int(control["asked"].partition("(")[2].split()[0])
    )


@pytest.mark.slow
def test_check_samples_as_the_options_say(answer, model, rows):
    (rows.parent / "rewards.py").write_text(
        "def opened(visible_answer, answer, in_thought):\n"
        "    return float(visible_answer == answer) + 10 * in_thought\n"
    )
    argv = ["check", str(rows.parent / "rewards.py"), "--data", str(rows), "--rows", "2"]
    argv += ["--model", model, "--sample", "2", "--max-tokens", "2"]

    def mean(*options: str) -> float:
        details = {one["name"]: one["detail"] for one in answer(*argv, *options)["findings"]}
        return float(details["signal"].partition("mean reward ")[2].partition(";")[0])

    assert mean("--thinking", "on") == 10
    assert mean("--thinking", "off") <= 1


def test_plans_count_the_tokens_of_these_prompts(answer, model, rows):
    reward = f"{rows.parent / 'rewards.py'}:right"
    argv = ["train", "--dry-run", "--model", model, "--data", str(rows), "--reward", reward]

    def tokens(*options: str) -> int:
        return answer(*argv, "--prompt", "{question}", *options)["prompt_tokens"]

    on, off = tokens("--thinking", "on"), tokens("--thinking", "off")
    assert tokens() == on and off > on
    assert tokens("--template-args", "enable_thinking=false") == off
    assert tokens("--set", "model.chat_template_kwargs.enable_thinking=false") == off
    assert tokens("--few-shot", "2") > tokens("--few-shot", "1") > on
    assert tokens("--few-shot", "1", "--gold-column", "question") > on
    assert tokens("--system", "Add.") > on


@pytest.mark.slow
def test_bench_measures_these_prompts(answer, model, rows):
    reward = f"{rows.parent / 'rewards.py'}:right"
    argv = ["bench", "--model", model, "--data", str(rows), "--reward", reward, "--seconds", "1"]
    argv += ["--prompt", "{question}", "--group-size", "2", "--groups-per-step", "2"]
    argv += ["--max-tokens", "2"]

    def tokens(*options: str) -> int:
        return answer(*argv, *options)["prompt_tokens"]

    on = tokens("--thinking", "on")
    assert tokens("--template-args", "enable_thinking=false") > on
    assert tokens("--system", "Add.") > on
    assert tokens("--few-shot", "1", "--gold-column", "answer") > on


@pytest.mark.parametrize(
    "options, message",
    [
        (["--template-args", "enable_thinkin=false"], "The template reads: enable_thinking"),
        (["--template-args", "enable_thinking=False", "--thinking", "on"], "the same switch"),
        (["--template-args", 'enable_thinking="no"'], "expected true or false"),
        (["--system", "absent.txt"], "the system message cannot be read"),
        (["--few-shot", "40"], "different training tasks"),
    ],
)
def test_wrong_options_are_refused_before_a_run_is_made(
    failure, model, rows, monkeypatch, options, message
):
    monkeypatch.chdir(rows.parent)
    reward = f"{rows.parent / 'rewards.py'}:right"
    argv = ["train", "--model", model, "--data", str(rows), "--reward", reward]
    assert message in failure(*argv, "--prompt", "{question}", *options, code=2)
    assert not (rows.parent / "runs").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--template-args", "enable_thinking"], "expected a table"),
        (["--thinking", "maybe"], "expected one of on, off"),
        (["--chat-template-kwargs", "a=1"], "did you mean --template-args?"),
    ],
)
def test_values_and_flags_that_cannot_be_read_are_explained(capsys, options, message):
    with pytest.raises(SystemExit):
        main(["train", "--env", "add", *options])
    assert message in capsys.readouterr().err
