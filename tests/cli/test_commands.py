"""The command chat, and the commands that list and compare runs."""

import io
import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.adapters.quantization.quantize import quantize
from textpolicy.cli import main
from textpolicy.config import TrainConfig, changed, to_toml
from textpolicy.config.sft import SFTConfig
from textpolicy.generation.mlx_generation import create_policy, load_model
from textpolicy.runs import RunDirectory

COMMAND = [sys.executable, "-c", "from textpolicy.cli import main; raise SystemExit(main())"]
GREEDY = {"max_tokens": 6, "temperature": 0}


@pytest.fixture
def chat(monkeypatch, capsys):
    """Return a function that pipes lines to `textpolicy chat` and returns answers and messages."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[list[str], list[dict]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        argv = ["chat", "--temperature", "0", "--max-tokens", "6", *options, "--json"]
        assert main(argv) == 0
        *answers, data = capsys.readouterr().out.splitlines()
        return answers, json.loads(data)["messages"]

    return run


def test_chat_prints_the_answers_to_the_whole_conversation(chat, load_tiny):
    answers, messages = chat("12+30=", "", "sort: 3 1 2")
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    policy = create_policy(*load_tiny(), GREEDY)
    assert policy(messages[:1]).text == messages[1]["content"] == answers[0]
    assert policy(messages[:3]).text == messages[3]["content"] == answers[1]


def test_reset_keeps_only_the_system_message_and_quit_ends_the_chat(chat):
    answers, messages = chat(
        "1+1=", "/reset", "2+2=", "/quit", "3+3=", options=("--system", "Be brief.")
    )
    assert len(answers) == 2
    assert [message["content"] for message in messages[:2]] == ["Be brief.", "2+2="]
    assert len(messages) == 3


def test_a_line_that_does_not_fit_into_the_context_does_not_change_the_conversation(chat, capsys):
    answers, messages = chat("1+1=", "9" * 2000, "2+2=")
    assert len(answers) == 2 and len(messages) == 4
    assert all(len(message["content"]) < 100 for message in messages)


def test_a_seed_makes_a_conversation_repeatable(chat):
    def once(seed: str) -> list[str]:
        return chat("1+1=", "2+2=", options=("--temperature", "2", "--seed", seed))[0]

    assert once("1") == once("1") != once("2")


@pytest.mark.slow
def test_chat_works_in_a_pipe_and_answers_line_by_line():
    program = "from textpolicy.cli import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "chat", "--temperature", "0", "--max-tokens", "6"],
        input="12+30=\n/quit\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1 and "> " not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that writes adapters which change the embedded model's answers."""

    def save(bits: int | None, size: float) -> str:
        model, _ = load_model("tiny")
        if bits:
            quantize(model, bits=bits)
        container = AdapterContainer.from_model(model, AdapterConfig(rank=4), seed=3)
        keys = iter(mx.random.split(mx.random.key(0), 100))
        container.swap(
            {
                name: value + size * mx.random.normal(value.shape, key=next(keys))
                for name, value in container.parameters().items()
            }
        )
        path = tmp_path_factory.mktemp("trained") / "adapters.safetensors"
        container.publish(path)
        return str(path)

    return save


def test_chat_answers_with_the_adapters(chat, trained):
    (base,), _ = chat("12+30=")
    (adapted,), _ = chat("12+30=", options=("--adapter", trained(None, 0.2)))
    assert adapted != base


@pytest.fixture
def runs(tmp_path):
    """Make a folder with three runs: a finished run, a stopped run and a supervised run."""

    def make(name, config, rows):
        directory = RunDirectory(tmp_path / "runs" / name)
        directory.claim()
        directory.write_config(to_toml(config))
        directory.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    base = changed(TrainConfig(), {"task.env": "add", "run.steps": 2})
    steps = [
        {"step": 0, "reward": 0.1, "eval/reward": 0.2},
        {"step": 1, "reward": 0.3},
        {"step": 2, "eval/reward": 0.6},
    ]
    make("finished", base, steps)
    make("stopped", changed(base, {"trainer.lr": 1e-5, "algorithm.name": "dapo"}), steps[:1])
    sft = changed(SFTConfig(), {"data.source": "rows", "trainer.iterations": 10})
    make("taught", sft, [{"step": 10, "loss": 1.0, "validation/loss": 0.5}])
    return tmp_path / "runs"


def test_runs_are_listed_with_their_state_and_their_steps(runs, answer, capsys):
    found = {one["name"]: one for one in answer("runs", str(runs))["runs"]}
    assert {name: one["state"] for name, one in found.items()} == {
        "finished": "finished",
        "stopped": "stopped",
        "taught": "finished",
    }
    assert (found["finished"]["best"], found["taught"]["best"]) == (0.6, 0.5)
    assert (found["stopped"]["steps"], found["stopped"]["planned"]) == (1, 2)
    assert (found["stopped"]["algorithm"], found["taught"]["algorithm"]) == ("dapo", "sft")
    assert main(["runs", str(runs)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_damaged_run_hides_no_other_run_and_is_an_error_if_it_is_named(runs, answer, failure):
    (runs / "stopped" / "config.toml").write_text("[run\n")
    states = {one["name"]: one["state"] for one in answer("runs", str(runs))["runs"]}
    assert states == {"finished": "finished", "stopped": "unreadable", "taught": "finished"}
    assert "is not TOML" in failure("runs", str(runs / "stopped"), code=2)


def test_a_reader_that_closes_the_pipe_early_causes_no_error(runs):
    command = [*COMMAND, "runs", str(runs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 0


@pytest.mark.slow
def test_a_run_continues_after_the_reader_of_its_output_has_closed_the_pipe(tmp_path):
    small = ["--steps", "3", "--count", "4", "--groups-per-step", "2", "--group-size", "2"]
    argv = ["train", "--env", "add", *small, "--output", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*COMMAND, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Python keeps what it could not write, and writes it again at exit.
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert RunDirectory(tmp_path / "run").report.is_file()


def test_a_run_whose_lock_is_held_is_running(runs, answer):
    with RunDirectory(runs / "stopped").lock():
        (one,) = answer("runs", str(runs / "stopped"))["runs"]
    assert one["state"] == "running"


def test_comparing_two_runs_shows_only_what_differs(runs, answer, capsys):
    paths = [str(runs / "finished"), str(runs / "stopped")]
    report = answer("runs", *paths)
    assert report["config"] == {"algorithm.name": ["grpo", "dapo"], "trainer.lr": [5e-4, 1e-5]}
    assert report["metrics"]["eval/reward"] == [0.6, 0.2]
    assert report["metrics"]["best eval/reward"] == [0.6, 0.2]
    assert main(["runs", *paths]) == 0
    shown = capsys.readouterr().out
    assert "trainer.lr" in shown and "group_size" not in shown
    assert main(["runs", paths[0], paths[0]]) == 0
    assert "do not differ" in capsys.readouterr().out


def test_a_folder_without_runs_is_an_empty_list_and_a_missing_folder_is_an_error(
    answer, failure, tmp_path
):
    assert answer("runs", str(tmp_path)) == {"runs": []}
    assert "/no/such" in failure("runs", "/no/such", code=2)
