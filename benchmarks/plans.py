"""Compare the planned peaks of memory with measured ones, in sampling and in training.

    python benchmarks/plans.py --model build/smollm2-135m --output benchmarks/results/plans.json

Each setting runs in a process of its own, on the weights of the model and on rollouts of exactly
the planned lengths. A training step is taken twice and the second one is measured, because the
first one also makes the moments of Adam. The exit code is 1 if a plan is wrong by more than 20 %.

    python benchmarks/plans.py --model build/smollm2-135m --time letter --output FILE

compares the time of a small run with what was estimated before it, and after three steps.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from setting import setting

from textpolicy import fast_cpu
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.adapters.config.rules import AdapterKind
from textpolicy.adapters.container import shared_copy
from textpolicy.adapters.quantization.quantize import quantize
from textpolicy.algorithms import grpo
from textpolicy.config import TrainConfig, changed
from textpolicy.config.train import ModelOptions
from textpolicy.experiment import RunEvent, run
from textpolicy.experiment.assembly import DTYPES
from textpolicy.experiment.model_defaults import with_model_defaults
from textpolicy.experiment.run_size import SizeEstimator, read_architecture
from textpolicy.experiment.tasks import find_task
from textpolicy.generation.decode import decode
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.prefix_cache import PrefixCache
from textpolicy.planning.memory_plan import MemoryPlan, plan_memory
from textpolicy.serving.engine_queue import SERVED_PREFIX_BYTES
from textpolicy.tracking.run_history import RunHistory
from textpolicy.training.trainer import Trainer
from textpolicy.types import (
    NOT_SAMPLED,
    Rollout,
    RolloutGroup,
    Sampling,
    Segment,
    StopReason,
    Task,
)

_ALLOWED = 0.2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A setting: groups, rows of each, tokens of prompts and completions, and what else is set.

    With `agents`, so many rollouts are sampled at once, one segment after the other.
    """

    groups: int = 4
    group_size: int = 8
    prompt: int = 64
    completion: int = 16
    segments: int = 1
    agents: int | None = None
    rank: int = 16
    kind: AdapterKind = "lora"
    dtype: str = "float32"
    quantize: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])


CASES = {
    "the default step": Case(groups=8, prompt=45, completion=12),
    "long prompts": Case(groups=2, group_size=4, prompt=400),
    "long completions": Case(groups=1, group_size=8, prompt=64, completion=96),
    "many rows": Case(groups=16, group_size=16, prompt=32, completion=8),
    "agents": Case(groups=2, group_size=4, prompt=96, segments=3, agents=4),
    "rank 1": Case(rank=1),
    "rank 64": Case(rank=64),
    "dora": Case(kind="dora"),
    "micro-batches of 4": Case(options={"micro_batch_size": 4}),
    "checkpoints": Case(completion=48, options={"checkpoint_gradients": True}),
    "bfloat16": Case(dtype="bfloat16", groups=2),
    "4 bits": Case(quantize={"bits": 4, "mode": "affine"}),
    "nf4": Case(quantize={"bits": 4, "mode": "nf4"}),
    "6 bits": Case(quantize={"bits": 6, "mode": "affine"}),
    "8 bits": Case(quantize={"bits": 8, "mode": "affine"}),
}


def plan(case: Case, model: str) -> MemoryPlan:
    """Return the plan of the case, for which no weight is read."""
    form = case.quantize or {}
    options = ModelOptions(name=model, quantize=form.get("bits"), quantize_mode=form.get("mode"))
    return plan_memory(
        read_architecture(options),
        AdapterConfig(rank=case.rank, scale=32 / case.rank, kind=case.kind),
        batch=case.groups * case.group_size,
        group_size=case.group_size,
        segments=case.segments,
        agents=case.agents,
        prompt_tokens=case.prompt,
        completion_tokens=case.completion,
        dtype=DTYPES[case.dtype],
        **case.options,
    )


def measure(case: Case, name: str) -> dict[str, Any]:
    """Return the measured peaks of sampling and training, and their seconds."""
    before = mx.get_active_memory()
    model, _ = load_model(name, dtype=DTYPES[case.dtype])
    if case.quantize:
        quantize(model, **case.quantize)
    config = AdapterConfig(rank=case.rank, scale=32 / case.rank, kind=case.kind)
    AdapterContainer.from_model(model, config)
    mx.eval(model.parameters())
    adam = optim.Adam(learning_rate=1e-5)
    trainer = Trainer(model, grpo.compute_advantages, grpo.policy_loss, adam, **case.options)
    sampler, groups = shared_copy(model), _groups(case)
    trainer.train(groups)
    training, training_seconds = _peak(partial(trainer.train, groups), before)

    def sample() -> None:
        if case.agents:
            _play(sampler, groups, case)
            return
        decode(
            sampler,
            [group.rollouts[0].tokens[: case.prompt] for group in groups],
            n=case.group_size,
            sampling=Sampling(max_tokens=case.completion),
            stop=lambda tokens: None,
            seed=0,
            max_rows=None,
        )

    sampling, sampling_seconds = _peak(sample, before)
    return {
        "sampling": sampling,
        "training": training,
        "seconds": {
            "sampling": round(sampling_seconds, 2),
            "training": round(training_seconds, 2),
        },
    }


def _play(model: nn.Module, groups: list[RolloutGroup], case: Case) -> None:
    """Sample as the server of a run with agents does: each asks for its segments in turn."""
    assert case.agents
    engine = Engine(model, prefixes=PrefixCache(SERVED_PREFIX_BYTES))
    rollouts = [one for group in groups for one in group.rollouts]
    for start in range(0, len(rollouts), case.agents):
        playing = rollouts[start : start + case.agents]
        for number in range(case.segments):
            for place, one in enumerate(playing):
                row = DecodingRow(
                    context=one.segments[number].tokens[: case.prompt],
                    sampling=Sampling(max_tokens=case.completion),
                    stop=lambda tokens: None,
                    key=np.array([number, place], np.uint32),
                    keep_prefix=True,
                )
                engine.submit([row])
            while engine.can_step:
                engine.step()


def _peak(compute: Callable[[], object], before: int) -> tuple[int, float]:
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    compute()
    return mx.get_peak_memory() - before, time.perf_counter() - started


def _groups(case: Case) -> list[RolloutGroup]:
    def segment(group: int, member: int, number: int) -> Segment:
        start = group + (11 * (case.group_size * number + member) if number else 0)
        tokens = [(7 * i + start) % 256 for i in range(case.prompt)]
        return Segment(
            tokens=tokens + [(5 * i + member) % 256 for i in range(case.completion)],
            mask=[False] * case.prompt + [True] * case.completion,
            logprobs=[0.0] * case.prompt + [-1.0] * case.completion,
        )

    def rollout(group: int, member: int) -> Rollout:
        first, *later = (segment(group, member, number) for number in range(case.segments))
        return Rollout(
            tokens=first.tokens,
            mask=first.mask,
            logprobs=first.logprobs,
            later=tuple(later),
            completion="",
            reward=float(member % 2),
            stop_reason=StopReason.LENGTH,
            sampling=Sampling(),
            version=NOT_SAMPLED,
        )

    return [
        RolloutGroup(
            task=Task(id=str(group), prompt=""),
            rollouts=[rollout(group, member) for member in range(case.group_size)],
        )
        for group in range(case.groups)
    ]


def record(name: str, model: str) -> dict[str, Any]:
    """Return the planned and the measured peaks of a case."""
    planned, measured = plan(CASES[name], model).peaks, measure(CASES[name], model)
    ratios = _ratios(planned, measured)
    return {"case": name, "planned": planned, "measured": measured, "ratio": ratios}


def time_run(model: str, env: str, steps: int, threads: int) -> dict[str, Any]:
    """Return the seconds of a small run, and what was estimated before it and after three steps."""
    values = {"model.name": model, "model.threads": threads, "task.env": env, "run.steps": steps}
    values |= {"rollout.groups_per_step": 2, "rollout.group_size": 4, "evaluation.count": 4}
    config = with_model_defaults(changed(TrainConfig(), values))
    planned = SizeEstimator(config, find_task(config.task, 0)[0]).plan_time(config)
    history = RunHistory(steps, measured_every=config.evaluation.every)
    left: dict[int, tuple[float, float]] = {}

    def see(event: RunEvent) -> None:
        now = time.perf_counter()
        if event.kind == "start":
            left[0] = (now, planned.seconds)
        elif event.kind == "step":
            history.add(event.step - 1, event.metrics, now)
            left[event.step] = (now, history.seconds_left)

    with tempfile.TemporaryDirectory() as folder:
        used = time.process_time()
        result = run(config, output=folder, on_event=see)
        used = time.process_time() - used
    ended = left[0][0] + result.seconds
    return {
        "env": env,
        "steps": steps,
        "seconds": round(result.seconds, 1),
        "processor_seconds": round(used, 1),
        "estimated_before": round(planned.seconds, 1),
        "left_after_3_steps": round(ended - left[3][0], 1),
        "estimated_after_3_steps": round(left[3][1], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="default: tiny")
    parser.add_argument("--case", choices=CASES, help="print the record of one case only")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--time", metavar="ENV", help="compare the time of a small run instead")
    parser.add_argument("--steps", type=int, default=6, help="of this run (default: 6)")
    parser.add_argument(
        "--replan",
        action="store_true",
        help="make the plans of --output again, and measure nothing",
    )
    parser.add_argument("--only", help="cases, separated by commas (default: all)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="add the records to this file")
    options = parser.parse_args()
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(options.threads)
    if options.replan:
        _replan(options.output, options.model)
        return 0
    if options.time:
        seconds = time_run(options.model, options.time, options.steps, options.threads)
        print(json.dumps(seconds))
        if options.output:
            _add(options.output, Path(options.model).name, {"case": "time"} | seconds)
        return 0
    if options.case:
        print(json.dumps(record(options.case, options.model)))
        return 0
    records: list[dict[str, Any]] = []
    for name in options.only.split(",") if options.only else CASES:
        asked = ["--model", options.model, "--threads", str(options.threads), "--case", name]
        done = subprocess.run(
            [sys.executable, __file__, *asked], capture_output=True, text=True, check=True
        )
        records.append(json.loads(done.stdout))
        print(_line(records[-1]), flush=True)
        if options.output:
            _add(options.output, Path(options.model).name, records[-1])
    ratios = [ratio for one in records for ratio in one["ratio"].values()]
    return 0 if all(abs(ratio - 1) <= _ALLOWED for ratio in ratios) else 1


def _replan(path: Path, model: str) -> None:
    content = json.loads(path.read_text())
    for one in content["cases"]:
        if one["case"] in CASES:
            one["planned"] = plan(CASES[one["case"]], model).peaks
            one["ratio"] = _ratios(one["planned"], one["measured"])
    path.write_text(json.dumps(content, indent=1) + "\n")


def _ratios(planned: dict[str, int], measured: dict[str, Any]) -> dict[str, float]:
    return {phase: round(planned[phase] / measured[phase], 3) for phase in planned}


def _add(path: Path, model: str, record: dict[str, Any]) -> None:
    """Add a record to the file, in place of an earlier one of the same case."""
    known = json.loads(path.read_text())["cases"] if path.exists() else []
    cases = [one for one in known if one["case"] != record["case"]]
    content = {"setting": setting(), "model": model, "cases": [*cases, record]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _line(record: dict[str, Any]) -> str:
    parts = [
        f"{phase} {record['planned'][phase] / 1e6:7.0f} planned, "
        f"{record['measured'][phase] / 1e6:7.0f} measured ({record['ratio'][phase]:.2f})"
        for phase in record["ratio"]
    ]
    return f"{record['case']:<20} {'   '.join(parts)}   MB"


if __name__ == "__main__":
    sys.exit(main())
