"""The effect of each option on the parts of an assembled run."""

import json
import math
import sys
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.wandb_server import records
from textpolicy import fast_cpu
from textpolicy.adapters.files.adapter_file import peek_version
from textpolicy.algorithms import dapo, get
from textpolicy.algorithms.parts import averages
from textpolicy.algorithms.parts.kl import k2
from textpolicy.algorithms.parts.ratio_levels import SEQUENCE
from textpolicy.algorithms.parts.token_weights import off_policy_mask
from textpolicy.config import SFTConfig, TrainConfig, changed, read_toml, settings_of
from textpolicy.errors import ConfigError, ModelError, TaskError
from textpolicy.experiment.assembly import (
    Experiment,
    adapter_config,
    assemble,
    checkpoints_of,
    dtype_of,
    find_algorithm,
    load_sft_data,
    optimizer_of,
    plain_settings,
    sft_parameters,
)
from textpolicy.experiment.assembly import adapt as adapt_model
from textpolicy.experiment.run import run
from textpolicy.experiment.tasks import find_task
from textpolicy.experiment.threads import apply_thread_option
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.model_files import tiny_model
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_rows
from textpolicy.tracking.open_tracker import ServiceOptions

DEFAULTS = changed(TrainConfig(), {"task.env": "add"})
ROWS = [{"question": f"{n}+1=", "right": str(n + 1)} for n in range(40)]


@pytest.fixture
def assembled(tmp_path):
    """Return a function that assembles the experiment of the given settings."""

    def build(**changes: Any) -> Experiment:
        config = changed(DEFAULTS, {key.replace("__", "."): v for key, v in changes.items()})
        environment, reward = find_task(config.task, config.run.seed)
        algorithm = find_algorithm(config.algorithm)
        return assemble(config, environment, reward, algorithm, RunDirectory(tmp_path))

    return build


@pytest.fixture
def task(tmp_path):
    """Return a function that finds the environment and the rewards of the given settings."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "mine.py").write_text("def score(completion): return len(completion) / 100")

    def find(**changes: Any) -> Any:
        values = {key.replace("__", "."): value for key, value in changes.items()}
        return find_task(changed(TrainConfig(), values).task, 0)

    return find


def test_env_names_the_environment(task):
    assert task(task__env="sort")[0].name == "sort"


def test_data_prompt_and_reward_make_an_environment_of_rows(task, tmp_path):
    environment, rewards = task(
        task__data=str(tmp_path / "rows.jsonl"),
        task__prompt="What is {question}",
        task__reward=f"{tmp_path / 'mine.py'}:score",
    )
    assert next(environment.stream(0)).prompt.startswith("What is ")
    assert [member.name for member in rewards.members] == ["score"]


def test_reward_timeout_and_on_reward_error_go_to_the_rewards(task):
    _, rewards = task(task__env="add", task__reward_timeout=3.5, task__on_reward_error="skip")
    assert (rewards.timeout, rewards.on_error) == (3.5, "skip")
    assert task(task__env="add", task__on_reward_error=-1.0)[1].on_error == -1.0


NAPS = """
import time

def make(rng):
    return "nap?", {}

def nap(seconds: float) -> float:
    'Sleep.'
    time.sleep(seconds)
    return seconds

TOOLS, CALLS = [nap], "written"

def reward(prompt, completion, example):
    return 1.0
"""


def test_env_timeout_and_tool_timeout_are_limits_on_a_step_and_on_a_tool(task, tmp_path):
    (tmp_path / "naps.py").write_text(NAPS)
    path = f"{tmp_path / 'naps.py'}"
    env = task(task__env=path, task__tool_timeout=0.2)[0].heldout(1)[0].env()
    env.reset(seed=0)
    assert "tool nap took longer than 0.2 s" in env.step("nap(60.0)")[0]
    env = task(task__env=path, task__env_timeout=0.2)[0].heldout(1)[0].env()
    env.reset(seed=0)
    with pytest.raises(TaskError, match="step took longer than"):
        env.step("nap(60.0)")


def test_name_chooses_the_model(assembled, tmp_path):
    with pytest.raises(ModelError, match="no-such-model"):
        assembled(model__name="no-such-model")
    link = tmp_path / "link"
    link.symlink_to(tiny_model())
    assert assembled(model__name=str(link)).trainer.model is not None


def test_dtype_is_the_dtype_of_the_weights(assembled):
    model = assembled(model__dtype="bfloat16").trainer.model
    assert model.model.norm.weight.dtype == mx.bfloat16


@pytest.mark.slow
def test_quantize_packs_the_base_in_the_chosen_mode_and_group_size(assembled):
    def packed(**options: Any) -> Any:
        model = assembled(model__quantize=4, **options).trainer.model
        return model.model.embed_tokens

    usual = packed()
    assert (usual.bits, usual.group_size, usual.mode) == (4, 64, "affine")
    assert packed(model__quantize_group=32).group_size == 32
    assert packed(model__quantize_mode="mxfp4").mode == "mxfp4"
    assert assembled(model__quantize=8).trainer.model.model.embed_tokens.bits == 8


def test_threads_set_the_threads_of_matrix_products():
    before = fast_cpu.enable().threads
    if before is None:
        pytest.skip("the threads of this BLAS cannot be set")
    options = changed(DEFAULTS, {"model.threads": 2}).model
    apply_thread_option(options)
    assert fast_cpu.enable().threads == 2
    apply_thread_option(DEFAULTS.model)
    assert fast_cpu.enable().threads == 1
    fast_cpu.set_threads(before)


def test_fresh_adapters_have_the_chosen_kind_rank_scale_and_layers(assembled):
    experiment = assembled(
        adapter__kind="dora",
        adapter__rank=3,
        adapter__scale=1.5,
        adapter__num_layers=1,
        adapter__keys=("self_attn.q_proj",),
    )
    adapters = experiment.adapters
    (rule,) = adapters.config.rules
    assert (rule.kind, rule.rank, rule.scale) == ("dora", 3, 1.5)
    assert [path.rpartition("layers.")[2] for path in adapters.layers()] == [
        f"{len(adapters.model.layers) - 1}.self_attn.q_proj"
    ]


def test_alpha_target_modules_and_dropout_have_the_meaning_of_peft():
    values = {
        "adapter.rank": 4,
        "adapter.alpha": 8.0,
        "adapter.dropout": 0.1,
        "adapter.target_modules": ("q_proj", "v_proj"),
    }
    (rule,) = {
        (rule.rank, rule.scale, rule.dropout)
        for rule in adapter_config(changed(DEFAULTS, values).adapter).rules
    }
    assert rule == (4, 2.0, 0.1)
    model, _ = load_model("tiny")
    container = adapt_model(model, changed(DEFAULTS, values).adapter, DEFAULTS.model, 0)
    assert {path.rpartition(".")[2] for path in container.layers()} == {"q_proj", "v_proj"}


def test_adapters_with_dropout_are_not_for_policy_gradients(assembled):
    with pytest.raises(ConfigError, match="dropout"):
        assembled(adapter__dropout=0.1)


def test_an_adapter_config_is_read_from_its_file(assembled, tmp_path):
    path = tmp_path / "rules.json"
    path.write_text('{"rules": [{"module_path": ".*q_proj", "rank": 5}]}')
    (rule,) = assembled(adapter__config=path).adapters.config.rules
    assert rule.rank == 5


@pytest.mark.slow
def test_training_starts_from_the_adapters_of_a_file(assembled, tmp_path):
    begun = assembled(adapter__rank=2, run__seed=5)
    first = begun.adapters
    first.swap({name: value + 1 for name, value in first.parameters().items()}, version=7)
    first.publish(tmp_path / "first.safetensors")
    gone_on = assembled(adapter__start=tmp_path / "first.safetensors")
    second = gone_on.adapters
    assert second.version == first.version
    for name, value in first.parameters().items():
        assert mx.array_equal(second.parameters()[name], value)
    with pytest.raises(ConfigError, match="Leave out --quantize"):
        assembled(adapter__start=tmp_path / "first.safetensors", model__quantize=4)


def test_sampling_options_reach_the_policy(assembled):
    sampling = assembled(sampling__max_tokens=3, sampling__temperature=0.7).policy.sampling
    assert (sampling.max_tokens, sampling.temperature) == (3, 0.7)


def test_the_algorithm_and_its_options_reach_the_trainer(assembled):
    trainer = assembled(
        algorithm__name="dapo", algorithm__options={"clip_high": 0.4}, algorithm__beta=0.01
    ).trainer
    assert trainer.loss_fn.func is dapo.policy_loss
    assert trainer.loss_fn.keywords == {"clip_high": 0.4, "beta": 0.01}
    assert trainer.reference == "base"


@pytest.mark.parametrize(
    ("setting", "value", "bound"),
    [
        ("average", "token_mean", averages.token_mean),
        ("ratio_level", "sequence", SEQUENCE),
        ("kl", "k2", k2),
        ("weights", ("off_policy_mask",), (off_policy_mask,)),
    ],
)
def test_settings_name_functions_of_the_loss(assembled, setting, value, bound):
    names = {f"algorithm__{setting}": value, "algorithm__options": {setting: "sapo"}}
    trainer = assembled(**names, algorithm__beta=0.01).trainer
    assert trainer.loss_fn.keywords == {setting: bound, "beta": 0.01}, "before those of `options`"
    with pytest.raises(ConfigError, match=f"{setting} is 'sapo'; known: "):
        assembled(algorithm__options={setting: "sapo"})


def test_a_flag_and_a_file_can_hold_several_weights_with_numbers(tmp_path):
    text = "mask_tokens(low=0.5, high=3),opsm"
    (tmp_path / "run.toml").write_text(
        '[algorithm]\nweights = ["mask_tokens(low=0.5, high=3)", "opsm"]\n'
    )
    (setting,) = (s for s in settings_of(TrainConfig()) if s.key == "algorithm.weights")
    expected = ("mask_tokens(low=0.5, high=3)", "opsm")
    assert setting.parse(text) == expected
    assert read_toml(tmp_path / "run.toml", TrainConfig()).algorithm.weights == expected


def test_an_estimator_without_a_divergence_is_refused():
    with pytest.raises(ConfigError, match=r"kl is 'k2' and beta is 0.*--beta 0.04"):
        changed(TrainConfig(), {"algorithm.kl": "k2"})
    assert changed(TrainConfig(), {"algorithm.kl": "k2", "algorithm.options": {"beta": 0.1}})


@pytest.mark.slow
def test_trainer_options_of_the_algorithm_hold_unless_a_setting_overrides_them(assembled):
    trainer = assembled(algorithm__name="rloo").trainer
    assert dict(get("rloo").trainer) == {
        "reference": trainer.reference,
        "reward_kl": trainer.reward_kl,
        "skip_without_advantages": trainer.skip_without_advantages,
    }
    assert assembled(algorithm__name="rloo", algorithm__reward_kl=0.2).trainer.reward_kl == 0.2
    assert assembled(algorithm__name="gspo").trainer.mini_batches == 4
    assert assembled(algorithm__name="gspo", trainer__mini_batches=2).trainer.mini_batches == 2


@pytest.mark.slow
def test_rloo_without_reward_kl_computes_no_log_probabilities_of_a_reference(assembled):
    words = {"algorithm__name": "rloo", "algorithm__reward_kl": 0.0}
    assert assembled(**words).trainer.reference is None
    assert assembled(**words, algorithm__beta=0.1).trainer.reference == "base"
    assert assembled(**words, algorithm__reference="base").trainer.reference == "base"


def test_reward_kl_old_logprobs_and_truncated_reach_the_trainer(assembled):
    trainer = assembled(
        algorithm__reward_kl=0.1,
        algorithm__old_logprobs="fresh",
        algorithm__truncated="mask",
    ).trainer
    assert (trainer.reward_kl, trainer.reference) == (0.1, "base")
    assert (trainer.old_logprobs, trainer.truncated) == ("fresh", "mask")


def test_a_reference_may_be_another_model(assembled):
    trainer = assembled(algorithm__name="distillation", algorithm__reference="tiny").trainer
    assert isinstance(trainer.reference, nn.Module)
    with pytest.raises(ConfigError, match="--reference NAME"):
        assembled(algorithm__name="distillation")


@pytest.mark.slow
def test_overlong_cache_is_a_penalty_for_the_last_tokens(assembled):
    trainer = assembled(sampling__max_tokens=10, algorithm__overlong_cache=4).trainer
    advantages = trainer.advantage_fn(mx.zeros((1, 3)), lengths=mx.array([[4.0, 8.0, 10.0]]))
    first, second, third = advantages[0].tolist()
    assert first > second > third
    with pytest.raises(ConfigError, match="gdpo also reads"):
        assembled(algorithm__name="gdpo", algorithm__overlong_cache=4)


def rates(optimizer: Any, count: int) -> list[float]:
    """Return the learning rates of the first updates."""
    parameter = {"w": mx.zeros(1)}
    seen: list[float] = []
    for _ in range(count):
        optimizer.apply_gradients({"w": mx.ones(1)}, parameter)
        seen.append(optimizer.learning_rate.item())
    return seen


def test_the_rate_warms_up_and_falls_to_its_end_over_all_updates_of_the_run(assembled):
    optimizer = assembled(
        trainer__lr=1e-2,
        trainer__schedule="linear",
        trainer__warmup=2,
        trainer__final_lr=1e-3,
        trainer__mini_batches=2,
        trainer__epochs=2,
        run__steps=3,
    ).trainer.optimizer
    course = rates(optimizer, 13)
    assert max(course) == pytest.approx(1e-2) and course[0] < course[1] < course[2]
    assert course[-1] == pytest.approx(1e-3)
    assert course[5] > course[8] > course[11]


def test_the_other_trainer_options_reach_the_trainer(assembled):
    trainer = assembled(
        trainer__weight_decay=0.1,
        trainer__max_grad_norm=math.inf,
        trainer__mini_batches=3,
        trainer__epochs=2,
        trainer__micro_batch_size=5,
        trainer__checkpoint_gradients=True,
    ).trainer
    assert trainer.optimizer.weight_decay == 0.1 and trainer.max_grad_norm == math.inf
    assert (trainer.mini_batches, trainer.epochs, trainer.micro_batch_size) == (3, 2, 5)
    assert trainer.checkpoint_gradients


@pytest.mark.slow
def test_refill_rounds_are_the_algorithms_unless_a_setting_overrides_them(assembled):
    assert assembled().refill_rounds == 1
    assert assembled(algorithm__name="dapo").refill_rounds == 10
    assert assembled(algorithm__name="dapo", rollout__refill_rounds=3).refill_rounds == 3


def test_the_seed_draws_the_adapters(assembled):
    experiments = [assembled(run__seed=seed) for seed in (1, 1, 2)]
    first, again, other = (experiment.adapters.parameters() for experiment in experiments)
    name = next(name for name in first if name.endswith("lora_a"))
    assert mx.array_equal(first[name], again[name])
    assert not mx.array_equal(first[name], other[name])


@pytest.mark.slow
def test_options_of_sampling_evaluation_and_tracking_have_an_effect(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "seen.py").write_text(
        "def score(prompt, completion):\n"
        f"    with open({str(tmp_path / 'seen.txt')!r}, 'a') as file:\n"
        "        print(prompt, file=file)\n"
        "    return sum(map(ord, completion)) % 10 / 10\n"
    )
    values = {
        "task.reward": f"{tmp_path / 'seen.py'}:score",
        "sampling.max_tokens": 4,
        "rollout.group_size": 3,
        "rollout.groups_per_step": 2,
        "rollout.steps_per_generation": 2,
        "rollout.max_staleness": 1,
        "evaluation.count": 5,
        "evaluation.every": 2,
        "evaluation.samples": 4,
        "evaluation.temperature": 0.9,
        "evaluation.good": 0.0,
        "evaluation.envs": ("sort",),
        "tracking.wandb": "project",
        "tracking.wandb_artifacts": True,
        "tracking.tensorboard": True,
        "run.steps": 4,
        "run.output": tmp_path / "run",
    }
    config, folder = changed(DEFAULTS, values), tmp_path / "run"
    with (tmp_path / "events.txt").open("w") as stream:
        outcome = run(config, on_event=lambda event: print(event, file=stream))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert outcome.before.count == outcome.after.count == 5
    # Two steps train on the rollouts of one generation.
    assert ["num_tokens" in row for row in rows] == [True, False, True, False, False]
    # The run evaluates before the first step, after every two steps, and at the end.
    assert ["eval/reward" in row for row in rows] == [True, False, True, False, True]
    # Every answer has a reward of at least 0, which counts as right here.
    assert rows[0]["eval/pass@1"] == rows[4]["eval/pass@4"] == 1
    assert "eval/avg@4" in rows[0] and "eval/sort/pass@2" in rows[0]
    asked = (tmp_path / "seen.txt").read_text().splitlines()
    evaluated, sampled = 3 * 5 * (1 + 4), 4 * 2 * 3
    assert len(asked) == 1 + evaluated + sampled
    assert list((folder / "tensorboard").iterdir())
    (logged,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    uploaded = [record.artifact for record in records(logged) if record.artifact.type == "model"]
    assert [entry.path for entry in uploaded[0].manifest.contents] == [
        "best.safetensors",
        "latest.safetensors",
    ]
    assert "step 2" in (tmp_path / "events.txt").read_text()


def test_a_service_whose_package_is_missing_stops_a_run_before_its_first_step(
    tmp_path, monkeypatch
):
    # With None in sys.modules, Python refuses to import the package.
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = changed(DEFAULTS, {"task.env": "add", "tracking.trackio": "project"})
    with pytest.raises(ConfigError, match="trackio is not installed"):
        run(config, output=tmp_path)
    assert not RunDirectory(tmp_path).metrics.exists()


@pytest.mark.slow
def test_the_best_adapter_is_the_best_evaluated_one_with_eval_every(tmp_path):
    (tmp_path / "fall.py").write_text(
        "calls = 0\n"
        "def score(completion):\n"
        "    global calls\n"
        "    calls += 1\n"
        # One call tries the reward; then come an evaluation of two, a step of four, an evaluation.
        "    return 1.0 if 7 < calls <= 9 else calls % 2 / 10\n"
    )
    values = {
        "task.reward": f"{tmp_path / 'fall.py'}:score",
        "rollout.group_size": 2,
        "rollout.groups_per_step": 2,
        "evaluation.count": 2,
        "evaluation.every": 1,
        "run.steps": 3,
    }
    directory = run(changed(DEFAULTS, values), output=tmp_path / "run").directory
    assert peek_version(directory.best) == 1


@pytest.mark.slow
def test_sample_groups_limits_the_groups_of_each_step_in_the_samples(tmp_path):
    values = {
        "rollout.group_size": 2,
        "rollout.groups_per_step": 3,
        "evaluation.count": 2,
        "run.steps": 1,
        "run.sample_groups": 2,
    }
    directory = run(changed(DEFAULTS, values), output=tmp_path).directory
    assert [row["group"] for row in read_rows(directory.samples)] == [0, 0, 1, 1]


@pytest.mark.parametrize("config", [DEFAULTS, SFTConfig()], ids=["train", "sft"])
def test_options_choose_the_services(config):
    options = {
        "tracking.wandb": "p",
        "tracking.wandb_artifacts": True,
        "tracking.tensorboard": True,
        "tracking.trackio": "q",
    }
    asked = changed(config, options).tracking
    services = {"wandb": "p", "wandb_artifacts": True, "tensorboard": True, "trackio": "q"}
    assert ServiceOptions(**asdict(asked)) == ServiceOptions(**services)
    assert ServiceOptions(**asdict(config.tracking)) == ServiceOptions()


def test_options_decide_how_often_checkpoints_are_saved_and_how_many_are_kept(tmp_path):
    config = changed(DEFAULTS, {"run.checkpoint_every": 3, "run.keep_checkpoints": 5})
    checkpoints = checkpoints_of(config, RunDirectory(tmp_path))
    assert checkpoints.keep == 5
    assert [checkpoints.due(step) for step in range(1, 7)] == [False, False, True] * 2


@pytest.fixture
def sft_data(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": row["question"], "completion": row["right"]} for row in ROWS]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


SFT_PARAMETERS = {
    "trainer.batch_size": 3,
    "trainer.iterations": 7,
    "trainer.accumulation": 2,
    "trainer.checkpoint_gradients": True,
    "trainer.patience": 4,
    "data.packing": True,
    "data.max_length": 64,
    "run.steps_per_report": 5,
    "run.eval_every": 6,
    "run.validation_batches": 0,
    "run.checkpoint_every": 9,
    "run.seed": 3,
}


def test_every_number_of_a_supervised_run_comes_from_its_option(load_tiny, sft_data, tmp_path):
    _, tokenizer = load_tiny()
    config = changed(SFTConfig(), SFT_PARAMETERS | {"data.source": sft_data})
    data = load_sft_data(config, tokenizer)
    parameters = sft_parameters(config, RunDirectory(tmp_path), data)
    # These two have the names of mlx-swift-lm in Python.
    names = {"eval_every": "steps_per_eval", "checkpoint_every": "save_every"}
    for key, value in SFT_PARAMETERS.items():
        name = key.partition(".")[2]
        assert getattr(parameters, names.get(name, name)) == value
    epochs = changed(SFTConfig(), {"trainer.epochs": 2, "trainer.batch_size": 4})
    # A tenth of the 40 rows is validation data.
    assert sft_parameters(epochs, RunDirectory(tmp_path), data).iterations == 2 * 36 // 4
    with pytest.raises(ConfigError, match="expected one of them"):
        changed(epochs, {"trainer.iterations": 5, "trainer.epochs": 2})
    # The later of two options that exclude each other counts.
    again = changed(epochs, {"trainer.iterations": 5}).trainer
    assert (again.iterations, again.epochs) == (5, None)
    assert changed(SFTConfig(trainer=again), {"trainer.epochs": 3}).trainer.iterations is None


def test_learn_system_and_validation_share_choose_the_learned_tokens(load_tiny, sft_data):
    _, tokenizer = load_tiny()

    def read(**options: Any) -> Any:
        values = {key.replace("__", "."): value for key, value in options.items()}
        return load_sft_data(changed(SFTConfig(), values | {"data.source": sft_data}), tokenizer)

    usual = read()
    everything, spoken = read(data__learn="everything"), read(data__system="Add.")
    assert sum(everything.train[0].mask) > sum(usual.train[0].mask)
    assert len(spoken.train[0].tokens) > len(usual.train[0].tokens)
    assert len(read(data__validation_share=0.5).valid) == 20
    assert not read(data__validation_share=0.0).valid
    short = read(data__learn="everything", data__max_length=4)
    assert len(short.train[0].tokens) == 4


def test_options_choose_the_optimizer_of_a_supervised_run():
    options = changed(
        SFTConfig(),
        {
            "trainer.lr": 1e-2,
            "trainer.schedule": "linear",
            "trainer.warmup": 2,
            "trainer.final_lr": 1e-3,
            "trainer.weight_decay": 0.2,
        },
    ).trainer
    optimizer = optimizer_of(options, updates=12)
    course = rates(optimizer, 13)
    assert max(course) == pytest.approx(1e-2) and course[-1] == pytest.approx(1e-3)
    assert course[0] < course[1] and optimizer.weight_decay == 0.2


def test_the_logged_config_can_be_written_as_json(tmp_path):
    config = changed(DEFAULTS, {"run.output": tmp_path, "adapter.keys": ("a", "b")})
    values = json.loads(json.dumps(plain_settings(config)))
    assert values["run.output"] == str(tmp_path) and values["adapter.keys"] == ["a", "b"]


def test_a_config_without_a_dtype_leaves_it_to_the_loader():
    assert dtype_of(DEFAULTS.model) is None
