"""Checkpoints that are written while a run goes on hold the state of the moment of saving."""

from threading import Event

import mlx.core as mx
import pytest

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.algorithms import grpo
from textpolicy.environments import load
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.loop import train_rl
from textpolicy.training.background_saving import BackgroundSaver
from textpolicy.training.checkpoint import Checkpoint, Checkpoints
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer

SECONDS = 60


class HeldCheckpoints(Checkpoints):
    """Writes a checkpoint when `go` is set."""

    go: Event

    def freeze(self, checkpoint):
        write = super().freeze(checkpoint)

        def write_when_told():
            assert self.go.wait(SECONDS), "nothing went on while the checkpoint was written"
            write()

        return write_when_told


@pytest.fixture
def held(tmp_path):
    checkpoints = HeldCheckpoints(tmp_path / "checkpoints")
    checkpoints.go = Event()
    return checkpoints


def test_what_changes_after_the_call_is_not_in_the_file(held):
    facts = {"seen": [1]}
    arrays = {"weight": mx.ones(3)}
    with BackgroundSaver(held) as saver:
        saver.save(Checkpoint(step=1, arrays=arrays, facts=facts))
        facts["seen"].append(2)
        arrays["weight"] = arrays["weight"] * 2
        mx.eval(arrays)
        held.go.set()
    found = held.newest()
    assert found.facts == {"seen": [1]}
    assert found.arrays["weight"].tolist() == [1, 1, 1]


def test_the_next_step_samples_while_a_checkpoint_is_written_and_then_trains(load_tiny, held):
    model, tokenizer = load_tiny()
    AdapterContainer.from_model(model, AdapterConfig(rank=2))
    policy = create_policy(model, tokenizer, {"max_tokens": 4})
    options = grpo.compute_advantages, grpo.policy_loss, build_optimizer(1e-2)
    trainer = Trainer(model, *options)
    seen = []
    generate, train = policy.generate, trainer.train

    def generate_and_let_write(*args, **options):
        groups = generate(*args, **options)
        if trainer.version:
            held.go.set()
        return groups

    def train_and_look(groups):
        seen.append(sorted(path.stem for path in held.folder.glob("*.safetensors")))
        return train(groups)

    policy.generate, trainer.train = generate_and_let_write, train_and_look
    environment = load("add")
    train_rl(
        tasks=environment.stream(0),
        reward=environment.reward,
        policy=policy,
        trainer=trainer,
        steps=2,
        groups_per_step=2,
        group_size=4,
        checkpoints=held,
    )
    assert seen == [[], ["00000001"]]
    assert held.newest().step == 2


def test_a_failed_write_is_raised_by_the_next_call(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    saver = BackgroundSaver(Checkpoints(tmp_path / "checkpoints"))
    one = Checkpoint(step=1, arrays={"weight": mx.ones(3)}, facts={})
    saver.save(one)
    with pytest.raises(OSError):
        saver.save(one)


def test_an_error_of_the_run_is_not_hidden_and_the_file_is_whole(held):
    with pytest.raises(KeyError), BackgroundSaver(held) as saver:
        saver.save(Checkpoint(step=1, arrays={"weight": mx.ones(3)}, facts={}))
        held.go.set()
        raise KeyError
    assert held.newest().step == 1


def test_without_checkpoints_none_is_due():
    with BackgroundSaver(None) as saver:
        assert not saver.due(1, last=True)
        assert not saver.wait()
