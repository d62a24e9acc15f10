"""Measure how time and memory of generation and of the update grow with each size of a step.

    python benchmarks/scaling.py --json --output benchmarks/results/scaling.json

The model is the Qwen3 of random weights of grpo_step.py, in float32 on a CPU and in bfloat16 on a
GPU, with LoRA. No completion ends early. One size changes at a time, and the sizes take turns in
every round. The exponent is the slope of a least-squares line through the logarithms of size and
median: 0 is constant, 1 is proportional. Memory has a second exponent between the two largest
sizes: an update holds about a thousand tokens in memory at once, so its memory stops growing at
this number.

Attention reads every earlier token for every token, so its share grows with the square of the
completion's length. A fit of time = a n + b n^2 to the medians separates attention from the rest:
"attention" is b n^2 divided by the median at the largest length, and the exponent "without"
attention is the exponent of the medians minus b n^2. Memory is mlx's peak above the memory that
was in use before.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from grpo_step import SIZES
from measurement import MeasurementParser
from mlx_lm.models import qwen3
from setting import default_dtype, on_gpu, setting

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.algorithms import grpo
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.generation.decode import decode
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import can_launch_ahead
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer
from textpolicy.types import NOT_SAMPLED, Rollout, RolloutGroup, Sampling, StopReason, Task


@dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of a step."""

    completion: int = 32
    prompt: int = 32
    group_size: int = 8
    groups: int = 2
    rank: int = 8
    width: int = 256


AXES: dict[str, Sequence[int]] = {
    "completion": (64, 128, 256, 512),
    "prompt": (32, 64, 128, 256, 512),
    "group_size": (4, 8, 16, 32),
    "groups": (8, 16, 32, 64),
    "rank": (2, 8, 32),
    "width": (128, 256, 512),
}
# A policy decodes at most this many rows at once, which limits the memory of generation.
MAX_ROWS = 256


@dataclass(frozen=True)
class Measure:
    """The time and the peak memory of one run."""

    seconds: float
    megabytes: float


class Step:
    """A model, with prompts to generate from and rollouts to train on, all of one size."""

    def __init__(self, size: Size) -> None:
        self._size = size
        scale = size.width / SIZES["hidden_size"]
        widths = ("hidden_size", "intermediate_size")
        changed = {name: int(scale * SIZES[name]) for name in widths}
        changed |= {"num_attention_heads": max(2, int(scale * SIZES["num_attention_heads"]))}
        mx.random.seed(0)
        self._model = qwen3.Model(qwen3.ModelArgs(**(SIZES | changed)))
        self._model.set_dtype(getattr(mx, default_dtype()))
        use_fast_functions(self._model)
        AdapterContainer.from_model(self._model, AdapterConfig(rank=size.rank, scale=2.0))
        mx.eval(self._model.parameters())
        self._prompts = [tokens_of(size.prompt, number) for number in range(size.groups)]
        self._trainer = Trainer(
            self._model, grpo.compute_advantages, grpo.policy_loss, build_optimizer(1e-6)
        )
        self._groups = [self._group(prompt, number) for number, prompt in enumerate(self._prompts)]

    def generate(self) -> list[list[DecodingRow]]:
        """Generate the completions of every group, with all rows at once."""
        size = self._size
        return decode(
            self._model,
            self._prompts,
            n=size.group_size,
            sampling=Sampling(max_tokens=size.completion),
            stop=lambda tokens: None,
            seed=0,
            max_rows=MAX_ROWS,
            launch_ahead=can_launch_ahead(),
        )

    def update(self) -> None:
        """Take one step of the trainer on rollouts of this size."""
        self._trainer.train(self._groups)

    def _group(self, prompt: list[int], number: int) -> RolloutGroup:
        size = self._size

        def rollout(member: int) -> Rollout:
            drawn = tokens_of(size.completion, 1000 * number + member)
            return Rollout(
                tokens=prompt + drawn,
                mask=[False] * len(prompt) + [True] * len(drawn),
                logprobs=[0.0] * len(prompt) + [-7.0] * len(drawn),
                completion="",
                reward=float(member % 2),
                stop_reason=StopReason.LENGTH,
                sampling=Sampling(max_tokens=size.completion),
                version=NOT_SAMPLED,
            )

        members = [rollout(member) for member in range(size.group_size)]
        return RolloutGroup(task=Task(id=str(number), prompt=""), rollouts=members)


def tokens_of(count: int, seed: int) -> list[int]:
    """Return random tokens, the same ones in each call."""
    return np.random.default_rng(seed).integers(5, SIZES["vocab_size"], count).tolist()


def measured(run: Callable[[], object]) -> Measure:
    """Return the seconds of a run, and the peak memory above the memory in use before."""
    if not on_gpu():
        # On a GPU, the time would include that of allocating everything again.
        mx.clear_cache()
    mx.reset_peak_memory()
    before, started = mx.get_active_memory(), time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    return Measure(seconds, (mx.get_peak_memory() - before) / 1e6)


def measure_axis(axis: str, runs: int) -> dict[str, Any]:
    """Run every size of the axis in turns; return medians, peaks and exponents of each phase."""
    values = AXES[axis]
    steps = {value: Step(replace(Size(), **{axis: value})) for value in values}
    phases: dict[str, dict[int, list[Measure]]] = {
        phase: {value: [] for value in values} for phase in ("generation", "update")
    }
    for turn in range(runs + 1):
        for value, step in steps.items():
            taken = {"generation": measured(step.generate), "update": measured(step.update)}
            # The first turn is warm-up.
            if turn:
                for phase, measure in taken.items():
                    phases[phase][value].append(measure)
    return {phase: _summary(axis, found) for phase, found in phases.items()}


def _summary(axis: str, found: dict[int, list[Measure]]) -> dict[str, Any]:
    sizes = list(found)
    seconds = [statistics.median(one.seconds for one in runs) for runs in found.values()]
    megabytes = [max(one.megabytes for one in runs) for runs in found.values()]
    summary = {
        "sizes": sizes,
        "seconds": [round(value, 4) for value in seconds],
        "megabytes": [round(value, 1) for value in megabytes],
        "time_exponent": round(exponent(sizes, seconds), 2),
        "memory_exponent": round(exponent(sizes, megabytes), 2),
        "memory_exponent_at_the_end": round(exponent(sizes[-2:], megabytes[-2:]), 2),
    }
    return summary | (separate_attention(sizes, seconds) if axis == "completion" else {})


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of log(value) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def separate_attention(sizes: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """Return attention's share of the time, and the exponent of the other time.

    The fit weights each error by its median, so that short lengths count as much as long ones.
    """
    n, t = np.array(sizes, float), np.array(seconds)
    (_, square), *_ = np.linalg.lstsq(np.stack([n, n**2], 1) / t[:, None], np.ones(len(n)))
    quadratic = max(0.0, square) * n**2
    return {
        "attention": round(float(quadratic[-1] / t[-1]), 2),
        "time_exponent_without": round(exponent(n.tolist(), (t - quadratic).tolist()), 2),
    }


def line(axis: str, phase: str, found: dict[str, Any]) -> str:
    """Return one line of text about one phase of an axis."""
    text = f"{axis:>10} {phase:<10}  time ^{found['time_exponent']:.2f}"
    if "attention" in found:
        text += f" (^{found['time_exponent_without']:.2f} without attention's "
        text += f"{found['attention']:.0%})"
    text += f"  memory ^{found['memory_exponent']:.2f}"
    text += f" (at the end ^{found['memory_exponent_at_the_end']:.2f})  "
    rows = zip(found["sizes"], found["seconds"], found["megabytes"], strict=True)
    return text + ", ".join(f"{n}: {s:.2f} s {m:.0f} MB" for n, s, m in rows)


def main() -> None:
    parser = MeasurementParser(__doc__, runs=3)
    parser.add_argument("--only", choices=AXES, action="append", help="default: every axis")
    options = parser.options()
    found: dict[str, Any] = {}
    for axis in options.only or AXES:
        found[axis] = measure_axis(axis, options.runs)
        if not options.json:
            for phase, summary in found[axis].items():
                print(line(axis, phase, summary), flush=True)
    asked = {"runs": options.runs, "dtype": default_dtype(), "otherwise": asdict(Size())}
    record = {"setting": setting() | asked, "axes": found}
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    if options.json:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
