"""Alarms go off in runs that collapse and in no other run; the best adapter is kept."""

import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

import mlx.core as mx
import pytest

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.adapters.files.adapter_file import read_adapter_file
from textpolicy.cli import main
from textpolicy.cli.commands.train import describe_result
from textpolicy.config import TrainConfig, changed
from textpolicy.config.train import ModelOptions
from textpolicy.experiment import Measurement, RunResult
from textpolicy.experiment.model_defaults import default_rate_of, with_model_defaults
from textpolicy.machine import MemoryPressure, memory_bytes
from textpolicy.runs import RunDirectory
from textpolicy.tracking.alarm_advice import LearningSettings
from textpolicy.tracking.alarms import ALARM_METRICS, AlarmMonitor
from textpolicy.tracking.best import BestAdapter
from textpolicy.tracking.machine_signs import low_disk, low_memory

RECORDED = Path(__file__).parents[1] / "golden" / "collapse"
# The step by which each collapse must set off an alarm. A high learning rate ruins a policy at
# once, and rewards given to the wrong rollouts ruin it slowly.
NOTICED = {
    "hot_full_add": 20,
    "hot_full_countdown": 20,
    "hot_lora_add": 20,
    "hot_lora_sort": 20,
    "long_add": 60,
    "shuffled_reverse": 60,
}
HEALTHY = ["healthy_add", "healthy_add_1", "healthy_countdown", "healthy_reverse", "healthy_sort"]
STEADY = {
    "reward": 0.5,
    "reward_std": 0.4,
    "entropy": 0.4,
    "frac_reward_zero_std": 0.2,
    "completions/mean_length": 5.0,
    "completions/clipped_ratio": 0.0,
}


def alarms(steps):
    monitor = AlarmMonitor()
    return [alarm for step, metrics in enumerate(steps) for alarm in monitor.check(step, metrics)]


def recorded(name):
    columns = json.loads((RECORDED / f"{name}.json").read_text())["columns"]
    assert tuple(columns) == ALARM_METRICS
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def turning(steady=10, **changes):
    """A steady run, then 20 steps with these changes. `__` in a name stands for `/`."""
    changed = {name.replace("__", "/"): value for name, value in changes.items()}
    return [STEADY] * steady + [STEADY | changed] * 20


def names(steps):
    return {alarm.name for alarm in alarms(steps)}


def test_every_recorded_run_is_tested():
    assert {path.stem for path in RECORDED.glob("*.json")} == {*NOTICED, *HEALTHY}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_alarm_goes_off_in_a_healthy_run(name):
    steps = recorded(name)
    assert len(steps) >= 100
    assert alarms(steps) == []


@pytest.mark.parametrize(("name", "latest"), NOTICED.items())
def test_a_collapse_sets_off_an_alarm_in_time(name, latest):
    first = alarms(recorded(name))[0]
    assert first.step <= latest


def test_each_alarm_goes_off_in_some_recorded_collapse():
    found = {alarm.name for name in NOTICED for alarm in alarms(recorded(name))}
    assert found == {"entropy", "length", "zero_std", "reward"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"entropy": 1.0}, {"entropy"}),
        ({"entropy": 0.01, "reward": 0.45}, {"entropy"}),
        ({"completions__clipped_ratio": 0.9}, {"length"}),
        ({"completions__mean_length": 12.0, "reward": 0.45}, {"length"}),
        ({"completions__mean_length": 2.0, "reward": 0.45}, {"length"}),
        ({"frac_reward_zero_std": 1.0, "reward": 0.45}, {"zero_std"}),
        ({"reward": 0.2}, {"reward"}),
    ],
)
def test_each_sign_sets_off_its_own_alarm(changes, expected):
    assert names(turning(**changes)) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": 1.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0, "entropy": 0.001},
        {"reward": 0.6, "completions__mean_length": 20.0},
        {"reward": 0.45},
    ],
    ids=["a solved task", "longer and better", "a little less"],
)
def test_progress_and_small_losses_are_no_collapse(changes):
    assert names(turning(**changes)) == set()


def test_a_reward_that_varies_with_the_tasks_has_not_fallen():
    def steps(*rewards):
        return [STEADY | {"reward_std": 0.001, "reward": reward} for reward in rewards]

    assert names(steps(*[0.5, 0.6] * 40)) == set()
    assert names(steps(*[0.6] * 20, *[0.5] * 20)) == {"reward"}


def sampled(chances, groups, size, seed):
    """Yield steps of tasks of which half can be solved, each sample with its step's chance."""
    rng = random.Random(seed)
    for chance in chances:
        rewards = [
            [float(rng.random() < solvable) for _ in range(size)]
            for solvable in (rng.choice((0.0, chance)) for _ in range(groups))
        ]
        yield STEADY | {
            "reward": fmean(map(fmean, rewards)),
            "reward_std": fmean(map(pstdev, rewards)),
            "frac_reward_zero_std": fmean(len(set(one)) == 1 for one in rewards),
        }


def first_alarm(steps, groups):
    monitor = AlarmMonitor(settings=LearningSettings(groups_per_step=groups))
    return next((step for step, one in enumerate(steps) if monitor.check(step, one)), None)


@pytest.mark.parametrize(("groups", "size"), [(1, 4), (2, 4), (4, 8)])
def test_the_noise_of_few_groups_is_no_fall_and_a_fall_is_still_noticed(groups, size):
    for seed in range(15):
        steady = sampled([0.6] * 80, groups, size, seed)
        assert first_alarm(steady, groups) is None
    falls = [sampled([0.9] * 100 + [0.0] * 120, groups, size, seed) for seed in range(5)]
    assert all(100 <= (first_alarm(steps, groups) or 0) < 220 for steps in falls)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "Lower the learning rate. Add a KL divergence (--beta). Check"),
        (
            {"lr": 1e-2, "default_lr": 5e-4, "beta": 0.0},
            "Lower the learning rate: it is 0.01, and the default for this model is 0.0005. Add a",
        ),
        (
            {"lr": 3e-4, "default_lr": 3e-4, "beta": 0.04},
            "Lower the learning rate, for example by --lr 0.0001. Raise the weight of the KL "
            "divergence (--beta, now 0.04)",
        ),
        (
            {"lr": 1e-5, "default_lr": 3e-4, "groups_per_step": 8},
            "The learning rate is 1e-05, far below the default of 0.0003 for this model, so "
            "another cause is more likely. Sample more groups a step (--groups-per-step, now 8)",
        ),
    ],
)
def test_the_advice_of_an_alarm_fits_the_settings(settings, advice):
    monitor = AlarmMonitor(settings=LearningSettings(**settings))
    steps = enumerate(turning(reward=0.1))
    (alarm,) = [alarm for step, one in steps for alarm in monitor.check(step, one)]
    assert alarm.advice.startswith(advice)
    assert alarm.advice.endswith("Check that each reward belongs to its completion")


def test_the_default_rate_of_a_model_is_the_one_that_a_run_takes(tiny):
    assert default_rate_of(ModelOptions(name="tiny")) == TrainConfig().trainer.lr
    config = changed(TrainConfig(), {"model.name": str(tiny)})
    assert default_rate_of(config.model) == with_model_defaults(config).trainer.lr


def test_an_alarm_is_reported_once_and_its_metric_is_1_while_the_sign_is_present():
    monitor, told, metric = AlarmMonitor(), [], []
    for step, metrics in enumerate([*turning(entropy=1.0), *[STEADY] * 10, *turning(entropy=1.0)]):
        told += [alarm.step for alarm in monitor.check(step, metrics)]
        metric.append(monitor.metrics()["alarm/entropy"])
    assert told == [metric.index(1.0)]
    assert metric[29] == 1 and metric[39] == 0 and metric[-1] == 1


def test_steps_without_rewards_are_ignored():
    assert alarms([{"entropy": 9.0}, *turning(), {"entropy": 9.0}]) == []


def test_an_alarm_says_what_was_found_what_was_expected_and_what_to_do():
    (alarm,) = alarms(turning(reward=0.1))
    assert alarm.name == "reward"
    assert str(alarm) == (
        f"alarm at step {alarm.step + 1}: reward: {alarm.got}; expected {alarm.expected}. "
        f"{alarm.advice}"
    )
    assert "from 0.500 at its best" in alarm.got and "learning rate" in alarm.advice


def test_the_best_adapter_is_the_one_that_sampled_the_best_steps(load_tiny, tmp_path):
    model, _ = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=2))
    best = BestAdapter(container, tmp_path / "best.safetensors", window=2)
    sampled = {}
    for reward in (0.4, 0.5, 0.7, 0.1, 0.0):
        sampled[container.version] = container.parameters()
        container.swap({name: value + 1 for name, value in container.parameters().items()})
        best.record_step({"reward": reward})
    # The rolling means are .4, .45, .6, .4 and .05. Version 2 sampled the step with reward .7.
    kept = read_adapter_file(best.path)
    assert (best.version, best.value, kept.version) == (2, pytest.approx(0.6), 2)
    for name, value in sampled[2].items():
        assert mx.array_equal(kept.arrays[name], value).item()


def test_the_best_adapter_is_the_one_that_a_worker_behind_the_trainer_sampled_with(
    load_tiny, tmp_path
):
    model, _ = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=2))
    best = BestAdapter(container, tmp_path / "best.safetensors", window=1, max_staleness=2)
    for reward, behind in ((0.1, 0), (0.2, 1), (0.3, 1), (0.9, 2), (0.4, 0), (0.0, 1)):
        before = container.version
        container.swap({name: value + 1 for name, value in container.parameters().items()})
        best.record_step({"reward": reward}, sampled_with=before - behind)
    # The step after version 3 got its rewards from a worker with version 1.
    assert (best.version, best.value, read_adapter_file(best.path).version) == (1, 0.9, 1)


def test_of_equal_evaluations_the_first_or_the_last_adapter_is_the_best(load_tiny, tmp_path):
    model, _ = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=2))
    kept = {}
    for latest in (False, True):
        best = BestAdapter(container, tmp_path / f"{latest}.safetensors")
        for value in (0.5, 0.5, 0.4):
            best.record_evaluation(value, latest_of_equals=latest)
            container.swap(dict(container.parameters()))
        kept[latest] = container.version - best.version
    assert kept == {False: 3, True: 2}


def test_the_summary_says_which_adapters_a_stopped_run_ends_with():
    score = Measurement(name="greedy reward", value=0.5, standard_error=0.1, count=9, step=17)
    result = RunResult(
        directory=RunDirectory(Path("run")),
        ended="alarm",
        steps=17,
        updates=17,
        seconds=1.0,
        before=score,
        after=score,
        best=score,
        alarms=("alarm at step 17",),
        facts={"kept": 3},
    )
    told = describe_result(result)
    assert "An alarm stopped the run. The adapters are again those of version 3" in told
    assert "stopped" not in describe_result(replace(result, ended="finished", facts={}))


@pytest.mark.parametrize(
    ("after", "error", "may_be_chance"), [(0.6, 0.1, True), (0.9, 0.1, False), (0.5, 0.0, False)]
)
def test_the_summary_says_whether_a_gain_may_be_chance(after, error, may_be_chance):
    score = Measurement(name="greedy reward", value=0.5, standard_error=error, count=9, step=0)
    result = RunResult(
        directory=RunDirectory(Path("run")),
        ended="finished",
        steps=9,
        updates=9,
        seconds=1.0,
        before=score,
        after=replace(score, value=after),
        best=None,
    )
    assert ("may be chance" in describe_result(result)) == may_be_chance


def collapsing(output, *options):
    settings = "--env add --lr 0.01 --steps 30 --count 64 --groups-per-step 8"
    return ["train", *settings.split(), "--output", str(output), "--json", *options]


@pytest.mark.slow
def test_a_run_that_collapses_is_stopped_and_ends_with_its_best_adapter(tmp_path, capsys):
    assert main(collapsing(tmp_path / "run", "--stop-on-collapse")) == 0
    stdout, stderr = capsys.readouterr()
    stopped = json.loads(stdout)
    assert stopped["steps"] < 30 and "alarm at step" in stopped["alarms"][0]
    assert stopped["alarms"][0] in stderr
    final = read_adapter_file(tmp_path / "run" / "adapters" / "latest.safetensors")
    best = read_adapter_file(tmp_path / "run" / "adapters" / "best.safetensors")
    assert final.version == best.version == stopped["kept"] < stopped["updates"]
    assert all(mx.array_equal(final.arrays[name], best.arrays[name]).item() for name in best.arrays)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    *steps, evaluation = map(json.loads, lines)
    assert [metrics["step"] for metrics in steps] == list(range(stopped["steps"]))
    assert sum(value for name, value in steps[-1].items() if "alarm/" in name) >= 1
    assert evaluation["step"] == stopped["steps"] and "eval/reward" in evaluation
    # The kept adapter is not a collapsed one.
    assert stopped["after"]["reward"] > 0.3

    assert main(collapsing(tmp_path / "on")) == 0
    went_on = json.loads(capsys.readouterr().out)
    assert went_on["steps"] == 30 and went_on["kept"] is None
    assert went_on["alarms"][0] == stopped["alarms"][0]
    assert went_on["after"]["reward"] < 0.1


def with_evaluations(*values, error=0.02, reward=lambda step: 0.3 + 0.01 * step, every=10):
    """Return steps with training rewards, and a held-out reward every `every` steps."""
    return [
        STEADY
        | {"reward": reward(step)}
        | (
            {"eval/reward": values[step // every], "eval/standard_error": error}
            if step % every == 0
            else {}
        )
        for step in range(every * len(values))
    ]


def test_a_held_out_reward_that_falls_while_the_training_reward_rises_is_an_alarm():
    found = alarms(with_evaluations(0.3, 0.4, 0.45, 0.44, 0.35))
    assert [(alarm.name, alarm.step) for alarm in found] == [("overfit", 40)]
    assert found[0].is_about_learning
    assert "fell to 0.350 from 0.450" in found[0].got and "rose to" in found[0].got


@pytest.mark.parametrize(
    "steps",
    [
        with_evaluations(0.3, 0.4, 0.45, 0.44, 0.5),
        with_evaluations(0.3, 0.45, 0.41, 0.44, 0.42, error=0.05),
        with_evaluations(0.5, 0.4, reward=lambda step: 0.5 - 0.001 * step),
        with_evaluations(0.9),
    ],
    ids=["a rise", "noise", "both fall", "one measurement"],
)
def test_other_measurements_are_no_overfitting(steps):
    assert "overfit" not in names(steps)


def test_the_overfit_alarm_ends_when_the_held_out_reward_is_back():
    monitor, metric = AlarmMonitor(), []
    for step, metrics in enumerate(with_evaluations(0.3, 0.45, 0.3, 0.46)):
        monitor.check(step, metrics)
        metric.append(monitor.metrics()["alarm/overfit"])
    assert metric == [0] * 20 + [1] * 10 + [0] * 10


def test_a_skipped_update_is_an_alarm_in_its_own_step():
    monitor = AlarmMonitor()
    (alarm,) = monitor.check(0, STEADY | {"update_skipped/not_finite": 0.5})
    assert alarm.name == "not_finite" and "50% of the updates were skipped" in str(alarm)
    assert not alarm.is_about_learning and monitor.metrics()["alarm/not_finite"] == 1
    monitor.check(1, STEADY | {"update_skipped/not_finite": 0.0})
    assert monitor.metrics()["alarm/not_finite"] == 0


def test_a_machine_that_begins_to_swap_is_an_alarm():
    before, share = MemoryPressure(10**9), memory_bytes() // 50
    assert low_memory(before, MemoryPressure(10**9 + share // 2)) is None
    sign = low_memory(before, MemoryPressure(10**9 + 2 * share))
    assert sign and "were moved to swap since the run began" in sign[0]
    warned = low_memory(before, MemoryPressure(0, warned=True))
    assert warned and "0.0 MB" in warned[0] and "macOS warns" in warned[0]
    (alarm,) = AlarmMonitor().check(0, STEADY, memory=sign)
    assert alarm.name == "memory" and not alarm.is_about_learning
    assert "--checkpoint-gradients" in str(alarm)


def test_a_disk_with_room_for_few_checkpoints_is_an_alarm(tmp_path):
    assert low_disk(tmp_path / "none") is None
    sign = low_disk(tmp_path)
    assert sign is None
    with (tmp_path / "00000001.safetensors").open("wb") as file:
        file.truncate(2**42)  # Takes no space, and says that it has four terabytes.
    sign = low_disk(tmp_path)
    assert sign and "44.0 TB" in sign[1]
    (alarm,) = AlarmMonitor().check(0, STEADY, disk=sign)
    assert alarm.name == "disk" and not alarm.is_about_learning
