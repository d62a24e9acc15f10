"""Measure what training saves by reading a group's prompt once, and compare the gradients.

    python benchmarks/prompt_sharing.py --json

The script computes the gradient of GRPO's loss on one group in two ways: "shared" reads the prompt
once, as the trainer does; "plain" repeats the prompt in every row, as models without plain
attention need it. The model is the one of `grpo_step.py`. The script reports medians over runs in
turn, the peak memory, the largest difference between the gradients, and the largest number in
them. By default a group has 16 completions of 64 tokens, and its prompt has 64, 256 or 512 tokens.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from compiled import batch_of
from grpo_step import SIZES
from measurement import MeasurementParser, output_record
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from setting import setting

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.algorithms import grpo
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.training.logprobs import ModelLogprobs
from textpolicy.training.output_head import find_output_head
from textpolicy.types import Batch


def adapted_model() -> nn.Module:
    """Return a model of random weights with nonzero adapters, so that no gradient is zero."""
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs(**SIZES))
    use_fast_functions(model)
    mx.eval(model.parameters())
    container = AdapterContainer.from_model(model, AdapterConfig(rank=8, scale=2.0))
    moved = {n: 0.02 * mx.random.normal(v.shape) for n, v in container.parameters().items()}
    container.swap(moved, version=0)
    return model


def gradient(model: nn.Module, batch: Batch, *, share: bool) -> Callable[[], Any]:
    """Return a function that computes and evaluates the gradient of the policy loss."""
    read = ModelLogprobs(model, find_output_head(model), share)
    compute = nn.value_and_grad(model, lambda: grpo.policy_loss(read(batch)[0], batch)[0])

    def run() -> Any:
        _, found = compute()
        mx.eval(found)
        return found

    return run


def largest(tree: Any) -> float:
    """Return the largest absolute number in a tree of arrays."""
    return max(mx.abs(array).max().item() for _, array in tree_flatten(tree))


def measure(model: nn.Module, prompt: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure both ways on one batch, in turns."""
    batch = batch_of(prompt, options.completion_tokens, prompts=1, group=options.group_size)
    ways = {
        "shared": gradient(model, batch, share=True),
        "plain": gradient(model, batch, share=False),
    }
    found = {name: dict(tree_flatten(way())) for name, way in ways.items()}
    difference = largest([found["shared"][name] - found["plain"][name] for name in found["plain"]])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    for _ in range(options.runs):
        for name, way in ways.items():
            mx.reset_peak_memory()
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
            peaks[name] = round(mx.get_peak_memory() / 1e6, 1)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "prompt": prompt,
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "times_faster": round(medians["plain"] / medians["shared"], 2),
        "megabytes": peaks,
        "largest_gradient": largest(found["plain"]),
        "largest_difference": difference,
    }


def main() -> None:
    parser = MeasurementParser(__doc__, runs=5)
    parser.add_argument("--prompt-tokens", default="64,256,512", help="separated by commas")
    parser.add_argument("--completion-tokens", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=16)
    options = parser.options()
    model = adapted_model()
    groups = [measure(model, int(text), options) for text in options.prompt_tokens.split(",")]
    asked = {"group_size": options.group_size, "completion_tokens": options.completion_tokens}
    asked |= {"runs": options.runs}
    output_record({"setting": setting() | asked, "groups": groups}, [*map(str, groups)], options)


if __name__ == "__main__":
    main()
