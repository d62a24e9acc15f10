"""The command that `check` proposes next does the same as the check, but for what it changes."""

import json
import shlex
from argparse import Namespace
from typing import Any

import pytest

from tests.served_adapters import write_adapter
from textpolicy.cli import main
from textpolicy.cli.check_advice import next_after_check
from textpolicy.cli.flags import configured
from textpolicy.cli.models_of_runs import configured_to_sample
from textpolicy.cli.parser import build_parser
from textpolicy.cli.timed_sampler import TimedSampler
from textpolicy.config import SFTConfig, TrainConfig, changed
from textpolicy.rewards.signal_check import SignalCheck, SignalVerdict

SETTINGS = {
    "nothing but a task": ["--env", "add"],
    "rows, and options of the check": [
        *("mine.py:right", "--data", "my rows.jsonl", "--rows", "7", "--seconds", "9.5"),
    ],
    "a table of columns before other options": [
        *("mine.py", "--data", "a.csv", "--columns", "prompt=frage", "gold=a.b", "--data-stream"),
    ],
    "texts that look like flags, numbers and tables": [
        *("mine.py", "--data", "a.csv", "--system=-1 is no flag", "--prompt", "Add: {a}={b}"),
        *("--template-args", "level=high", "n=3", "deep={a = [1, 2]}", "--columns", '{"o p"="1"}'),
    ],
    "settings that have no flag in check": [
        *("mine.py", "--data", "a.csv", "--set", "trainer.lr=2e-5", "--set", "adapter.keys=a,b"),
        *("--set", "model.quantize=4", "--set", "task.on_reward_error=-1"),
    ],
    "a file of settings, and flags that take settings of it back": [
        *("--config", "run.toml", "--no-data-stream", "--thinking", "none", "--max-tokens", "9"),
    ],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(
        '[task]\ndata = "rows.jsonl"\nreward = "mine.py"\ndata_stream = true\n'
        '[model]\nthinking = "on"\n[trainer]\nlr = 1e-4\n'
    )
    return tmp_path


def options_of(argv: list[str]) -> Namespace:
    return build_parser().parse_args(argv)


def next_line(verdict: SignalVerdict, options: Namespace, **more: Any) -> list[str]:
    config = configured_to_sample(options)
    known = {"groups": 8, "group_size": 4, "differing": 2, "mean": 0.5, "cut": 0.0, "shown": ()}
    signal = SignalCheck(verdict=verdict, greedy=None, greedy_rows=0, **known)
    sampler = TimedSampler(
        config, options.sample, config.sampling.max_tokens or 64, options.seconds
    )
    more = {"has_gold": True, "gold_column": config.task.gold_column} | more
    advice = next_after_check(signal, config, sampler, options=options, **more)
    program, *argv = shlex.split(advice.command)
    assert program == "textpolicy"
    return argv


@pytest.mark.parametrize("given", SETTINGS.values(), ids=SETTINGS)
def test_the_training_that_is_proposed_has_the_settings_of_the_check(given, folder):
    options = options_of(["check", *given, "--sample", "4"])
    proposed = options_of(next_line("good", options))
    assert proposed.command == "train"
    assert configured(TrainConfig(), proposed) == configured_to_sample(options)


@pytest.mark.parametrize("given", SETTINGS.values(), ids=SETTINGS)
def test_the_next_check_differs_from_the_check_in_one_setting(given, folder):
    options = options_of(["check", *given, "--sample", "4"])
    config = configured_to_sample(options)
    hard = options_of(next_line("too hard", options))
    assert configured_to_sample(hard) == changed(config, {"task.few_shot": 4})
    cut = options_of(next_line("answers cut off", options))
    assert configured_to_sample(cut) == changed(
        config, {"sampling.max_tokens": 4 * (config.sampling.max_tokens or 64)}
    )
    for proposed in (hard, cut):
        assert proposed.command == "check"
        names = ("rows", "sample", "seconds")
        assert [vars(proposed)[one] for one in names] == [vars(options)[one] for one in names]


def test_no_advice_of_the_check_leads_back_to_itself(folder):
    """Each proposal is typed as it stands, and the answers stay as bad as they were."""
    task = ["mine.py", "--data", "a.csv", "--columns", "answer=b c", "--gold-column", "answer"]
    for verdict in ("too hard", "answers cut off"):
        argv, lines = ["check", *task, "--sample", "4"], []
        while argv[0] == "check":
            lines.append(argv)
            assert len(lines) < 6
            argv = next_line(verdict, options_of(argv))
        assert argv[0] == "sft"
    learned = configured(SFTConfig(), options_of(argv))
    assert learned.data.source == "a.csv" and learned.data.gold_column == "answer"
    assert learned.data.columns == {"answer": "b c"}


def test_the_first_check_of_shown_examples_is_not_followed_by_longer_answers(folder):
    task = ["mine.py", "--data", "a.csv", "--few-shot", "4", "--sample", "4"]
    assert next_line("answers cut off", options_of(["check", *task]))[0] == "sft"


def test_an_adapter_of_supervised_training_is_trained_longer(folder, rows):
    demonstrations = [{"prompt": row["question"], "completion": row["answer"]} for row in ROWS]
    (folder / "shown.jsonl").write_text("\n".join(map(json.dumps, demonstrations)))
    shown = ["--data", "shown.jsonl", "--iterations", "2", "--output", "warm"]
    assert main(["sft", *shown]) == 0
    argv = ["check", *rows, "--sample", "2", "--adapter", "warm"]
    proposed = next_line("too hard", options_of(argv))
    assert proposed == ["sft", "--resume", "warm", "--iterations", "4"]
    assert main(proposed) == 0


REWARD = "def right(completion, answer): return float(completion == answer)\n"
ROWS = [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(1, 9)]


@pytest.fixture
def rows(folder):
    """Write rows whose prompts have another name than `train` expects, and a reward."""
    (folder / "mine.py").write_text(REWARD)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return ["mine.py", "--data", "rows.jsonl"]


def test_a_reward_gets_the_last_message_of_a_conversation_as_its_prompt(answer, folder):
    (folder / "mine.py").write_text(
        "def right(prompt, completion, answer):\n"
        "    return float(prompt == answer + '=' and completion == answer)\n"
    )
    asked = [[{"role": "user", "content": f"{n}="}] for n in range(1, 4)]
    rows = [{"prompt": one, "answer": one[0]["content"][:-1]} for one in asked]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    findings = answer("check", "mine.py", "--data", "rows.jsonl")["findings"]
    assert {one["name"]: one["verdict"] for one in findings}["gold highest"] == "ok"


def test_check_samples_from_the_adapter_that_it_is_given(answer, rows, load_tiny, folder):
    adapter = write_adapter(folder / "red.safetensors", load_tiny, 1)
    asked = ["check", *rows, "--sample", "4", "--max-tokens", "4"]
    base, adapted = answer(*asked), answer(*asked, "--adapter", str(adapter))
    assert base["signal"]["verdict"] == "good"
    assert adapted["signal"]["mean"] < base["signal"]["mean"]
    # The columns of prompts and of adapters are passed on to a command that works.
    assert "--columns prompt=question" in base["next"]
    assert answer(*shlex.split(base["next"])[1:], "--dry-run")["prompt_tokens"] > 4
    assert "--adapter red.safetensors" in adapted["next"]


def test_rows_without_prompts_are_refused_with_the_columns_that_they_have(failure, folder):
    (folder / "mine.py").write_text(REWARD)
    (folder / "rows.jsonl").write_text('{"frage": "1+1=", "answer": "2"}')
    message = failure("check", "mine.py", "--data", "rows.jsonl", code=2)
    assert "the rows have no column of prompts; looked for prompt, question" in message
    assert "among frage, answer. Name it, as in --columns prompt=frage" in message
