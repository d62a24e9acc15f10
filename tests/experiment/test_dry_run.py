"""A dry run: what a run would be and what it would take, and nothing started."""

import gc
import json
import re
import shutil
from dataclasses import asdict

import mlx.core as mx
import pytest

from tests.bases import arrays
from tests.tiny import expert_model
from textpolicy.cli import main
from textpolicy.config import SFTConfig, TrainConfig, changed, read_toml


@pytest.fixture
def planned(capsys):
    """A function from a command line to what its dry run says, to people and to machines."""

    def run(*argv: str) -> tuple[str, dict]:
        capsys.readouterr()
        # Models of earlier tests, freed during a measured step, would lower its peak.
        gc.collect()
        assert main([*argv, "--dry-run"]) == 0
        text = capsys.readouterr().out
        assert main([*argv, "--dry-run", "--json"]) == 0
        return text, json.loads(capsys.readouterr().out)

    return run


ARGV = ["train", "--env", "add", "--lr", "1e-4", "--rank", "4"]


def settings_in(text: str) -> str:
    """Return the settings that a dry run has printed, as TOML."""
    settings = text.partition("shows all:\n\n")[2] or text[text.index("\n\n# The tasks") :]
    return settings.removesuffix("no run was started\n")


@pytest.mark.parametrize("flags", [(), ("--all-settings",)])
def test_it_prints_a_config_that_can_be_given_back(flags, capsys, tmp_path):
    assert main([*ARGV, "--output", str(tmp_path / "run"), "--dry-run", *flags]) == 0
    toml = settings_in(capsys.readouterr().out)
    (tmp_path / "again.toml").write_text(toml)
    assert ("group_size" in toml) == bool(flags)
    values = {"task.env": "add", "trainer.lr": 1e-4, "adapter.rank": 4}
    values["run.output"] = tmp_path / "run"
    assert read_toml(tmp_path / "again.toml", TrainConfig()) == changed(TrainConfig(), values)


@pytest.mark.slow
def test_it_starts_nothing_and_reads_no_weight(planned, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    model = str(tmp_path / "model")
    text, _ = planned(*ARGV, "--model", model, "--output", str(tmp_path / "run"))
    assert "no run was started" in text and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_measured_step_corrects_the_estimate_and_leaves_nothing(planned, tmp_path):
    output = tmp_path / "run"
    argv = [*ARGV, "--group-size", "4", "--groups-per-step", "4", "--output", str(output)]
    _, estimate = planned(*argv)
    text, data = planned(*argv, "--measure")
    measured = data["measured"]
    assert measured["prompt_tokens"] <= data["prompt_tokens"]
    assert measured["completion_tokens"] <= data["completion_tokens"]
    for name, key in (("sampling", "generation"), ("training", "training")):
        factor = measured["bytes"][name] / measured["estimated"][name]
        assert factor == pytest.approx(1, rel=0.2)
        corrected, plain = (one[f"estimated_{key}_bytes"] for one in (data, estimate))
        assert corrected == pytest.approx(factor * plain, rel=1e-6)
        assert 2**20 < measured["bytes"][name] < 2**27
    assert "as measured" in text and "no run was started" in text
    assert not output.exists()


@pytest.mark.slow
def test_the_memory_of_a_model_that_cannot_be_planned_is_measured(planned, tiny, tmp_path):
    model, folder = expert_model(vocab_size=320), tmp_path / "model"
    shutil.copytree(tiny, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays(model))
    (folder / "config.json").write_text(json.dumps(asdict(model.args)))
    text, data = planned(*ARGV, "--measure", "--model", str(folder), "--max-tokens", "4")
    assert "not known" in text and "estimated_training_bytes" not in data
    assert data["measured"]["bytes"]["training"] > sum(a.nbytes for a in arrays(model).values())


def test_it_says_first_what_the_run_takes_and_then_what_differs_from_the_defaults(
    capsys, monkeypatch
):
    monkeypatch.setattr("os.getloadavg", lambda: (100.0, 0.0, 0.0))
    assert main([*ARGV, "--dry-run"]) == 0
    estimate, title, *settings = capsys.readouterr().out.split("\n\n")
    names = [line.split("  ")[0] for line in estimate.splitlines()]
    assert names[:5] == ["time", "sampling", "training", "machine", "disk"]
    assert re.search(r"^time .*by an estimate\. The machine is busy now", estimate)
    assert re.search(r"^asked +\d+\+\d+= \(a held-out prompt\)$", estimate, re.MULTILINE)
    assert "--all-settings shows all" in title
    assert settings == [
        '[task]\nenv = "add"',
        "[adapter]\nrank = 4",
        "[trainer]\nlr = 0.0001",
        "no run was started\n",
    ]


def test_a_rate_far_below_the_default_is_said_after_the_time(capsys):
    assert main(["train", "--env", "add", "--lr", "1e-5", "--dry-run"]) == 0
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:2] == ["time", "rate"]


@pytest.mark.parametrize("command", ["train", "sft"])
def test_all_settings_are_shown_by_a_dry_run_only(command, capsys):
    assert main([command, "--all-settings"]) == 2
    assert "Type --dry-run --all-settings" in capsys.readouterr().err


def test_measuring_goes_with_a_dry_run(capsys):
    assert main([*ARGV, "--measure"]) == 2
    assert "Type --dry-run --measure" in capsys.readouterr().err


@pytest.mark.slow
def test_the_memory_grows_with_what_makes_it_grow(capsys):
    def training(*more: str) -> int:
        assert main([*ARGV, *more, "--dry-run", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["estimated_training_bytes"]

    usual = training()
    assert training("--micro-batch-size", "128") > training("--micro-batch-size", "8")
    assert training("--checkpoint-gradients", "--micro-batch-size", "128") < training(
        "--micro-batch-size", "128"
    )
    assert training("--quantize", "4") < usual < training("--max-tokens", "200")


@pytest.mark.slow
def test_a_teacher_s_weights_are_in_the_plan(planned, tiny):
    _, alone = planned(*ARGV)
    text, taught = planned(*ARGV, "--algorithm", "distillation", "--reference", "tiny")
    stored = mx.load(str(tiny / "model.safetensors")).values()
    weights = sum(array.size * mx.float32.size for array in stored)
    for peak in ("estimated_training_bytes", "estimated_generation_bytes"):
        assert taught[peak] - alone[peak] == weights
    assert "\nreference  " in text


@pytest.mark.slow
def test_of_several_turns_it_says_that_they_are_not_planned(planned):
    words = "several are not planned"
    assert words in planned("train", "--env", "hilo")[0]
    assert words not in planned(*ARGV)[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--algorithm", "grop"], "Did you mean 'grpo'?"),
        (["--set", "algorithm.options.clip_hgih=0.3"], "Did you mean 'clip_high'?"),
    ],
)
def test_what_the_run_would_refuse_it_refuses_too(argv, words, capsys):
    assert main([*ARGV, *argv, "--dry-run"]) == 2
    assert words in capsys.readouterr().err


def test_a_dropout_is_refused_by_the_dry_run_and_by_a_run_that_leaves_no_folder(tmp_path, capsys):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "lora_dropout": 0.05}
    peft = tmp_path / "adapter_config.json"
    peft.write_text(json.dumps(config))
    run = ["train", "--env", "add", "--output", str(tmp_path / "run")]
    for argv, where in (
        (["--dropout", "0.05"], "adapter.dropout (--dropout)"),
        (["--adapter-config", str(peft)], str(peft)),
    ):
        for dry in (["--dry-run"], []):
            assert main([*run, *argv, *dry]) == 2
            message = " ".join(capsys.readouterr().err.split())
            assert f"the adapter dropout is 0.05, from {where}" in message
            assert "Remove the dropout" in message and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_supervised_run_shows_its_settings(planned, tmp_path):
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--data", str(tmp_path / "rows.jsonl")]
    text, data = planned("sft", *data, "--output", str(tmp_path / "run"), "--lr", "1e-3")
    (tmp_path / "again.toml").write_text(settings_in(text))
    assert read_toml(tmp_path / "again.toml", SFTConfig()).trainer.lr == 1e-3
    assert data["config"]["trainer.lr"] == 1e-3 and not (tmp_path / "run").exists()
