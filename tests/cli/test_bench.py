"""`textpolicy bench`: its numbers are those of real steps, and its advice follows from them."""

import json
import time
from contextlib import closing
from dataclasses import replace

import pytest

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.cli import main
from textpolicy.cli.advice import Measured, advice_of, shown
from textpolicy.cli.commands.bench import SignalScorer
from textpolicy.cli.flags import configured
from textpolicy.cli.parser import build_parser
from textpolicy.cli.timed_steps import TimedSteps
from textpolicy.config import TrainConfig
from textpolicy.loop import StepReport
from textpolicy.rewards import Rewards, load_reward, sample_of
from textpolicy.types import (
    Progress,
    Rollout,
    RolloutGroup,
    Sampling,
    StopReason,
    Task,
)

SMALL = ("bench", "--groups-per-step", "2", "--group-size", "4")
STEP = {
    "time/generate": 0.5,
    "time/reward": 0.01,
    "time/score": 0.01,
    "time/update": 0.4,
    "time/publish": 0.01,
    "time/reload": 0.01,
    "time/step": 1.0,
    "memory/peak_gb": 0.05,
    "num_tokens": 640.0,
    "completions/mean_length": 5.0,
    "completions/max_length": 6.0,
    "completions/clipped_ratio": 0.0,
    "padding": 0.1,
}
UNREMARKABLE = Measured(
    model="tiny",
    task="add",
    device="cpu",
    groups=16,
    group_size=8,
    max_tokens=6,
    steps=20,
    warmed_up=True,
    metrics=STEP,
    prompt_tokens=16,
    completion_tokens=6,
    planned_bytes=50_000_000,
    played=False,
    scores_reference=False,
    scores_afresh=False,
    isolated=False,
    threads={2: 1.0, 1: 0.99},
    widths={64: 900.0, 128: 1280.0, 256: 1290.0},
    products={"float32": 1.0, "bfloat16": 3.0},
    blas={"mlx": 60.0},
)


@pytest.fixture
def benched(capsys):
    """A function from options to the answer of a short bench, and what was told meanwhile."""

    def run(*argv: str, seconds: float = 1.0) -> tuple[dict, str]:
        assert main([*SMALL, "--seconds", str(seconds), *argv, "--json"]) == 0
        stdout, stderr = capsys.readouterr()
        return json.loads(stdout.splitlines()[-1]), stderr

    return run


def test_it_takes_real_steps_and_accounts_for_all_of_their_time(benched):
    data, told = benched(seconds=5)
    assert data["steps"] >= 2 and data["warmed_up"] and "warm-up" in told
    assert sum(data["shares"].values()) == pytest.approx(1, abs=0.01)
    assert min(data["shares"][name] for name in ("generation", "update")) > 0.05
    assert 0 < data["prompt_tokens"] < 30 and 0 < data["completion_tokens"] <= data["max_tokens"]
    assert 0 < data["metrics"]["memory/peak_gb"] < 1 and data["planned_bytes"] > 2**20
    assert data["products"]["float32"] > 0


def test_what_is_asked_for_is_what_runs(benched):
    asked, _ = benched("--beta", "0.1", "--max-tokens", "2", "--env", "sort", "--dtype", "bfloat16")
    assert asked["task"] == "sort" and asked["scores_reference"]
    assert asked["metrics"]["completions/max_length"] == asked["completion_tokens"] == 2
    assert next(iter(asked["products"])) == "bfloat16"
    assert any("the reference takes" in text for text in asked["advice"])
    assert any("cut off at 2 tokens" in text for text in asked["advice"])


def test_a_slow_reward_is_called_and_is_found_out(benched, tmp_path):
    reward = tmp_path / "slow.py"
    reward.write_text("import time\ndef slow(completion):\n    time.sleep(0.02)\n    return 1.0\n")
    data, _ = benched("--reward", str(reward))
    assert data["metrics"]["time/reward"] > 8 * 0.02
    elsewhere, _ = benched("--reward", str(reward), "--reward-timeout", "20", seconds=0.001)
    assert elsewhere["isolated"] and elsewhere["metrics"]["time/reward"] > 0
    (text,) = [text for text in data["advice"] if text.startswith("rewards take")]
    assert "--reward-timeout" in text


def test_a_step_that_takes_all_the_time_is_the_measurement(benched):
    started = time.perf_counter()
    data, _ = benched(seconds=0.001)
    assert (data["steps"], data["warmed_up"], data["widths"]) == (1, False, {})
    assert time.perf_counter() - started < 10


def test_people_read_a_table_and_advice(capsys):
    assert main([*SMALL, "--seconds", "0.001"]) == 0
    text = capsys.readouterr().out
    for words in ("a step", "generation", "peak memory", "planned", "what to change\n- "):
        assert words in text


@pytest.mark.parametrize("options", [{}, {"timeout": 20.0}], ids=["here", "elsewhere"])
def test_every_group_has_signal_and_the_own_rewards_are_called(tmp_path, options):
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


def test_a_reference_that_an_algorithm_needs_is_no_option(benched):
    needed, _ = benched("--algorithm", "dpo", "--group-size", "2", seconds=0.001)
    assert not needed["scores_reference"]
    assert not any("reference" in text for text in needed["advice"])


def test_no_other_numbers_of_threads_are_tried_where_the_first_step_takes_all_the_time():
    steps = TimedSteps(0.5, [2, 1, 16], note=lambda text: None)
    metrics = {"time/step": 60.0, "memory/peak_gb": 1.0}
    report = StepReport(
        step=0, steps=9, metrics=metrics, groups=(), trained=trained(), advantages=[]
    )
    assert steps.see(report) is Progress.STOP
    assert steps.count == 1 and not steps.warmed_up and not steps.seconds_by_threads


def trained() -> list[RolloutGroup]:
    rollout = Rollout(
        tokens=[1, 2],
        mask=[False, True],
        logprobs=[0.0, -1.0],
        completion="x",
        reward=1.0,
        stop_reason=StopReason.LENGTH,
        sampling=Sampling(),
        version=0,
    )
    return [RolloutGroup(task=Task(id="a", prompt="p"), rollouts=[rollout])]


def test_without_a_number_out_of_the_ordinary_there_is_no_advice():
    assert advice_of(UNREMARKABLE) == []
    assert "- nothing that was measured" in shown(UNREMARKABLE, [])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blas": {"mlx": 5.0, "numpy": 150.0}}, ["scipy-openblas32", "5 GFLOP/s", "150"]),
        ({"threads": {2: 1.0, 1: 0.5}}, ["--threads 1", "0.500 s", "1.000 s with 2"]),
        ({"widths": {128: 1000.0, 256: 1500.0}}, ["1,500", "1,000", "--groups-per-step 32"]),
        ({"products": {"4-bit nf4": 3.0, "float32": 1.0}}, ["--dtype float32 and no --quantize"]),
        ({"metrics": STEP | {"time/reward": 0.3}}, ["rewards take 30%", "--reward-timeout"]),
        (
            {"metrics": STEP | {"time/reward": 0.3}, "isolated": True},
            ["rewards take 30%", "workers="],
        ),
        (
            {"metrics": STEP | {"time/score": 0.2}, "scores_reference": True},
            ["the reference takes 20%", "--beta"],
        ),
        (
            {"metrics": STEP | {"time/score": 0.2}, "scores_afresh": True},
            ["--old-logprobs fresh takes 20%"],
        ),
        (
            {"metrics": STEP | {"completions/clipped_ratio": 0.5}},
            ["50% of completions are cut off at 6 tokens"],
        ),
    ],
)
def test_an_advice_quotes_the_number_that_it_rests_on(changes, words):
    (text,) = advice_of(replace(UNREMARKABLE, **changes))
    assert all(word in text for word in words)


def test_other_number_formats_are_not_advised_while_the_blas_is_slow():
    slow = replace(
        UNREMARKABLE,
        blas={"mlx": 5.0, "numpy": 150.0},
        products={"float32": 2.0, "bfloat16": 1.0},
    )
    (text,) = advice_of(slow)
    assert "scipy-openblas32" in text


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
    "references and old scores": [
        *("--reference", "base", "--reward-kl", "0.1", "--old-logprobs", "fresh"),
        *("--average", "token_mean", "--ratio-level", "sequence", "--beta", "0.1", "--kl", "k2"),
        *("--weights", "truncate_tokens(cap=3),off_policy_mask"),
        *("--set", "rollout.group_size=2", "--on-reward-error", "skip"),
    ],
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_flags_mean_what_they_mean_to_train(flags):
    def config(command: str):
        return configured(TrainConfig(), build_parser(command).parse_args([command, *flags]))

    assert config("bench") == config("train") != TrainConfig()


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_what_train_can_do_can_be_timed(flags, benched):
    data, _ = benched(*flags, seconds=0.001)
    assert data["steps"] == 1 and sum(data["shares"].values()) == pytest.approx(1, abs=0.01)
    assert data["scores_reference"] is ("--reference" in flags)
    assert data["scores_afresh"] is ("--old-logprobs" in flags)
    assert ("4-bit affine" in data["products"]) is ("--quantize" in flags)


def test_a_run_that_was_written_down_is_timed_with_tasks_and_adapters_of_its_own(
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
    assert data["max_tokens"] == 3 and data["task"].startswith("rows")
    wrapped = ["--data", f"{tmp_path}/rows.jsonl", "--prompt", "Add: {prompt}"]
    longer, _ = benched(*asked, *wrapped, seconds=0.001)
    assert longer["prompt_tokens"] > data["prompt_tokens"]
    (tmp_path / "adapter.json").write_text('{"target_modules": ["q_proj"], "r": 8}')
    data, _ = benched("--adapter-config", f"{tmp_path}/adapter.json", seconds=0.001)
    assert data["steps"] == 1
