"""Compare the trainer's training step with a compiled step.

    python benchmarks/compiled.py --json

Both compute the gradient of GRPO's loss on one batch of the embedded model with LoRA: "eager" as
the trainer does, and "compiled" with `mx.compile` for the shape of this batch. This is the best
case of compiling: real batches differ in shape from step to step, and each new shape costs a first
call. The script reports medians over runs in turn. On CPUs, compiled code needs a C++ compiler.
Without sharing, the prompt is repeated in every row, as for models without plain attention.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from setting import setting

from textpolicy import fast_cpu
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer
from textpolicy.algorithms import grpo
from textpolicy.generation.mlx_generation import load_model
from textpolicy.training.logprobs import ModelLogprobs
from textpolicy.training.output_head import find_output_head
from textpolicy.training.shared_prompts import run_whole_rows, run_with_shared_prompts
from textpolicy.training.token_logprobs import logprobs_from_logits
from textpolicy.types import Batch

PROMPTS, GROUP = 16, 8


def batch_of(prompt: int, completion: int, *, prompts: int = PROMPTS, group: int = GROUP) -> Batch:
    """Return a batch of random tokens: by default 16 prompts with 8 completions each."""
    rows = prompts * group
    shape = (rows, completion)
    return Batch(
        prompts=mx.random.randint(5, 250, (prompts, prompt)),
        prompt_lengths=mx.full((prompts,), prompt),
        owner=mx.repeat(mx.arange(prompts), group),
        group=mx.repeat(mx.arange(prompts), group),
        tokens=mx.random.randint(5, 250, shape),
        mask=mx.ones(shape, dtype=mx.bool_),
        logp_sampled=mx.full(shape, -1.0),
        logp_old=mx.full(shape, -1.0),
        advantages=mx.random.normal(shape),
        temperature=mx.ones(rows),
        rows=rows,
        token_count=rows * completion,
        max_tokens=completion,
    )


def eager(model: nn.Module, batch: Batch, *, share: bool) -> Callable[[], Any]:
    """Return a function that computes the gradient as the trainer does."""
    read = ModelLogprobs(model, find_output_head(model), share)

    def objective() -> mx.array:
        return grpo.policy_loss(read(batch)[0], batch)[0]

    return nn.value_and_grad(model, objective)


def compiled(model: nn.Module, batch: Batch, *, share: bool) -> Callable[[], Any]:
    """Return a function that is compiled for the shape of this batch. It makes all logits."""
    temperature = mx.repeat(batch.temperature, batch.tokens.shape[1])

    def objective(tokens: mx.array) -> mx.array:
        now = Batch(**{**vars(batch), "tokens": tokens})
        logits = run_with_shared_prompts(model, model, now) if share else run_whole_rows(model, now)
        flat = logits.reshape(-1, logits.shape[-1])
        logp, _ = logprobs_from_logits(flat, tokens.flatten(), temperature)
        return grpo.policy_loss(logp.reshape(tokens.shape), batch)[0]

    run = mx.compile(
        nn.value_and_grad(model, objective), inputs=[model.state], outputs=[model.state]
    )
    return lambda: run(batch.tokens)


def seconds(function: Callable[[], Any]) -> float:
    """Return the time of one call, with the evaluation of its result."""
    started = time.perf_counter()
    mx.eval(function())
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9, help="default: 9")
    lengths = ["18+6", "64+64"]
    text = "tokens of prompts and completions (default: 18+6 64+64)"
    parser.add_argument("--lengths", nargs="+", metavar="P+C", default=lengths, help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}; expected at least 1")
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    model, _ = load_model("tiny")
    AdapterContainer.from_model(model, AdapterConfig(rank=16))
    records: list[dict[str, Any]] = []
    for share in (True, False):
        for text in options.lengths:
            prompt, completion = map(int, text.split("+"))
            batch = batch_of(prompt, completion)
            ways = {name: way(model, batch, share=share) for name, way in WAYS.items()}
            times: dict[str, list[float]] = {name: [] for name in ways}
            for way in ways.values():
                seconds(way)
            for _ in range(options.runs):
                for name, way in ways.items():
                    times[name].append(seconds(way))
            other = compiled(model, batch_of(prompt + 1, completion), share=share)
            new_shape = round(seconds(other), 4)
            medians = {name: round(statistics.median(t), 4) for name, t in times.items()}
            record = {"prompt": prompt, "completion": completion, "prompt_once_a_group": share}
            records.append(record | medians | {"compiled_first_call": new_shape})
            print(records[-1], file=sys.stderr)
    if options.json:
        print(json.dumps({"setting": setting() | {"runs": options.runs}, "seconds": records}))
    return 0


WAYS = {"eager": eager, "compiled": compiled}

if __name__ == "__main__":
    sys.exit(main())
