"""Every option of a run, changed on resume, is refused, or is in effect afterwards.

The tables name a value for each option. An option that is in no table fails the first test.
"""

import contextlib
import json
import shutil
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest

import textpolicy as tp
from tests.thinking_models import write_thinking_model
from textpolicy import fast_cpu
from textpolicy.config import SFTConfig, TrainConfig, changed, settings_of
from textpolicy.errors import TextPolicyError
from textpolicy.experiment.resuming import check_changes
from textpolicy.generation.model_files import tiny_model
from textpolicy.runs import RunDirectory

CLOCKS = ("time/", "memory/", "tokens_per_second", "iterations_per_second")
REWARD = """
import sys

def reward(completion, prompt):
    # Different in another process, so that a time limit shows.
    here = "pytest" in sys.modules
    return sum(map(ord, completion)) % (7 if here else 5) / 7

def other(completion):
    return len(set(completion)) + sum(map(ord, completion)) % 3

def failing(completion):
    if sum(map(ord, completion)) % 2:
        raise ValueError("odd")
    return sum(map(ord, completion)) % 7 / 7
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder of files that options name."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "reward.py").write_text(REWARD)
    for name, start in (("rows", 10), ("others", 50)):
        rows = [
            {"prompt": f"{n}+{n}=", "question": f"{n}+1=", "completion": str(2 * n)}
            for n in range(start, start + 24)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "adapter.json").write_text(
        json.dumps({"lora_parameters": {"rank": 16, "scale": 9.0, "dropout": 0.0}})
    )
    write_thinking_model(folder / "thinker", "qwen3_5")
    shutil.copytree(tiny_model(), folder / "model")
    weights = mx.load(str(folder / "model" / "model.safetensors"))
    changed = {name: array * 1.01 for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model" / "model.safetensors"), changed, {"format": "mlx"})
    return folder


RL = {
    "task.data": "{files}/rows.jsonl",
    "task.reward": "{files}/reward.py:reward",
    "sampling.max_tokens": 4,
    "sampling.temperature": 3.0,
    "rollout.group_size": 2,
    "rollout.groups_per_step": 2,
    "evaluation.count": 2,
    "trainer.epochs": 2,
    "trainer.lr": 0.01,
    "run.steps": 2,
}
SFT = {
    "data.source": "{files}/rows.jsonl",
    "trainer.batch_size": 2,
    "trainer.iterations": 4,
    "trainer.lr": 0.01,
    "run.checkpoint_every": 2,
    "run.steps_per_report": 1,
    "run.eval_every": 1,
    "run.validation_batches": 1,
}
BASES = {
    "plain": {},
    "failing": {"task.reward": "{files}/reward.py:failing", "task.on_reward_error": "skip"},
    "quantized": {"model.quantize": 4},
    "kl": {"algorithm.beta": 0.1},
    # A reward that is the same in every process.
    "everywhere": {"task.reward": "{files}/reward.py:other"},
    "thinking": {"model.name": "{files}/thinker"},
    "examples": {"task.few_shot": 2},
    "linear": {"trainer.schedule": "linear"},
    "sampled": {"evaluation.samples": 2, "evaluation.every": 1},
    "epochs": {"trainer.iterations": None, "trainer.epochs": 1},
    "control": {"task.prompt": "{prompt}<|im_end|>", "data.system": "Add <|im_end|> now."},
    "packed": {"data.packing": True, "data.max_length": 24},
}

THINKING = {
    "model.thinking": ("thinking", "off"),
    "model.chat_template_kwargs": ("thinking", {"enable_thinking": False}),
}
# The base that the option is changed from, and its other value.
NUMBERS = {
    "task.env": ("plain", {"task.env": "sort", "task.data": None, "task.reward": None}),
    "task.data": ("plain", "{files}/others.jsonl"),
    "task.eval_data": ("plain", "{files}/others.jsonl"),
    "task.columns": ("plain", {"prompt": "question"}),
    "task.data_stream": ("plain", True),
    "task.prompt": ("plain", "{question}"),
    "task.system": ("plain", "Be brief."),
    "task.few_shot": ("plain", 1),
    "task.gold_column": ("examples", "question"),
    "task.reward": ("plain", "{files}/reward.py:other"),
    "task.reward_timeout": ("plain", 60.0),
    "task.on_reward_error": ("failing", 0.25),
    "model.dtype": ("plain", "bfloat16"),
    "model.threads": ("plain", 2),
    "model.allow_special_tokens": ("control", True),
    **THINKING,
    "adapter.config": ("plain", Path("{files}/adapter.json")),
    "adapter.scale": ("plain", 7.0),
    "adapter.alpha": ("plain", 99.0),
    "sampling.max_tokens": ("plain", 3),
    "sampling.temperature": ("plain", 0.2),
    "sampling.merge_adapters": ("plain", True),
    "algorithm.name": ("plain", "dr_grpo"),
    "algorithm.options": ("plain", {"clip_high": 1e-6}),
    "algorithm.average": ("plain", "constant(tokens=50)"),
    "algorithm.ratio_level": ("plain", "sequence"),
    "algorithm.kl": ("kl", "k1"),
    "algorithm.weights": ("plain", ("mask_tokens(high=1.0)",)),
    "algorithm.beta": ("plain", 0.5),
    "algorithm.reward_kl": ("plain", 0.5),
    "algorithm.reference": ("kl", "{files}/model"),
    "algorithm.old_logprobs": ("plain", "fresh"),
    "algorithm.truncated": ("plain", "mask"),
    "algorithm.overlong_cache": ("plain", 3),
    "trainer.lr": ("plain", 0.001),
    "trainer.schedule": ("plain", "linear"),
    "trainer.warmup": ("plain", 3),
    "trainer.final_lr": ("linear", 0.009),
    "trainer.weight_decay": ("plain", 0.5),
    "trainer.max_grad_norm": ("plain", 1e-4),
    "trainer.mini_batches": ("plain", 2),
    "trainer.epochs": ("plain", 1),
    "rollout.group_size": ("plain", 3),
    "rollout.groups_per_step": ("plain", 3),
    "rollout.steps_per_generation": ("plain", 2),
    "rollout.refill_rounds": ("failing", 3),
    "evaluation.count": ("plain", 1_000),
    "evaluation.every": ("plain", 1),
    "evaluation.samples": ("plain", 2),
    "evaluation.temperature": ("sampled", 0.01),
    "evaluation.good": ("sampled", 0.99),
    "evaluation.envs": ("plain", ("add",)),
}
# Their effect is the memory of an update, or what happens to an environment that hangs.
MEMORY = {
    "trainer.micro_batch_size": ("plain", 1),
    "trainer.checkpoint_gradients": ("plain", True),
    "task.env_timeout": ("plain", 60.0),
    "task.tool_timeout": ("plain", 60.0),
    "task.agent_processes": ("plain", 3),
    "rollout.max_staleness": ("plain", 2),
    "sizes.head_chunk_bytes": ("plain", 8000),
    "sizes.micro_batch_tokens": ("plain", 8),
    "sizes.decoding_rows": ("plain", 2),
    "sizes.prefill_tokens": ("plain", 8),
}
BOUND = {
    "model.name": ("plain", "{files}/model"),
    "model.quantize": ("plain", 4),
    "model.quantize_mode": ("quantized", "mxfp4"),
    "model.quantize_group": ("quantized", 32),
    "adapter.start": ("plain", Path("{run}/adapters/latest.safetensors")),
    "adapter.kind": ("plain", "dora"),
    "adapter.rank": ("plain", 3),
    "adapter.num_layers": ("plain", 1),
    "adapter.keys": ("plain", ("self_attn.q_proj",)),
    "adapter.target_modules": ("plain", ("q_proj",)),
    "adapter.dropout": ("plain", 0.5),
    "run.output": ("plain", Path("{files}/elsewhere")),
    "run.seed": ("plain", 1),
}
FREE = {
    "tracking.tensorboard": ("plain", True),
    "rollout.swap": ("plain", "tokens"),
    "run.steps": ("plain", 3),
    "run.checkpoint_every": ("plain", 7),
    "run.keep_checkpoints": ("plain", 1),
    "run.keep_adapters": ("plain", 1),
    "run.sample_groups": ("plain", 1),
    "run.stop_on_collapse": ("plain", True),
    "run.limits": ("plain", "warn"),
    "run.step_deadline": ("plain", 900.0),
    "run.stop_on_stall": ("plain", True),
    "rollout.workers": ("everywhere", 1),
    "rollout.worker_deadline": ("plain", 900.0),
}
# Services, which a test of options does not start.
SERVICES = {"tracking.wandb": "a", "tracking.trackio": "b", "tracking.wandb_artifacts": True}
UNOPENED = {"train": SERVICES | {"rollout.ray": "local"}, "sft": SERVICES}

SFT_NUMBERS = {
    key: NUMBERS[key]
    for key in ("model.dtype", "model.threads", "adapter.config", "adapter.scale", "adapter.alpha")
} | {
    "adapter.dropout": ("plain", 0.5),
    "trainer.lr": ("plain", 0.001),
    "trainer.schedule": ("plain", "cosine"),
    "trainer.warmup": ("plain", 3),
    "trainer.final_lr": ("linear", 0.009),
    "trainer.weight_decay": ("plain", 0.5),
}
SFT_MEMORY = {
    "trainer.checkpoint_gradients": ("plain", True),
    "sizes.head_chunk_bytes": ("plain", 8000),
}
SFT_BOUND = {key: value for key, value in BOUND.items() if key != "adapter.dropout"} | {
    "model.allow_special_tokens": ("control", True),
    **THINKING,
    "data.source": ("plain", "{files}/others.jsonl"),
    "data.eval_data": ("plain", "{files}/others.jsonl"),
    "data.columns": ("plain", {"completion": "question"}),
    "data.prompt": ("plain", "{question} ="),
    "data.gold_column": ("plain", "question"),
    "data.learn": ("plain", "everything"),
    "data.system": ("plain", "Add."),
    "data.max_length": ("packed", 30),
    "data.validation_share": ("plain", 0.3),
    "data.packing": ("plain", True),
    "trainer.batch_size": ("plain", 3),
    "trainer.accumulation": ("plain", 2),
}
SFT_FREE = {
    "tracking.tensorboard": ("plain", True),
    "trainer.iterations": ("plain", 5),
    "trainer.epochs": ("epochs", 2),
    "trainer.patience": ("plain", 9),
    "run.steps_per_report": ("plain", 2),
    "run.eval_every": ("plain", 3),
    "run.validation_batches": ("plain", 0),
    "run.checkpoint_every": ("plain", 1),
    "run.limits": ("plain", "warn"),
    "run.step_deadline": ("plain", 900.0),
    "run.stop_on_stall": ("plain", True),
}
TABLES = {
    "train": [NUMBERS, MEMORY, BOUND, FREE],
    "sft": [SFT_NUMBERS, SFT_MEMORY, SFT_BOUND, SFT_FREE],
}


def test_every_option_is_in_one_table():
    for command, config in (("train", TrainConfig()), ("sft", SFTConfig())):
        named = [key for table in (*TABLES[command], UNOPENED[command]) for key in table]
        assert sorted(named) == sorted(setting.key for setting in settings_of(config))


class Base:
    """A run that was stopped halfway, and what its resumed copies compute."""

    def __init__(self, files, folder, command, options):
        self.files, self.folder, self.command = files, folder, command
        self.number = 0
        given = {key: value for key, value in BASES[options].items() if self.knows(key)}
        self.values = self.filled((RL if command == "train" else SFT) | given, folder / "run")
        half = "run.steps" if command == "train" else "trainer.iterations"
        # A schedule depends on the length, so the run is stopped and not short.
        stop = (self.values[half] or 4) // 2
        self.run(self.values | {"run.output": folder / "run"}, stop_at=stop)
        self.plain = self.resumed({}, force=False)

    def knows(self, key):
        config = TrainConfig() if self.command == "train" else SFTConfig()
        return key in {setting.key for setting in settings_of(config)}

    def filled(self, values, run):
        def fill(value):
            if isinstance(value, str | Path):
                return type(value)(
                    str(value).format(
                        files=self.files, run=run, question="{question}", prompt="{prompt}"
                    )
                )
            return value

        return {key: fill(value) for key, value in values.items()}

    def run(self, values, *, stop_at=None, **given):
        defaults = TrainConfig() if self.command == "train" else SFTConfig()

        def listen(event):
            stop = stop_at is not None and event.kind == "step" and event.step >= stop_at
            return tp.Progress.STOP if stop else tp.Progress.MORE

        return tp.run(changed(defaults, values), on_event=listen, **given)

    def resumed(self, change, *, force):
        """Resume a copy with a change, and return what it computed after the resume."""
        self.number += 1
        copy = self.folder / str(self.number)
        shutil.copytree(self.folder / "run", copy, copy_function=shutil.copyfile)
        values = self.values | {"run.output": copy} | self.filled(change, copy)
        self.run(values, resume=copy, force=force)
        return results_of(RunDirectory(copy))


def results_of(directory):
    rows = [
        {n: v for n, v in row.items() if not n.startswith((*CLOCKS, "alarm/"))}
        for row in map(json.loads, directory.metrics.read_text().splitlines())
    ]
    samples = directory.samples.read_text() if directory.samples.exists() else ""
    arrays = tp.AdapterContainer.from_directory(directory.latest).adapter().arrays
    return {
        "rows": rows,
        "samples": [line for line in samples.splitlines() if json.loads(line)["step"] >= 1],
        "adapter": {name: array.tolist() for name, array in arrays.items()},
        "threads": fast_cpu.enable().threads,
    }


@pytest.fixture(scope="module")
def base_of(files, tmp_path_factory):
    """Return a function that returns the base of a command, made once."""

    @cache
    def find(command, options):
        return Base(files, tmp_path_factory.mktemp(f"{command}-{options}"), command, options)

    return find


@pytest.fixture(autouse=True)
def same_threads():
    before = fast_cpu.enable().threads
    yield
    if before:
        fast_cpu.set_threads(before)


def cases(index):
    return [
        pytest.param(command, key, *entry, id=f"{command} {key}")
        for command, tables in TABLES.items()
        for key, entry in tables[index].items()
    ]


def change_of(key, value):
    return value if isinstance(value, dict) and key in value else {key: value}


@contextlib.contextmanager
def refused():
    """Inside, the resume must be refused by one of our own errors."""
    with pytest.raises(TextPolicyError) as error:
        yield
    assert len(str(error.value)) > 20


def differ(one, other):
    """Return whether two results differ; pytest would take minutes to show in what."""
    return one != other


@pytest.mark.slow
@pytest.mark.proves("F22")
@pytest.mark.filterwarnings("ignore:warmup is")
@pytest.mark.parametrize(("command", "key", "options", "value"), cases(0))
def test_an_option_of_the_numbers_is_refused_and_with_force_in_effect(
    base_of, attempts, command, key, options, value
):
    base, change = base_of(command, options), change_of(key, value)
    with refused():
        base.resumed(change, force=False)
    assert differ(base.resumed(change, force=True), base.plain)
    attempts(2)


@pytest.mark.slow
@pytest.mark.proves("F22")
@pytest.mark.parametrize(("command", "key", "options", "value"), cases(1))
def test_an_option_of_memory_or_of_time_is_refused_and_with_force_accepted(
    base_of, attempts, command, key, options, value
):
    base, change = base_of(command, options), change_of(key, value)
    with refused():
        base.resumed(change, force=False)
    steps = [row["step"] for row in base.resumed(change, force=True)["rows"]]
    assert steps == [row["step"] for row in base.plain["rows"]]
    attempts(2)


@pytest.mark.slow
@pytest.mark.proves("F22")
@pytest.mark.parametrize(("command", "key", "options", "value"), cases(2))
def test_what_a_checkpoint_is_bound_to_is_refused_with_force_too(
    base_of, attempts, command, key, options, value
):
    base, change = base_of(command, options), change_of(key, value)
    for force in (False, True):
        with refused():
            base.resumed(change, force=force)
        attempts.add()


@pytest.mark.slow
@pytest.mark.proves("F22")
@pytest.mark.parametrize(("command", "key", "options", "value"), cases(3))
def test_a_free_option_changes_no_number_of_the_same_updates(
    base_of, attempts, command, key, options, value
):
    base, change = base_of(command, options), change_of(key, value)
    if key == "tracking.tensorboard":
        pytest.importorskip("tensorboardX")
    found = base.resumed(change, force=False)
    numbers = ("loss", "reward", "grad_norm") if command == "train" else ("loss",)
    pairs = [
        {row["step"]: row[name] for row in results["rows"] if name in row}
        for name in numbers
        for results in (base.plain, found)
    ]
    for plain, other in zip(pairs[::2], pairs[1::2], strict=True):
        common = plain.keys() & other.keys()
        assert common and (key in ("trainer.iterations", "trainer.epochs") or len(common) > 1)
        if key != "run.steps_per_report":  # Its reports are means over other updates.
            assert {step: plain[step] for step in common} == {s: other[s] for s in common}
    lengths = ("run.steps", "trainer.iterations", "trainer.epochs")
    if key not in lengths:
        assert found["adapter"] == base.plain["adapter"]
    attempts.add()


@pytest.mark.parametrize(
    ("command", "key"), [(command, key) for command, keys in UNOPENED.items() for key in keys]
)
def test_a_service_is_free(tmp_path, command, key):
    config = changed(TrainConfig(), {"rollout.workers": 1}) if command == "train" else SFTConfig()
    before = changed(config, {"tracking.wandb": "before"})
    after = changed(before, {key: UNOPENED[command][key]})
    assert before != after
    check_changes(before, after, RunDirectory(tmp_path), force=False)
