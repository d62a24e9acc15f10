"""A run of supervised training may end at any instant and goes on to the same numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from tests.tiny import qwen3_model
from tests.training.sft.test_sft import texts
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.files.adapter_file import read_adapter_file
from textpolicy.adapters.files.tensor_file import write_tensors
from textpolicy.cli import main
from textpolicy.config import SFTConfig, TrainConfig, read_toml, to_toml
from textpolicy.errors import AdapterError, ConfigError, TrainingError
from textpolicy.training.checkpoint import Checkpoint, Checkpoints
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.sft import (
    BatchStream,
    SaveReport,
    SFTParameters,
    TrainReport,
    ValidationReport,
    train_sft,
)
from textpolicy.types import Progress

PARAMETERS = SFTParameters(
    iterations=9,
    batch_size=2,
    accumulation=2,
    steps_per_report=4,
    steps_per_eval=3,
    save_every=2,
    packing=True,
    max_length=24,
)


class Trial:
    """A model with adapters and dropout, and a run of this model that records its events."""

    def __init__(self, path, *, rank=2, rate=1e-2, warmup=3):
        self.parameters = replace(PARAMETERS, adapter_path=path)
        self.checkpoints = Checkpoints(path.parent / f"{path.stem}-checkpoints", every=2)
        self.model = qwen3_model()
        config = AdapterConfig(rank=rank, dropout=0.2)
        self.adapters = AdapterContainer.from_model(self.model, config)
        self.optimizer = build_optimizer(rate, schedule="cosine", warmup=warmup, updates=9)
        self.events = []

    def run(self, stop_at=None, *, resume=False, train=None, **changes):
        parameters = replace(self.parameters, **changes)

        def note(event):
            self.events.append(event)
            return Progress.STOP if len(self.events) == stop_at else Progress.MORE

        # The next process has none of the objects of this one.
        mx.random.seed(99 if resume else 7)
        return train_sft(
            self.model,
            train or texts(20),
            texts(6, seed=1),
            self.optimizer,
            parameters=parameters,
            checkpoints=self.checkpoints,
            resume=self.checkpoints.newest() if resume else None,
            on_progress=note,
        )

    @property
    def losses(self):
        """Return every loss by the kind of report and the iteration."""
        return {
            (type(e), e.iteration): e.loss for e in self.events if not isinstance(e, SaveReport)
        }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    trial = Trial(tmp_path_factory.mktemp("whole") / "a.safetensors")
    return trial, trial.run()


@pytest.mark.slow
def test_the_run_has_every_kind_of_event(whole):
    trial, result = whole
    kinds = [type(event) for event in trial.events]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        TrainReport: 3,  # after 4 and 8 updates, and of the last one
        ValidationReport: 4,  # 0, 3, 6, 9
        SaveReport: 5,  # 2, 4, 6, 8, 9
    }
    assert result.ended == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", range(1, 12))
def test_a_stop_at_any_event_leaves_a_valid_adapter_and_a_run_that_can_be_resumed(
    tmp_path, whole, stop_at
):
    uninterrupted, expected = whole
    path = tmp_path / "a.safetensors"
    first = Trial(path)
    stopped = first.run(stop_at)
    assert stopped.ended == "stopped" and len(first.events) == stop_at
    assert stopped.iteration == first.events[-1].iteration
    # The saved adapter is the adapter of the model.
    left = read_adapter_file(path)
    assert left.version == stopped.iteration
    for name, array in first.adapters.parameters().items():
        assert mx.array_equal(left.arrays[name], array), name

    second = Trial(path)
    assert second.run(resume=True) == expected
    losses = first.losses | second.losses
    assert losses == uninterrupted.losses
    for name, array in uninterrupted.adapters.parameters().items():
        assert mx.array_equal(second.adapters.parameters()[name], array), name
    assert second.adapters.version == 9


def test_the_best_adapters_are_kept_beside_the_last(whole):
    trial, result = whole
    best = read_adapter_file(trial.parameters.best_file)
    assert best.version == result.best_iteration
    validations = {e.loss: e.iteration for e in trial.events if isinstance(e, ValidationReport)}
    assert (result.best_loss, result.best_iteration) == min(validations.items())
    model = qwen3_model()
    AdapterContainer.from_directory(trial.parameters.best_file).load(model)


@pytest.mark.slow
def test_a_finished_run_continues_with_more_iterations(tmp_path, whole):
    trial = Trial(tmp_path / "a.safetensors")
    trial.run()
    again = Trial(tmp_path / "a.safetensors")
    assert again.run(resume=True, iterations=12).iteration == 12
    assert trial.checkpoints.newest().step == 12
    assert again.run(resume=True, iterations=12).iteration == 12


@pytest.mark.slow
def test_a_stream_continues_at_its_position(tmp_path):
    batches = [texts(2, seed=n) for n in range(9)]
    plain = {"packing": False, "accumulation": 1}
    one = Trial(tmp_path / "one.safetensors")
    one.run(train=BatchStream(batches), **plain)
    Trial(tmp_path / "two.safetensors").run(4, train=BatchStream(batches), **plain)
    two = Trial(tmp_path / "two.safetensors")
    two.run(resume=True, train=BatchStream(batches), **plain)
    for name, array in one.adapters.parameters().items():
        assert mx.array_equal(two.adapters.parameters()[name], array), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch_size: 2 before, 1 now"),
        ({"accumulation": 1}, "accumulation: 2 before, 1 now"),
        ({"seed": 3}, "seed: 0 before, 3 now"),
        ({"max_length": 30}, "row: 24 before, 30 now"),
        (
            {"train": texts(20, seed=4)},
            "data: the demonstrations differ, or their order does",
        ),
        ({"completed_iterations": 3}, "completed_iterations is 3, and .* saved after 0"),
    ],
)
def test_a_resume_with_other_data_or_settings_is_refused(tmp_path, changes, message):
    Trial(tmp_path / "a.safetensors").run(1)
    with pytest.raises((TrainingError, ConfigError), match=message):
        Trial(tmp_path / "a.safetensors").run(resume=True, **changes)


@pytest.mark.parametrize("other", ["rank", "optimizer"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, other):
    Trial(tmp_path / "a.safetensors").run(1)
    trial = Trial(tmp_path / "a.safetensors", rank=3 if other == "rank" else 2)
    if other == "optimizer":
        trial.optimizer = optim.SGD(0.1)
    before = trial.adapters.parameters()
    with pytest.raises(TrainingError, match="does not fit this model and optimizer"):
        trial.run(resume=True)
    assert all(array is before[name] for name, array in trial.adapters.parameters().items())


def test_a_checkpoint_of_another_kind_or_format_is_refused(tmp_path):
    trial = Trial(tmp_path / "a.safetensors")
    assert trial.checkpoints.newest() is None
    trial.checkpoints.save(Checkpoint(step=1, arrays={"a": mx.zeros(1)}, facts={"trainer": {}}))
    with pytest.raises(TrainingError, match="is of a run of reinforcement learning"):
        trial.run(resume=True)
    write_tensors(trial.checkpoints.folder / "00000001.safetensors", {"a": mx.zeros(1)}, {})
    with pytest.raises(TrainingError, match="is not a checkpoint of this release"):
        trial.run(resume=True)


def test_a_path_that_cannot_hold_adapters_is_refused_before_training(tmp_path):
    with pytest.raises(AdapterError, match=r"expected a name ending in \.safetensors"):
        Trial(tmp_path / "folder").run()
    plain = qwen3_model()
    parameters = replace(PARAMETERS, adapter_path=tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="the model has no adapters to save"):
        train_sft(plain, texts(4), [], optim.SGD(0.1), parameters=parameters)


def begin(folder, *options):
    """Run the command on a file of sums, and return the arguments that resume the run."""
    data = folder / "train.jsonl"
    pairs = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(8)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run = folder / "run"
    assert main(["sft", "--data", str(data), *options, "--output", str(run)]) == 0
    return run, ["sft", "--resume", str(run)]


@pytest.mark.slow
def test_options_that_the_checkpoint_refuses_do_not_change_the_run(tmp_path, capsys):
    folder, resume = begin(tmp_path, "--iterations", "2")
    config = (folder / "config.toml").read_text()
    assert main([*resume, "--batch-size", "2", "--force"]) == 2
    assert "batch_size: 4 before, 2 now" in capsys.readouterr().err
    assert (folder / "config.toml").read_text() == config
    assert main([*resume, "--iterations", "3", "--lr", "1e-3", "--force"]) == 0
    went_on = read_toml(folder / "config.toml", SFTConfig())
    assert (went_on.trainer.iterations, went_on.trainer.lr) == (3, 1e-3)


@pytest.mark.slow
def test_iterations_replace_epochs_in_a_forced_resume(tmp_path, capsys):
    folder, resume = begin(tmp_path, "--epochs", "1")
    assert main([*resume, "--iterations", "3"]) == 2
    told = capsys.readouterr().err
    assert "trainer.iterations: not given before, 3 now" in told
    assert "trainer.epochs: 1 before, not given now" in told
    assert "\nLeave out trainer.iterations, or add --force to resume with the new value" in told
    assert main([*resume, "--iterations", "3", "--force"]) == 0
    trainer = read_toml(folder / "config.toml", SFTConfig()).trainer
    assert (trainer.iterations, trainer.epochs) == (3, None)
    assert Checkpoints(folder / "checkpoints").newest().step == 3
    # A run may be made longer by the option that it was started with.
    assert main([*resume, "--iterations", "4"]) == 0


@pytest.mark.slow
def test_force_is_advised_only_where_it_helps(tmp_path, capsys):
    folder, resume = begin(tmp_path, "--iterations", "2")

    def told(*options):
        assert main([*resume, *options]) == 2
        return capsys.readouterr().err

    bound = told("--batch-size", "2", "--seed", "1")
    assert "is bound to trainer.batch_size and run.seed, and --force does not change that" in bound
    assert "add --force" not in bound
    assert "With another data.source, --force resumes only if the rows stay the same" in told(
        "--data", str(tmp_path / "other.jsonl")
    )
    both = told("--lr", "0.1", "--batch-size", "2")
    assert "is bound to trainer.batch_size, and" in both
    assert "Leave out trainer.lr, or add --force to resume with the new value" in both
    for checkpoint in (folder / "checkpoints").iterdir():
        checkpoint.unlink()
    assert "Leave out trainer.batch_size, or add --force" in told("--batch-size", "2")


@pytest.mark.slow
def test_the_error_about_a_run_of_another_command_names_that_command(tmp_path, capsys):
    folder, _ = begin(tmp_path, "--iterations", "1")
    assert main(["train", "--resume", str(folder)]) == 2
    told = capsys.readouterr().err
    assert f"Resume it with: textpolicy sft --resume {folder}" in told
    assert "is not a setting" not in told
    (folder / "config.toml").write_text(to_toml(TrainConfig()))
    assert main(["sft", "--resume", str(folder)]) == 2
    told = capsys.readouterr().err
    assert f"Resume it with: textpolicy train --resume {folder}" in told
    assert "is not a setting" not in told


def test_a_run_that_diverges_keeps_the_files_that_it_saved_before(tmp_path):
    trial = Trial(tmp_path / "a.safetensors", rate=1e-2)
    trial.run(iterations=2)
    file = trial.parameters.adapter_file
    (checkpoint,) = trial.checkpoints.folder.iterdir()
    saved = file.read_bytes(), checkpoint.read_bytes()
    again = Trial(tmp_path / "a.safetensors", rate=1e30, warmup=0)
    with pytest.raises(TrainingError, match=r"is (nan|inf) after \d iterations. Lower the"):
        again.run(resume=True, save_every=100, steps_per_report=100, steps_per_eval=100)
    assert (file.read_bytes(), checkpoint.read_bytes()) == saved
    arrays = read_adapter_file(file).arrays.values()
    assert all(mx.isfinite(array).all() for array in arrays)


# A real process, killed


def rows(folder, name):
    """Return the losses of a run's metrics file by step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [(row["step"], row[name]) for row in found if name in row]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_losses(tmp_path):
    data = tmp_path / "train.jsonl"
    pairs = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(40)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = [
        *(
            sys.executable,
            "-c",
            "from textpolicy.cli.main import main; exit(main())",
            "sft",
            "--data",
            str(data),
            "--dropout",
            "0.1",
        ),
        *("--iterations", "60", "--steps-per-report", "2", "--eval-every", "10"),
        *("--checkpoint-every", "7", "--schedule", "cosine", "--warmup", "5", "--lr", "1e-3"),
    ]

    def run(folder, *more):
        return [*command, "--output", str(folder), *more]

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(run(tmp_path / "whole"), check=True, **quiet)
    killed = tmp_path / "killed"
    process = subprocess.Popen(run(killed), **quiet)
    metrics, deadline = killed / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 12):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert Checkpoints(killed / "checkpoints").newest().step < 60
    # A line that the kill left unfinished is not a row.
    metrics.write_text(metrics.read_text() + '{"step": 1')
    subprocess.run([*command[:4], "--resume", str(killed)], check=True, **quiet)
    for name in ("loss", "validation/loss"):
        assert rows(killed, name) == rows(tmp_path / "whole", name), name
    last = [
        read_adapter_file(tmp_path / run / "adapters" / "latest.safetensors")
        for run in ("whole", "killed")
    ]
    assert all(mx.array_equal(a, last[1].arrays[name]) for name, a in last[0].arrays.items())
