"""benchmarks/real_learning.py: what it repeats, what it gives TRL, and what its verdicts notice."""

import json
import math
import runpy
import sys
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = """
[model]
threads = 1
[rollout]
groups_per_step = 2
group_size = 4
[evaluation]
count = 8
"""


@pytest.fixture
def scripts(monkeypatch):
    """Return a function that imports a module beside the script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module


@pytest.fixture
def verdicts(scripts) -> ModuleType:
    return scripts("real.verdicts")


@pytest.fixture
def table(scripts) -> ModuleType:
    return scripts("real.table")


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path):
    """Return a function that runs the script and returns its exit code and what it printed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    config = tmp_path / "small.toml"
    config.write_text(SMALL)

    def run(options: str) -> tuple[Any, str, str]:
        script = str(BENCHMARKS / "real_learning.py")
        records = ["--output", str(tmp_path / "records.json"), "--config", str(config)]
        monkeypatch.setattr(sys, "argv", [script, *records, *options.split()])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def rising(seed: int, *, low: float = 0.2, high: float = 0.8, steps: int = 40) -> list[float]:
    """Return a curve of mean rewards that rises, with the noise of a step's samples."""
    noise = Random(seed)
    share = [step / (steps - 1) for step in range(steps)]
    return [low + (high - low) * x + noise.gauss(0, 0.03) for x in share]


def flat(seed: int) -> list[float]:
    return rising(seed, high=0.2)


def record(
    curve: list[float],
    *,
    seed: int = 0,
    after: float = 0.8,
    side: str = "ours",
    control: bool = False,
    alarms: dict[str, int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    given = {"task.env": "add", "run.seed": seed, "run.steps": len(curve), "model.name": "tiny"}
    settings = {"side": side, "variant": "lora", "control": control, "versions": {side: "1"}}
    return {
        "settings": settings | {"options": given | options},
        "samples_per_step": 32,
        "before": {"mean": 0.2, "standard_error": 0.02, "count": 400},
        "after": {"mean": after, "standard_error": 0.02, "count": 400},
        "cpu_seconds": 60.0,
        "rewards": curve,
        "alarms": alarms or {},
    }


def three(curve: Any, **options: Any) -> list[dict[str, Any]]:
    shift = 10 if options.get("side") == "trl" else 0
    return [record(curve(seed + shift), seed=seed, **options) for seed in range(3)]


def test_a_run_on_record_is_not_trained_again(run_script, tmp_path):
    once = "--model tiny --tasks add --steps 1 --json"
    _, first, log = run_script(once)
    assert "step 1/1" in log
    written = (tmp_path / "records.json").read_bytes()
    _, second, log = run_script(once)
    assert "step 1/1" not in log
    assert "on record" in log
    assert second == first
    assert (tmp_path / "records.json").read_bytes() == written
    (only,) = json.loads(written)["runs"]
    assert only["before"]["count"] == 8
    assert len(only["rewards"]) == 1
    assert only["samples_per_step"] == 8
    assert only["setting"]["threads"] in (1, None)
    # The control of the same task and seed is another run.
    _, _, log = run_script(f"{once} --control")
    assert log.count("step 1/1") == 1
    assert "control=True" in log
    assert len(json.loads((tmp_path / "records.json").read_text())["runs"]) == 2


def test_a_run_with_another_option_file_or_version_is_another_run(scripts):
    units = scripts("real.units")
    config = import_module("textpolicy.config")
    unit = units.Unit(task="add", seed=0)
    base = config.TrainConfig()
    known = unit.settings(base, {})
    other = config.changed(base, {"trainer.lr": 1e-6})
    longer = config.changed(base, {"run.steps": 7})
    threads = config.changed(base, {"model.threads": 1, "tracking.tensorboard": True})
    assert unit.settings(other, {}) != known
    assert unit.settings(longer, {}) != known
    assert unit.settings(base, {"trl": "1.16.0"}) != known
    assert units.Unit(task="sort", seed=0).settings(base, {})["files"] != known["files"]
    assert unit.settings(threads, {}) == known


def test_a_new_record_takes_the_place_of_an_older_one_of_the_same_run(scripts, tmp_path):
    file = scripts("real.records").RecordFile(tmp_path / "results" / "runs.json")
    assert file.read() == []
    old, new = (record(flat(0), **{"trainer.lr": rate}) for rate in (0.1, 0.2))
    other = record(flat(1), seed=1)
    for one in (old, other, new):
        file.add(one)
    assert file.read() == [other, new]
    assert file.find(new["settings"]) == new
    default = {"options": new["settings"]["options"] | {"trainer.warmup": 0}}
    assert file.find(new["settings"] | default) == new
    default["options"]["trainer.warmup"] = 1
    assert file.find(new["settings"] | default) is None
    assert file.find(old["settings"]) is None


def test_a_gain_counts_from_two_standard_errors_on(verdicts):
    # The standard error of the difference is 0.028.
    assert not verdicts.learns(record(rising(0), after=0.25))
    assert verdicts.learns(record(rising(0), after=0.26))
    assert not verdicts.learns(record(rising(0), after=0.1))


def test_records_without_learning_are_not_as_expected(table):
    assert not table.as_expected([])
    assert table.as_expected(three(rising))
    assert not table.as_expected([*three(rising), record(flat(0), seed=3, after=0.21)])
    assert not table.as_expected(three(flat, side="trl"))


def test_a_control_that_gains_is_not_as_expected(table):
    assert table.as_expected([*three(rising), *three(flat, after=0.2, control=True)])
    assert not table.as_expected([*three(rising), *three(rising, control=True)])


def test_a_run_that_loses_its_reward_has_collapsed(verdicts, table):
    fallen = rising(0)[:30] + [0.3] * 10
    assert verdicts.collapsed(record(fallen))
    assert not table.as_expected([record(fallen)])
    assert "1 collapsed" in table.markdown([record(fallen)])
    assert verdicts.collapsed(record(rising(0), alarms={"entropy": 12}))


def test_the_noise_of_steps_is_no_collapse(verdicts):
    plateaus = [rising(seed, low=0.8, steps=200) for seed in range(200)]
    assert sum(map(verdicts.fell, plateaus)) == 0
    assert not verdicts.fell([0.9, 0.1])


def test_sides_that_learn_alike_are_told_from_sides_that_do_not(verdicts):
    ours, slow = three(rising), three(lambda seed: rising(seed, high=0.6))
    alike = verdicts.compare_sides(ours, three(rising, side="trl"))
    assert alike.ok
    assert alike.tenths == 10
    assert alike.area.mean == pytest.approx(0, abs=0.02)
    for other in (slow, three(flat)):
        found = verdicts.compare_sides(ours, other)
        assert not found.ok
        assert found.agreeing < 5
        assert found.area.mean > 2 * found.area.standard_error
    assert verdicts.compare_sides(ours, three(rising)[:1]) is None


def test_equal_sides_are_found_alike_in_most_draws(verdicts):
    found = 0
    for first in range(0, 360, 6):
        runs = [record(rising(first + number)) for number in range(6)]
        found += verdicts.compare_sides(runs[:3], runs[3:]).ok
    assert found >= 48


def test_the_table_compares_only_runs_with_the_same_options(table):
    theirs = three(flat, side="trl")
    assert not table.as_expected([*three(rising), *theirs])
    assert table.markdown([*three(rising), *theirs]).endswith("| no |")
    slower = three(rising, **{"trainer.lr": 1e-6})
    assert table.pairs_of(table.groups_of([*slower, *theirs])) == []


def test_trl_is_compared_with_the_first_steps_of_a_longer_run_at_a_constant_rate(table, verdicts):
    def beginning(seed: int) -> list[float]:
        return rising(seed + 50)[:20]

    constant, linear = ({"trainer.schedule": name} for name in ("constant", "linear"))
    theirs = three(beginning, side="trl", after=0.3, **constant)
    longer = three(lambda seed: rising(seed, steps=90), **constant)
    ((ours, _),) = table.pairs_of(table.groups_of([*three(rising, **constant), *longer, *theirs]))
    found = verdicts.compare_sides(ours, theirs)
    assert (found.ok, found.steps, found.heldout) == (True, 20, None)
    theirs = three(beginning, side="trl", **linear)
    assert table.pairs_of(table.groups_of([*three(rising, **linear), *theirs])) == []


def test_the_page_has_the_tables_of_the_records(scripts, table):
    script = scripts("real_learning")
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text("utf-8")
    shown = page.split(script.MARK)[1].strip()
    assert shown == table.markdown(script.RecordFile(script.RECORDS).read())


def test_the_tables_are_written_between_the_marks_of_a_page(scripts, tmp_path):
    script, page = scripts("real_learning"), tmp_path / "page.md"
    page.write_text(f"before\n{script.MARK}\nold\n{script.MARK}\nafter\n")
    script.write_page(page, script.MARK, "| new |")
    assert page.read_text() == f"before\n{script.MARK}\n\n| new |\n\n{script.MARK}\nafter\n"


def test_trl_reads_the_same_tokens_in_the_same_order_at_the_same_rates(scripts, tmp_path):
    peer, config = scripts("real.peer"), import_module("textpolicy.config")
    values = {"task.env": "sort", "task.few_shot": 1, "run.steps": 3, "run.seed": 5}
    rate = {"trainer.lr": 1e-3, "trainer.schedule": "linear", "trainer.warmup": 1}
    asked = config.changed(config.TrainConfig(), values | rate)
    environment, _ = import_module("textpolicy.experiment.tasks").find_task(asked.task, 5)
    task = peer.task_of(asked, environment, tmp_path)
    assert len(task["rows"]) == 3 * 16
    assert task["passes"] * task["rows_per_pass"] == 16 * 8
    assert task["rows_per_pass"] % task["group_size"] == 0
    _, tokenizer = import_module("textpolicy.generation.mlx_generation").load_model("tiny")
    first = next(environment.stream(5))
    assert task["rows"][0]["text"] == first.prompt
    for row in task["rows"][:4]:
        assert tokenizer.encode(row["prompt"], add_special_tokens=False) == row["tokens"]
    assert task["rates"] == pytest.approx([5e-4, 1e-3, 5e-4])
    start = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
    assert (start["r"], start["lora_alpha"]) == (16, 32)
    assert mx.load(str(tmp_path / "start" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("algorithm.name", "dapo"), ("trainer.epochs", 2), ("rollout.refill_rounds", 4)],
)
def test_options_that_trl_does_not_have_are_refused(scripts, key, value):
    peer, config = scripts("real.peer"), import_module("textpolicy.config")
    section = key if not key.startswith("algorithm") else "algorithm"
    with pytest.raises(ValueError, match=section):
        peer.check_same_function(config.changed(config.TrainConfig(), {key: value}))
    peer.check_same_function(config.TrainConfig())


def test_the_control_deals_the_rewards_of_a_step_to_other_rollouts(scripts):
    shuffled = scripts("sides.shuffled_grpo").compute_advantages
    rewards = mx.array([[1.0, 0, 0, 0], [1.0, 1, 1, 1], [0.0, 0, 0, 0], [1.0, 1, 0, 0]])
    draws = [shuffled(rewards, seed=3) for _ in range(20)]
    own = import_module("textpolicy.algorithms.grpo").compute_advantages(rewards)
    # The mean over draws of the product with the own advantages is near 0.
    products = [float((draw * own).mean()) for draw in draws]
    assert abs(sum(products) / len(products)) < 0.3 * float(mx.square(own).mean())
    assert math.isclose(float(draws[0].sum()), 0, abs_tol=1e-4)
