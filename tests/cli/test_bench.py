"""`textpolicy bench` measures real steps."""

import gc
import json
import time
from contextlib import closing
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.cli import main
from textpolicy.cli.flags import configured
from textpolicy.cli.measured_steps import SignalScorer
from textpolicy.cli.parser import build_parser
from textpolicy.config import TrainConfig
from textpolicy.fast_cpu.bfloat16_copies import keep_copies
from textpolicy.rewards import Rewards, load_reward, sample_of

SMALL = ("bench", "--groups-per-step", "2", "--group-size", "4")


@pytest.fixture
def benched(capsys):
    """Return a function that runs a short bench and returns its answer and its notes on steps."""

    def run(*argv: str, seconds: float = 1.0) -> tuple[dict, str]:
        # Models of earlier tests, freed during the steps, would lower the measured peaks.
        gc.collect()
        assert main([*SMALL, "--seconds", str(seconds), *argv, "--json"]) == 0
        stdout, stderr = capsys.readouterr()
        return json.loads(stdout.splitlines()[-1]), stderr

    return run


@pytest.mark.slow
def test_it_takes_measured_steps_and_accounts_for_all_of_their_time(benched):
    data, notes = benched(seconds=5)
    assert data["steps"] >= 2 and data["warmed_up"] and "warm-up" in notes
    assert sum(data["shares"].values()) == pytest.approx(1, abs=0.01)
    assert min(data["shares"][name] for name in ("generate", "update")) > 0.05
    assert min(data["shares"][name] for name in ("publish", "reload", "checkpoint")) > 0
    assert 0 < data["prompt_tokens"] < 30 and 0 < data["completion_tokens"] <= 6
    speeds, seconds = data["tokens_per_second"], data["seconds"]
    tokens = data["metrics"]["num_tokens"]
    assert speeds["generate"] == pytest.approx(tokens / seconds["generate"])
    assert speeds["update"] == pytest.approx(tokens / (seconds["logprobs"] + seconds["update"]))


@pytest.mark.slow
def test_the_peaks_of_memory_are_near_the_plan(benched):
    data, _ = benched(seconds=10)
    assert data["planned_bytes"].keys() == data["peak_bytes"].keys() == {"sampling", "training"}
    for name, peak in data["peak_bytes"].items():
        assert data["planned_bytes"][name] == pytest.approx(peak, rel=0.15)
    played, _ = benched("--env", "hilo", seconds=0.001)
    assert played["planned_bytes"] is None


@pytest.mark.slow
def test_bfloat16_copies_of_another_model_do_not_count(benched):
    other = nn.Linear(2048, 2048, bias=False)
    other.weight = other.weight.astype(mx.bfloat16).astype(mx.float32)
    mx.eval(other.parameters())
    without, _ = benched(seconds=0.001)
    if not keep_copies(other, 1 << 60):
        pytest.skip("copies are made on a Linux CPU with compilers")
    beside, _ = benched(seconds=0.001)
    for name, peak in without["peak_bytes"].items():
        assert beside["peak_bytes"][name] == pytest.approx(peak, rel=0.1)
    assert other.parameters()


@pytest.mark.slow
def test_the_memory_of_merged_weights_is_near_the_plan(benched):
    plain, _ = benched(seconds=5)
    merged, _ = benched("--merge-adapters", seconds=5)
    planned, peaks = (
        {name: merged[kind][name] - plain[kind][name] for name in ("sampling", "training")}
        for kind in ("planned_bytes", "peak_bytes")
    )
    assert planned["sampling"] == planned["training"] > 2_000_000
    for name, peak in peaks.items():
        assert planned[name] == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
def test_the_options_of_the_bench_reach_its_steps(benched):
    asked, _ = benched("--beta", "0.1", "--max-tokens", "2", "--env", "sort", "--dtype", "bfloat16")
    plain, _ = benched("--max-tokens", "2", "--env", "sort")
    assert asked["task"] == "sort"
    assert asked["metrics"]["completions/max_length"] == asked["completion_tokens"] == 2
    # The reference takes its time, and weights in bfloat16 take half of float32's memory.
    assert asked["seconds"]["logprobs"] > plain["seconds"]["logprobs"]
    assert asked["planned_bytes"]["sampling"] < plain["planned_bytes"]["sampling"]


@pytest.mark.slow
def test_a_slow_reward_is_called_and_its_time_is_shown(benched, tmp_path):
    reward = tmp_path / "slow.py"
    reward.write_text("import time\ndef slow(completion):\n    time.sleep(0.02)\n    return 1.0\n")
    data, _ = benched("--reward", str(reward))
    assert data["seconds"]["reward"] > 8 * 0.02
    isolated, _ = benched("--reward", str(reward), "--reward-timeout", "20", seconds=0.001)
    assert isolated["seconds"]["reward"] > 0
    played, _ = benched("--env", "hilo", "--env-timeout", "20", seconds=0.001)
    assert played["metrics"]["env/turns"] > 0


@pytest.mark.slow
def test_a_step_that_takes_all_the_time_is_the_measurement(benched):
    started = time.perf_counter()
    data, _ = benched(seconds=0.001)
    assert (data["steps"], data["warmed_up"]) == (1, False)
    assert time.perf_counter() - started < 10


@pytest.mark.slow
def test_without_json_the_bench_prints_a_table(capsys):
    assert main([*SMALL, "--seconds", "0.001"]) == 0
    text = capsys.readouterr().out
    for words in ("a step", "generate", "tokens/s", "peak of training", "planned"):
        assert words in text


@pytest.mark.parametrize("options", [{}, {"timeout": 20.0}], ids=["here", "isolated"])
def test_every_group_has_a_signal_and_the_users_rewards_are_called(tmp_path, options):
    (tmp_path / "mine.py").write_text(
        "def constant(completion, example):\n"
        "    with open(example['file'], 'a') as file:\n"
        "        file.write(completion)\n"
        "    return 3.0\n"
    )
    example = {"file": str(tmp_path / "called")}
    samples = [replace(sample_of("p", str(n), example), id=task) for task in "ab" for n in range(3)]
    constant = load_reward(f"{tmp_path}/mine.py:constant")
    with closing(SignalScorer(Rewards(constant, **options))) as scorer:
        verdicts = scorer.score(samples)
        # As in a run, such rewards may be called while completions are written.
        assert scorer.can_overlap_decoding is bool(options)
    assert [verdict.value for verdict in verdicts] == [0, 1, 0, 0, 1, 0]
    assert all(verdict.parts == {"constant": 3.0} for verdict in verdicts)
    assert sorted((tmp_path / "called").read_text()) == sorted("012012")


FLAGS = {
    "an adapter of its own shape": [
        *("--model", "tiny", "--threads", "1", "--kind", "dora", "--rank", "4", "--scale", "2"),
        *("--target-modules", "q_proj,v_proj", "--dropout", "0"),
        *("--temperature", "0.7", "--micro-batch-size", "2", "--checkpoint-gradients"),
    ],
    "another algorithm on a packed base": [
        *("--quantize", "4", "--quantize-mode", "affine", "--quantize-group", "32"),
        *("--alpha", "8", "--keys", "mlp.up_proj", "--num-layers", "1", "--algorithm", "dapo"),
        *("--algorithm-options", "{clip_high = 0.3}", "--truncated", "mask"),
        *("--overlong-cache", "2", "--mini-batches", "2", "--epochs", "2"),
    ],
    "references and fresh log-probabilities": [
        *("--reference", "base", "--reward-kl", "0.1", "--old-logprobs", "fresh"),
        *("--average", "token_mean", "--ratio-level", "sequence", "--beta", "0.1", "--kl", "k2"),
        *("--weights", "truncate_tokens(cap=3),off_policy_mask"),
        *("--set", "rollout.group_size=2", "--on-reward-error", "skip"),
    ],
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_flags_have_the_same_meaning_as_in_train(flags):
    def config(command: str):
        return configured(TrainConfig(), build_parser(command).parse_args([command, *flags]))

    assert config("bench") == config("train") != TrainConfig()


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_kind_of_training_can_be_timed(flags, benched):
    data, _ = benched(*flags, seconds=0.001)
    assert data["steps"] == 1 and sum(data["shares"].values()) == pytest.approx(1, abs=0.01)


@pytest.mark.slow
def test_a_run_of_a_config_file_is_timed_with_its_own_tasks_and_adapters(
    benched, load_tiny, tmp_path
):
    model, _ = load_tiny()
    adapters = AdapterContainer.from_model(model, AdapterConfig(rank=2))
    adapters.save(tmp_path / "start.safetensors")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    (tmp_path / "mine.py").write_text("def mine(completion):\n    return 1.0\n")
    (tmp_path / "run.toml").write_text("[sampling]\nmax_tokens = 3\n")
    asked = ["--config", f"{tmp_path}/run.toml", "--adapter", f"{tmp_path}/start.safetensors"]
    asked += ["--reward", f"{tmp_path}/mine.py"]
    data, _ = benched(*asked, "--data", f"{tmp_path}/rows.jsonl", seconds=0.001)
    assert data["completion_tokens"] <= 3 and data["task"].startswith("rows")
    wrapped = ["--data", f"{tmp_path}/rows.jsonl", "--prompt", "Add: {prompt}"]
    longer, _ = benched(*asked, *wrapped, seconds=0.001)
    assert longer["prompt_tokens"] > data["prompt_tokens"]
    (tmp_path / "adapter.json").write_text('{"target_modules": ["q_proj"], "r": 8}')
    data, _ = benched("--adapter-config", f"{tmp_path}/adapter.json", seconds=0.001)
    assert data["steps"] == 1
