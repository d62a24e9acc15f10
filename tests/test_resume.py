"""A run that was stopped and resumed computes the numbers of an uninterrupted run."""

import json
from itertools import count

import mlx.core as mx
import pytest

from textpolicy.adapters import AdapterConfig, AdapterContainer, shared_copy
from textpolicy.algorithms import grpo
from textpolicy.environments import load
from textpolicy.environments.curriculum import MixedTaskCurriculum
from textpolicy.errors import RewardError, TrainingError
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.loop import train_rl
from textpolicy.rewards import Rewards
from textpolicy.training.checkpoint import Checkpoints
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer
from textpolicy.types import Progress, Task

STEPS = 6
MODES = {
    "on policy": {},
    "gradient accumulation": {"micro_batch_size": 3},
    "several updates a batch": {"mini_batches": 3, "epochs": 2},
    "several steps a generation": {"steps_per_generation": 3},
    "merged adapters": {"merge_adapters": True},
}


class Run:
    """A run of a few steps in a folder; `rows` are its metrics without times and memory."""

    def __init__(self, load_tiny, folder, *, rank=2, **options):
        model, tokenizer = load_tiny()
        self.adapters = AdapterContainer.from_model(model, AdapterConfig(rank=rank), seed=1)
        self.adapters.publish_path = folder / "adapters.safetensors"
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.per_generation = options.pop("steps_per_generation", 1)
        sampling = {"max_tokens": 4, "merge_adapters": options.pop("merge_adapters", False)}
        self.policy = create_policy(shared_copy(model), tokenizer, sampling)
        self.trainer = Trainer(
            model,
            grpo.compute_advantages,
            grpo.policy_loss,
            build_optimizer(1e-2, schedule="cosine", warmup=2, updates=40),
            seed=5,
            **options,
        )
        self.rows, self.times = {}, {}

    def train(self, *, until=STEPS, tasks=None, resume=None, reward=None):
        environment = load("add")

        def record(report):
            timed = ("time/", "memory/", "tokens_per_second")
            row = {n: v for n, v in report.metrics.items() if not n.startswith(timed)}
            self.rows[report.step] = row
            self.times[report.step] = {
                n: v for n, v in report.metrics.items() if n.startswith("time/")
            }
            return Progress.STOP if report.step + 1 == until else Progress.MORE

        train_rl(
            tasks=tasks or environment.stream(0),
            reward=reward or environment.reward,
            policy=self.policy,
            trainer=self.trainer,
            steps=STEPS,
            groups_per_step=4,
            group_size=4,
            steps_per_generation=self.per_generation,
            seed=3,
            on_step=record,
            checkpoints=self.checkpoints,
            resume=resume,
        )
        return self

    def weights(self):
        return self.adapters.parameters()


def same(one, other):
    return one.keys() == other.keys() and all(mx.array_equal(one[n], other[n]) for n in one)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("until", [2, 5])
def test_a_resumed_run_computes_the_same_numbers(load_tiny, tmp_path, mode, until):
    straight = Run(load_tiny, tmp_path / "straight", **MODES[mode]).train()
    stopped = Run(load_tiny, tmp_path / "stopped", **MODES[mode]).train(until=until)
    mx.random.seed(99)
    resumed = Run(load_tiny, tmp_path / "stopped", **MODES[mode])
    resumed.train(resume=resumed.checkpoints.newest())
    assert stopped.rows | resumed.rows == straight.rows
    assert min(resumed.rows) == until
    assert resumed.trainer.version == straight.trainer.version
    assert same(resumed.weights(), straight.weights())
    # The comparison must be able to fail.
    assert not same(resumed.weights(), stopped.weights())


@pytest.mark.slow
def test_rollouts_of_several_steps_are_sampled_at_once_and_trained_on_in_turn(load_tiny, tmp_path):
    run = Run(load_tiny, tmp_path, steps_per_generation=3).train()
    assert [step for step, row in run.rows.items() if "reward" in row] == [0, 3]
    assert run.rows[0]["refill/rounds"] == 1
    # The rollouts of the second and third step of a generation are stale by one and two versions.
    moved = [row["sampling/sampling_logp_difference/mean"] for row in run.rows.values()]
    assert max(moved[0], moved[3]) < 1e-4
    assert min(moved[1], moved[2], moved[4], moved[5]) > 1e-3


@pytest.mark.slow
def test_reward_failures_before_a_checkpoint_count_after_the_resume(load_tiny, tmp_path):
    calls = count()

    def fails_at_times(completion):
        if next(calls) % 16 < 3:
            raise ValueError("again")
        return len(completion) / 4

    # Three of the sixteen samples of a step fail: after four steps, twelve failures are more than a
    # tenth of the samples that the limit looks at.
    rewards = Rewards(fails_at_times, on_error="skip", max_error_rate=0.1)
    with pytest.raises(RewardError, match="11 of the last"):
        Run(load_tiny, tmp_path / "straight").train(reward=rewards)
    calls = count()
    Run(load_tiny, tmp_path / "stopped").train(reward=rewards, until=2)
    resumed = Run(load_tiny, tmp_path / "stopped")
    with pytest.raises(RewardError, match="11 of the last"):
        resumed.train(reward=rewards, resume=resumed.checkpoints.newest())
    assert max(resumed.rows) == 2


@pytest.mark.slow
def test_the_time_to_save_a_checkpoint_is_part_of_the_next_step(load_tiny, tmp_path):
    run = Run(load_tiny, tmp_path)
    run.checkpoints.every = 2
    run.train()
    saved = [step for step, times in run.times.items() if "time/checkpoint" in times]
    assert saved == [2, 4]
    for times in run.times.values():
        laps = ("checkpoint", "generate", "reward", "train", "reload")
        parts = [times.get(f"time/{name}", 0) for name in laps]
        assert all(seconds >= 0 for seconds in parts)
        assert sum(parts) == pytest.approx(times["time/step"])
    resumed = Run(load_tiny, tmp_path).train(resume=run.checkpoints.newest())
    assert not resumed.times


@pytest.mark.slow
def test_adapters_published_after_the_checkpoint_are_replaced_on_resume(load_tiny, tmp_path):
    run = Run(load_tiny, tmp_path).train(until=3)
    before = run.checkpoints.newest()
    run.trainer.adapters.advance()
    run.trainer.adapters.publish()
    resumed = Run(load_tiny, tmp_path)
    resumed.train(resume=before, until=4)
    assert resumed.policy.version == resumed.trainer.version == 4


@pytest.mark.slow
def test_a_curriculum_is_resumed_too(load_tiny, tmp_path):
    def tasks():
        return MixedTaskCurriculum(load("add").stream(0), share=0.5, seed=2)

    straight = Run(load_tiny, tmp_path / "straight").train(tasks=tasks())
    Run(load_tiny, tmp_path / "stopped").train(tasks=tasks(), until=3)
    resumed = Run(load_tiny, tmp_path / "stopped")
    resumed.train(tasks=tasks(), resume=resumed.checkpoints.newest())
    assert same(resumed.weights(), straight.weights())


class CurriculumWithoutState:
    """A curriculum without the methods state() and restore()."""

    def __init__(self):
        self.numbers = count()

    def __iter__(self):
        return self

    def __next__(self):
        return Task(id=str(number := next(self.numbers)), prompt="1+1=", example={"sum": number})

    def observe(self, groups):
        return


def test_a_curriculum_without_a_state_is_an_error_in_a_run_with_checkpoints(load_tiny, tmp_path):
    with pytest.raises(
        TrainingError, match="CurriculumWithoutState cannot be saved in a checkpoint"
    ):
        Run(load_tiny, tmp_path).train(tasks=CurriculumWithoutState())


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(load_tiny, tmp_path):
    checkpoint = Run(load_tiny, tmp_path).train(until=1).checkpoints.newest()
    other = Run(load_tiny, tmp_path / "other", rank=3)
    before = other.weights()
    with pytest.raises(TrainingError, match=r"lora_a.m: shape"):
        other.train(resume=checkpoint)
    assert same(other.weights(), before)


@pytest.mark.slow
def test_a_checkpoint_of_another_base_is_refused(load_tiny, tmp_path):
    checkpoint = Run(load_tiny, tmp_path).train(until=1).checkpoints.newest()
    checkpoint.facts["trainer"]["base"] = "another"
    with pytest.raises(TrainingError, match="fingerprint another"):
        Run(load_tiny, tmp_path / "other").train(resume=checkpoint)


@pytest.mark.slow
def test_a_run_resumes_from_a_state_before_its_first_update(load_tiny, tmp_path):
    fresh = Run(load_tiny, tmp_path / "fresh")
    trainer, state = fresh.trainer, fresh.trainer.state()
    straight = fresh.train()
    resumed = Run(load_tiny, tmp_path / "resumed")
    resumed.trainer.restore(*state)
    assert same(resumed.train().weights(), straight.weights())
    assert trainer.version > 0


@pytest.mark.slow
def test_json_can_hold_the_facts_of_a_checkpoint(load_tiny, tmp_path):
    run = Run(load_tiny, tmp_path, steps_per_generation=3).train(until=2)
    facts = run.checkpoints.newest().facts
    assert json.loads(json.dumps(facts)) == facts
    assert len(facts["buffer"]["groups"]) == 12 - 2 * 4
