"""Compare the speed of generation with mlx-lm's generator and with the matrix products alone.

    python benchmarks/generate.py --json --output benchmarks/results/generate.json

The model is the Qwen3 of random weights of grpo_step.py, in float32 on a CPU and in bfloat16 on a
GPU. Prompts and completions have 64 tokens, and no completion ends early. "ours" is the whole call
of a policy: it reads each prompt once for a group of 8, draws with a random key for each row, and
keeps the log-probability of each token. "mlx_lm" is mlx-lm's `BatchGenerator` with all rows at
once: it reads the prompt of every row, and keeps no log-probabilities. "products" are only the
matrix products of the decode steps, so no generator can be faster.

All run in turns in one process, on a CPU with the same BLAS. The script reports medians.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from grpo_step import VOCABULARY, prompts, write_model, write_tokenizer
from measurement import MeasurementParser, output_record
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from setting import default_dtype, setting

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.generation.mlx_generation import create_policy, load_model

GROUP, PROMPT, COMPLETION = 8, 64, 64
ROWS = (1, 8, 32, 64)

Generate = Callable[[], object]


def ours(model: nn.Module, tokenizer: TokenizerWrapper, rows: int) -> Generate:
    """Return a call of a policy, for groups of 8 or for one completion."""
    size = min(GROUP, rows)
    texts = prompts(rows // size, PROMPT, VOCABULARY)
    policy = create_policy(model, tokenizer, {"max_tokens": COMPLETION, "seed": 0})

    def generate() -> None:
        groups = policy.generate(texts, n=size)
        assert sum(len(one.tokens) for group in groups for one in group) == rows * COMPLETION

    return generate


def mlx_lm(model: nn.Module, tokenizer: TokenizerWrapper, rows: int) -> Generate:
    """Return a call of mlx-lm, in which each row has its own copy of the prompt."""
    size = min(GROUP, rows)
    texts = prompts(rows // size, PROMPT, VOCABULARY)
    tokens = [tokenizer.encode(text) for text in texts for _ in range(size)]

    def generate() -> None:
        generator = BatchGenerator(
            model,
            max_tokens=COMPLETION,
            sampler=make_sampler(temp=1.0),
            completion_batch_size=rows,
            prefill_batch_size=rows,
        )
        generator.insert(tokens)
        count = 0
        while any(responses := generator.next()):
            count += len(responses[1])
        generator.close()
        assert count == rows * COMPLETION

    return generate


def products(model: nn.Module, rows: int) -> Generate:
    """Return a function that computes the matrix products of all decode steps."""
    weights = [w for name, w in tree_flatten(model.parameters()) if w.ndim == 2]
    inputs = [mx.random.normal((rows, weight.shape[1]), weight.dtype) for weight in weights]
    mx.eval(inputs)

    def generate() -> None:
        for _ in range(COMPLETION):
            mx.eval([x @ weight.T for x, weight in zip(inputs, weights, strict=True)])

    return generate


def seconds(run: Generate) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(folder: str, rows: int, runs: int) -> dict[str, Any]:
    """Return the tokens per second of each way, and their ratios."""
    plain, tokenizer = load_model(folder)
    adapted, _ = load_model(folder)
    container = AdapterContainer.from_model(adapted, AdapterConfig(rank=8, scale=2.0))
    container.swap({n: a + 0.01 for n, a in container.parameters().items()})
    ways = {
        "ours": ours(plain, tokenizer, rows),
        "ours_with_lora": ours(adapted, tokenizer, rows),
        "mlx_lm": mlx_lm(plain, tokenizer, rows),
        "products": products(plain, rows),
    }
    for run in ways.values():
        run()
    turns = [{name: seconds(run) for name, run in ways.items()} for _ in range(runs)]
    times = {name: statistics.median(turn[name] for turn in turns) for name in ways}
    return {
        "rows": rows,
        "tokens_per_second": {n: round(rows * COMPLETION / t) for n, t in times.items()},
        "times_as_fast_as_mlx_lm": round(times["mlx_lm"] / times["ours"], 3),
        "share_of_the_speed_without_lora": round(times["ours"] / times["ours_with_lora"], 3),
        "share_of_the_time_in_products": round(times["products"] / times["ours"], 3),
    }


def main() -> None:
    parser = MeasurementParser(__doc__, runs=7, threads=os.cpu_count())
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="separated by commas")
    options = parser.options()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), default_dtype())
        write_tokenizer(Path(folder))
        found = [compare(folder, int(rows), options.runs) for rows in options.rows.split(",")]
    asked = {"runs": options.runs, "vocabulary": VOCABULARY, "dtype": default_dtype()}
    output_record({"setting": setting() | asked, "results": found}, [*map(str, found)], options)


if __name__ == "__main__":
    main()
