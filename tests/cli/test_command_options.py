"""Each option of the commands around a run changes what the command returns."""

import io
import json
import sys

import pytest

from textpolicy import fast_cpu
from textpolicy.adapters.files.adapter_file import peek_version, read_adapter_file
from textpolicy.cli import main
from textpolicy.config import TrainConfig, changed, to_toml
from textpolicy.runs import RunDirectory

REWARDS = """
import time

def checksum(completion):
    return sum(map(ord, completion)) % 10 / 10

def length(completion):
    return float(len(completion))

def sorting(prompt, completion):
    return float(prompt.startswith("sort: "))

def hang(completion):
    time.sleep(60)

def hang_on_numbers(completion):
    # What is scored before the run is the right answer, or none.
    if completion not in ("", "right"):
        time.sleep(60)
    return 1.0
"""
ROWS = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(40)]


@pytest.fixture
def files(tmp_path):
    """Make a folder with rows, demonstrations and rewards."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    shown = [{"prompt": row["question"], "completion": row["answer"]} for row in ROWS]
    (tmp_path / "shown.jsonl").write_text("\n".join(map(json.dumps, shown)))
    return tmp_path


# Model and threads, in every command that loads a model


@pytest.fixture
def threads():
    """Return a function that returns the number of threads of matrix products; restore it later."""
    before = fast_cpu.enable().threads
    if before is None:
        pytest.skip("the threads of this BLAS cannot be set")
    yield lambda: fast_cpu.enable().threads
    fast_cpu.set_threads(before)


LOADING = {
    "generate": ["generate", "--prompt", "1+1="],
    "chat": ["chat"],
    "export": ["export", "any", "--to", "mlx", "--output", "exported"],
    "eval": ["eval", "--env", "add", "--count", "2"],
    "check": ["check", "--env", "add", "--sample", "2", "--rows", "2"],
    "sft": ["sft", "--data", "shown.jsonl", "--output", "run"],
    "train": ["train", "--env", "add", "--output", "run"],
}


@pytest.mark.parametrize("command", LOADING)
def test_a_command_looks_for_the_named_model_and_sets_the_threads(
    command, files, threads, monkeypatch, capsys
):
    monkeypatch.chdir(files)
    wanted = threads() + 1
    argv = [*LOADING[command], "--model", "no-such-model", "--threads", str(wanted)]
    assert main(argv) == 2
    assert "no-such-model" in capsys.readouterr().err
    assert threads() == wanted


def test_an_export_computes_with_the_threads_of_the_model_of_its_run(tmp_path, threads, failure):
    run = RunDirectory(tmp_path / "run")
    run.claim()
    run.write_config(to_toml(changed(TrainConfig(), {"model.name": "tiny"})))
    run.adapters.mkdir()
    run.latest.touch()
    fast_cpu.set_threads(2)
    failure("export", str(run.path), "--to", "nonsense", "--output", str(tmp_path / "out"))
    assert threads() == 1


# Sampling


@pytest.fixture
def sample(answer, monkeypatch):
    """Return a function that returns the texts of `generate` or `chat` with these options."""

    def run(command: str, *options: str) -> list[str]:
        options = ("--max-tokens", "6", "--temperature", "3", *options)
        if command == "generate":
            found = answer("generate", "--prompt", "12+30=", "-n", "4", "--seed", "1", *options)
            return [completion["text"] for completion in found["completions"]]
        lines = "/reset\n".join(["12+30=\n"] * 4)
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        found = answer("chat", "--seed", "1", *options)
        return [found["conversations"][0]["messages"][-1]["content"]]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_truncation_to_the_likeliest_token_is_greedy_decoding(command, sample):
    greedy = sample(command, "--temperature", "0")
    assert sample(command) != greedy
    assert sample(command, "--top-k", "1") == greedy
    assert sample(command, "--top-p", "0.000001") == greedy
    assert sample(command, "--min-p", "0.999999") == greedy


@pytest.mark.slow
def test_chat_and_generate_load_weights_of_the_chosen_dtype(answer, sample):
    def logprobs(dtype: str) -> list[float]:
        found = answer("generate", "--prompt", "12+30=", "--max-tokens", "6", "--dtype", dtype)
        return found["completions"][0]["logprobs"]

    def long(dtype: str) -> list[str]:
        return sample("chat", "--max-tokens", "200", "--dtype", dtype)

    assert logprobs("bfloat16")[0] != logprobs("float32")[0]
    assert long("bfloat16") == long("bfloat16") != long("float32")


# Control tokens in prompts and rows

SPELLED = "12+30=<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def spelled(tmp_path, files):
    """Return the options of rows whose prompts spell control tokens."""
    rows = [{"prompt": f"{n}{SPELLED}", "completion": "x", "answer": "42"} for n in range(40)]
    (tmp_path / "spelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--data", str(tmp_path / "spelled.jsonl")]


def test_generate_reads_spelled_control_tokens_as_such_only_if_allowed(answer):
    def tokens(*options: str) -> int:
        asked = ["generate", "--prompt", SPELLED, "--max-tokens", "1", *options]
        return len(answer(*asked)["completions"][0]["prompt_tokens"])

    assert tokens() - tokens("--allow-special-tokens") > 10


def test_chat_reads_spelled_control_tokens_as_such_only_if_allowed(answer, monkeypatch):
    def said(*options: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("sort: 31<|im_end|><|im_end|>\n"))
        found = answer("chat", "--temperature", "0", "--max-tokens", "8", *options)
        return found["conversations"][0]["messages"][-1]["content"]

    assert said() != said("--allow-special-tokens")


def test_eval_reads_spelled_control_tokens_as_such_only_if_allowed(evaluated, spelled):
    asked = ["--prompt", "{prompt}", *spelled]
    plain = evaluated("checksum", *asked)
    assert evaluated("checksum", *asked, "--allow-special-tokens") != plain


def test_train_plans_with_spelled_control_tokens_as_such_only_if_allowed(answer, spelled, files):
    reward = ["--reward", f"{files / 'rewards.py'}:length"]

    def tokens(*options: str) -> int:
        found = answer("train", *spelled, *reward, "--dry-run", *options)
        return found["prompt_tokens"]

    assert tokens() - tokens("--allow-special-tokens") > 10


def test_sft_refuses_a_stop_token_in_a_message_only_if_it_would_be_one(failure, spelled, tmp_path):
    asked = ["sft", *spelled, "--output", str(tmp_path / "run")]
    assert "contains the stop token" in failure(*asked, "--allow-special-tokens")


# eval


@pytest.fixture
def evaluated(answer, files):
    """Return a function that returns the metrics of `eval` with a reward of the file."""

    def run(reward: str, *options: str) -> dict[str, float]:
        asked = ["--count", "4", "--reward", f"{files / 'rewards.py'}:{reward}", *options]
        return answer("eval", *asked)["metrics"]["base"]

    return run


@pytest.mark.slow
def test_eval_takes_its_settings_from_a_file_and_from_set(answer, tmp_path):
    (tmp_path / "run.toml").write_text('[task]\nenv = "reverse"\n[evaluation]\ncount = 9\n')
    asked = ["eval", "--config", str(tmp_path / "run.toml")]
    assert answer(*asked)["env"] == "reverse"
    assert answer(*asked)["base"]["count"] == 9
    assert answer(*asked, "--set", "evaluation.count=3")["base"]["count"] == 3


def test_eval_makes_prompts_from_rows_of_a_file_by_a_template(evaluated, files):
    rows = ["--data", str(files / "rows.jsonl")]
    asked = evaluated("sorting", *rows, "--prompt", "{question}")
    other = evaluated("sorting", *rows, "--prompt", "sort: {question}")
    assert (asked["reward"], other["reward"]) == (0, 1)


def test_eval_limits_answers_to_max_tokens(evaluated):
    one = evaluated("checksum", "--env", "add", "--max-tokens", "1")
    assert (one["mean_length"], one["clipped_ratio"]) == (1, 1)


@pytest.mark.slow
def test_eval_stops_a_reward_that_hangs_and_gives_it_the_chosen_reward(evaluated, files):
    rows = [{"prompt": f"{n}+10=", "answer": "right"} for n in (20, 30, 40, 50)]
    (files / "four.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ["--data", str(files / "four.jsonl"), "--reward-timeout", "0.5"]
    assert evaluated("hang_on_numbers", *asked, "--on-reward-error", "-3")["reward"] == -3


SLEEPER = """
import time
import gymnasium

class Sleeper(gymnasium.Env):
    def reset(self, *, seed=None, options=None):
        return f"start {seed}", {}

    def step(self, answer):
        time.sleep(60)
"""


@pytest.mark.slow
def test_eval_stops_an_environment_that_hangs_and_gives_it_the_chosen_reward(answer, tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    asked = ["--env", f"{tmp_path / 'sleeper.py'}", "--count", "2", "--max-tokens", "2"]
    found = answer("eval", *asked, "--env-timeout", "0.3", "--on-reward-error", "-3")
    assert found["base"]["reward"] == -3


def test_eval_and_bench_refuse_a_tool_timeout_where_there_are_no_tools(failure):
    for command in ("eval", "bench"):
        message = failure(command, "--env", "hilo", "--tool-timeout", "1")
        assert "environment hilo is no file with TOOLS" in message


@pytest.mark.slow
def test_eval_samples_at_the_chosen_temperature(evaluated):
    asked = ["--env", "add", "--eval-samples", "2"]
    cold = evaluated("checksum", *asked, "--eval-temperature", "0.0001")
    hot = evaluated("checksum", *asked, "--eval-temperature", "5")
    assert cold["avg@2"] == cold["reward"] != hot["avg@2"]


@pytest.mark.slow
def test_eval_scores_each_environment_with_its_own_reward(answer, files):
    rows = ["--data", str(files / "rows.jsonl"), "--prompt", "{question}", "--count", "4"]
    reward = ["--reward", f"{files / 'rewards.py'}:length"]
    found = answer("eval", *rows, *reward, "--eval-envs", "sort,reverse")
    assert [other["env"] for other in found["others"]] == ["sort", "reverse"]
    for other in found["others"]:
        alone = answer("eval", "--env", other["env"], "--count", "4")
        assert other["metrics"] == alone["metrics"] and alone["others"] == []


@pytest.mark.slow
def test_eval_counts_rewards_above_the_threshold_as_correct(evaluated):
    asked = ["--env", "add", "--eval-samples", "2"]
    assert evaluated("length", *asked, "--eval-good", "0")["pass@1"] == 1
    assert evaluated("length", *asked, "--eval-good", "1000")["pass@1"] == 0


@pytest.mark.slow
def test_eval_loads_weights_of_the_chosen_dtype(evaluated):
    asked = ["--env", "add", "--eval-samples", "4", "--max-tokens", "64", "--eval-temperature", "3"]
    half = evaluated("checksum", *asked, "--dtype", "bfloat16")
    assert half == evaluated("checksum", *asked, "--dtype", "bfloat16")
    assert half != evaluated("checksum", *asked, "--dtype", "float32")


# plan


@pytest.fixture
def planned(answer):
    """Return a function that returns the adapted layers of `plan` by path, and the totals."""

    def run(*options: str) -> tuple[dict[str, dict], dict]:
        found = answer("plan", "--model", "tiny", *options)
        adapted = {row["path"]: row for row in found["modules"] if row["kind"] != "none"}
        return adapted, found

    return run


def test_plan_takes_its_settings_from_a_file_and_from_set(planned, tmp_path):
    (tmp_path / "run.toml").write_text('[adapter]\nrank = 3\nkeys = ["mlp.up_proj"]\n')
    asked = ["--config", str(tmp_path / "run.toml")]
    assert {row["rank"] for row in planned(*asked)[0].values()} == {3}
    assert {row["rank"] for row in planned(*asked, "--set", "adapter.rank=5")[0].values()} == {5}


def test_plan_adapts_the_named_layers_with_the_chosen_scale(planned):
    last, _ = planned("--num-layers", "1", "--scale", "3")
    assert {path.split(".")[2] for path in last} == {"1"}
    assert {row["scale"] for row in last.values()} == {3}
    named, _ = planned("--target-modules", "q_proj,v_proj", "--rank", "4", "--alpha", "6")
    assert {path.rpartition(".")[2] for path in named} == {"q_proj", "v_proj"}
    assert {row["scale"] for row in named.values()} == {1.5}


def test_plan_counts_the_bytes_of_the_dtype(planned):
    def base(*options: str) -> int:
        return planned(*options)[1]["base_bytes"]

    assert base("--dtype", "bfloat16") == base("--dtype", "float32") / 2
    four = base("--quantize", "4")
    assert four < base("--quantize", "8")
    assert four < base("--quantize", "4", "--quantize-group", "32")
    assert four != base("--quantize", "4", "--quantize-mode", "mxfp4")


# check, envs, demo


@pytest.mark.slow
def test_check_reads_the_named_columns_and_stops_a_reward_that_hangs(files, capsys):
    (files / "odd.jsonl").write_text('{"ask": "1+1=", "answer": "3", "truth": "2"}\n' * 3)
    (files / "mine.py").write_text(
        "def score(completion, prompt): return float(completion == '2' and prompt == '1+1=')\n"
    )
    rows = ["--data", str(files / "odd.jsonl")]
    named = ["--prompt-column", "ask", "--gold-column", "truth"]
    assert main(["check", str(files / "mine.py"), *rows, *named]) == 0
    named[-1] = "answer"
    assert main(["check", str(files / "mine.py"), *rows, *named]) == 1
    capsys.readouterr()
    hanging = [f"{files / 'rewards.py'}:hang", *rows, "--prompt-column", "ask", "--rows", "1"]
    assert main(["check", *hanging, "--reward-timeout", "0.2"]) == 1
    assert "took longer than 0.2 s" in capsys.readouterr().out


def test_envs_shows_an_environment_with_rows_of_a_file(answer, tmp_path):
    rows = [{"question": f"What is {n} and 1?", "answer": f"#### {n + 1}"} for n in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = answer("envs", "gsm8k", "--data", str(tmp_path / "mine.jsonl"))
    assert "and 1?" in shown["prompt"]


@pytest.mark.slow
def test_another_seed_makes_another_demo(answer):
    one, other = (answer("demo", "--steps", "4", "--seed", seed) for seed in ("1", "2"))
    assert one["before"] == other["before"] and one["after"] != other["after"]


# sft


def learned(folder):
    return read_adapter_file(folder / "adapters" / "latest.safetensors")


@pytest.mark.slow
def test_sft_adapts_the_model_as_configured_and_starts_from_such_adapters(answer, files):
    small = ["--data", str(files / "shown.jsonl"), "--iterations", "1", "--validation-share", "0"]
    form = ["--kind", "dora", "--rank", "2", "--scale", "1.5", "--num-layers", "1"]
    form += ["--keys", "self_attn.q_proj", "--quantize", "4", "--quantize-group", "32"]
    answer("sft", *small, *form, "--quantize-mode", "affine", "--output", str(files / "one"))
    one = answer("inspect", str(files / "one" / "adapters" / "latest.safetensors"))
    assert one["quantization"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    (layer,) = one["modules"]
    assert (layer["kind"], layer["rank"], layer["scale"]) == ("dora", 2, 1.5)
    assert layer["path"].endswith("layers.1.self_attn.q_proj")
    start = files / "one" / "adapters" / "latest.safetensors"
    answer("sft", *small, "--adapter", str(start), "--output", str(files / "two"))
    assert learned(files / "two").arrays.keys() == learned(files / "one").arrays.keys()
    second = files / "two" / "adapters" / "latest.safetensors"
    assert peek_version(second) > peek_version(start)
    (files / "rules.json").write_text('{"rules": [{"module_path": ".*up_proj", "rank": 3}]}')
    told = ["--adapter-config", str(files / "rules.json"), "--output", str(files / "three")]
    answer("sft", *small, *told)
    assert {name.split(".")[-2] for name in learned(files / "three").arrays} == {"up_proj"}


@pytest.mark.slow
def test_reinforcement_learning_starts_from_adapters_trained_with_dropout(answer, files):
    shown = ["--data", str(files / "shown.jsonl"), "--iterations", "1", "--validation-share", "0"]
    answer("sft", *shown, "--dropout", "0.2", "--output", str(files / "warm"))
    assert learned(files / "warm").config.dropout == 0.2
    warm = str(files / "warm" / "adapters" / "latest.safetensors")
    small = ["--env", "add", "--steps", "1", "--count", "4", "--groups-per-step", "2"]
    task = [*small, "--reward", f"{files / 'rewards.py'}:checksum"]
    answer("train", *task, "--adapter", warm, "--output", str(files / "rl"))
    assert learned(files / "rl").config.dropout == 0.0
    assert learned(files / "rl").version > learned(files / "warm").version


@pytest.mark.slow
def test_a_refused_resume_does_not_change_the_options_of_the_run(files, capsys):
    small = ["--env", "add", "--steps", "1", "--count", "4", "--groups-per-step", "2"]
    task = [*small, "--reward", f"{files / 'rewards.py'}:checksum", "--rank", "2"]
    assert main(["train", *task, "--output", str(files / "run")]) == 0
    config = (files / "run" / "config.toml").read_text()
    resume = ["train", "--resume", str(files / "run"), "--steps", "2"]
    assert main([*resume, "--rank", "3", "--force"]) == 2
    assert (files / "run" / "config.toml").read_text() == config
    assert main([*resume, "--force"]) == 0
