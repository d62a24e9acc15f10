"""Checkpoint files: exact, checked for damage, and the newest undamaged file is found."""

import json
import os
import random

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from textpolicy.errors import AdapterError, ConfigError, TrainingError
from textpolicy.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    random_state,
    random_states,
    read_checkpoint,
    restore_random_state,
    restore_random_states,
    restore_training_tensors,
    tensors_of,
    training_tensors,
    write_checkpoint,
)


def checkpoint(step: int) -> Checkpoint:
    arrays = {
        "half": mx.arange(6).astype(mx.bfloat16).reshape(2, 3) + step,
        "one": mx.array(step, mx.uint64),
        "none": mx.zeros((0, 4)),
    }
    return Checkpoint(step=step, arrays=arrays, facts={"random": [1, 2], "name": "é"})


def test_a_checkpoint_is_read_back_bit_for_bit(tmp_path):
    write_checkpoint(tmp_path / "a.safetensors", 3, tensors_of(checkpoint(3)))
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert (found.step, found.facts) == (3, {"random": [1, 2], "name": "é"})
    for name, array in checkpoint(3).arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert mx.array_equal(found.arrays[name], array)


@pytest.mark.proves("F3")
def test_a_changed_byte_is_noticed_wherever_it_changes_the_content(tmp_path, attempts):
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, 3, tensors_of(checkpoint(3)))
    data = path.read_bytes()
    refused = 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            found = read_checkpoint(path)
        except (AdapterError, TrainingError):
            refused += 1
        else:
            assert (found.step, found.facts) == (3, checkpoint(3).facts)
            assert all(mx.array_equal(found.arrays[n], a) for n, a in checkpoint(3).arrays.items())
    assert refused > len(data) - 20
    attempts(len(data))


def test_only_the_last_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (8, 9, 10):
        checkpoints.save(checkpoint(step))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "00000009.safetensors",
        "00000010.safetensors",
    ]
    assert checkpoints.newest().step == 10


@pytest.mark.proves("F3")
def test_only_damaged_checkpoints_are_an_error_and_an_empty_folder_is_none(tmp_path, attempts):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    checkpoints.save(checkpoint(1)).write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"every checkpoint in .* is damaged"):
        checkpoints.newest()
    attempts.add()


def test_saving_after_a_resume_from_an_earlier_step_removes_later_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (4, 5):
        checkpoints.save(checkpoint(step))
    checkpoints.save(checkpoint(4))
    assert checkpoints.newest().step == 4


def test_partial_files_of_a_killed_process_are_removed_at_the_next_save(tmp_path):
    partial = tmp_path / ".00000001.99999999-abcd1234.partial.safetensors"
    ours = tmp_path / ".gitignore"
    for path in (partial, ours):
        path.write_text("")
    Checkpoints(tmp_path).save(checkpoint(1))
    assert not partial.exists()
    assert ours.exists()


@pytest.mark.slow
def test_facts_may_be_larger_than_the_largest_header_that_mlx_reads(tmp_path):
    facts = {"rollouts": "x" * 100_000_001}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Checkpoint(step=1, arrays={"a": mx.zeros(1)}, facts=facts))
    assert checkpoints.newest().facts == facts


def test_facts_that_json_cannot_hold_are_an_error_that_names_their_source(tmp_path):
    facts = {"tasks": {"seen": {1, 2}}}
    with pytest.raises(
        TrainingError, match=r"after step 7: .*set .*\. The state\(\) of a curriculum"
    ):
        Checkpoints(tmp_path).save(Checkpoint(step=7, arrays={"a": mx.zeros(1)}, facts=facts))


class Weight(nn.Module):
    """A model of one weight in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.a = mx.zeros(1, mx.bfloat16)


def test_tensors_of_another_type_do_not_fit():
    with pytest.raises(
        TrainingError, match=r"weights\.a: mlx\.core\.float32, here mlx\.core\.bfloat16"
    ):
        restore_training_tensors({"weights.a": mx.zeros(1)}, Weight(), optim.SGD(0.1))


@pytest.mark.parametrize("option", ["keep", "every"])
def test_invalid_numbers_of_checkpoints_are_refused(tmp_path, option):
    with pytest.raises(ConfigError, match=f"{option} is 0; expected"):
        Checkpoints(tmp_path, **{option: 0})


def test_random_numbers_continue_from_a_restored_state():
    mx.random.seed((123 << 32) | 77)
    mx.random.normal((3,))
    state = random_state()
    expected = mx.random.normal((5,))
    mx.random.seed(0)
    restore_random_state(state)
    assert mx.array_equal(mx.random.normal((5,)), expected)


def test_facts_may_be_infinite(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    facts = {"best": float("-inf"), "metrics": [float("inf"), 1e308]}
    checkpoints.save(Checkpoint(step=1, arrays={"a": mx.zeros(1)}, facts=facts))
    assert checkpoints.newest().facts == facts


def test_random_numbers_of_python_and_numpy_are_restored():
    states = json.loads(json.dumps(random_states()))
    drawn = []
    for _ in range(2):
        restore_random_states(states)
        drawn.append((random.random(), random.gauss(0, 1), np.random.random(), np.random.normal()))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_restored_optimizer_keeps_its_own_learning_rate(scheduled):
    def trained(rate):
        model = nn.Linear(2, 2)
        given = optim.linear_schedule(rate, 0.0, 100) if scheduled else rate
        return model, optim.AdamW(given)

    model, optimizer = trained(0.1)
    gradient = {"weight": mx.ones((2, 2)), "bias": mx.ones(2)}
    optimizer.update(model, gradient)
    saved = training_tensors(model, optimizer)
    other, resumed = trained(0.5)
    restore_training_tensors(saved, other, resumed)
    before = other.weight
    resumed.update(other, gradient)
    mx.eval(other.parameters())
    expected = 0.5 * 0.99 if scheduled else 0.5
    assert float(resumed.learning_rate) == pytest.approx(expected)
    assert float(mx.abs(before - other.weight).max()) > 0.3


def test_the_rows_of_a_run_are_on_the_disk_before_its_checkpoint(tmp_path, monkeypatch):
    flushed, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (flushed.append(os.fstat(file).st_ino), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (flushed.append("named"), replace(*paths)))
    rows = tmp_path / "metrics.jsonl"
    rows.write_text("{}\n")
    checkpoints = Checkpoints(tmp_path / "checkpoints", after=[rows, tmp_path / "missing.jsonl"])
    checkpoints.save(checkpoint(1))
    assert flushed.index(rows.stat().st_ino) < flushed.index("named")
