"""Compare the time of a decode step with other generators and with the limit of the machine.

    make real-model
    python benchmarks/decode.py --output benchmarks/results/decode.json
    python benchmarks/decode.py --page docs/benchmarks.md

Prompts are 64 random tokens, and every row is decoded to the end on every side. The prompts are
read before the time starts: of transformers, the time of a call that draws one token is taken off.
"ours" draws with a random key for each row and keeps the log-probability of each token;
"ours_with_lora" has unmerged LoRA of rank 8 on every linear layer, and "ours_merged" has the same
LoRA merged into float32 weights, as `--merge-adapters` does; "products" are the matrix products of
a step alone. On a CPU, "ours_with_dora" has DoRA of rank 8, and "ours_int4", "ours_int4_with_lora"
and "products_int4" have the same weights in 4 bits, with a scale and a bias for 64 weights; their
limit has the bytes of all these. Also on a CPU, "mlx_lm_by_openblas" is mlx-lm's `BatchGenerator`
on a model that mlx-lm has loaded, with OpenBLAS, because the BLAS of its wheel is some thirty times
slower; "mlx_lm" is the same generator with our compiled products and functions, without our
attention, rotary embeddings and blocks of a decode step, which only our engine calls.
"ours_by_openblas" is a process in which OpenBLAS multiplies few rows too.

On a CPU, all weights are float32, and transformers also runs in bfloat16. On a GPU, all sides have
the weights in the dtype of the checkpoint, "mlx_lm" is the generator as it is, "ours_merged" runs
only where the weights are float32, and the sides by OpenBLAS are left out. "transformers" is its
plain `generate`, without torch.compile.

No step can be faster than the limit: the time in which memory gives all weights once, or the time
of all multiplications, whichever is longer. Both speeds are measured in the same run: on a CPU by
dot products of long vectors and by the product of two matrices, on a GPU by negations of a large
array, which read and write it, and by products of two large matrices in the dtype of the weights.

The sides take turns. The script reports medians, quartiles, and ratios of medians. transformers
runs in an environment of its own, `build/peers/trl`; see grpo_step.py.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from grpo_step import LibraryProcess, find_interpreters, running
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from pages import write_page
from setting import on_gpu, setting

from textpolicy import fast_cpu
from textpolicy.adapters import AdapterConfig, AdapterContainer, quantize
from textpolicy.adapters.merged_copy import MergedCopy
from textpolicy.fast_cpu.bfloat16_copies import keep_copies
from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine, can_launch_ahead
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.sampling import random_keys
from textpolicy.types import Sampling

HERE = Path(__file__).parent
MODEL = HERE.parent / "build" / "smollm2-135m"
RECORD = HERE / "results" / "decode.json"
ROWS = (1, 8, 32)
# Decimals of milliseconds. A step on a GPU takes only a few milliseconds.
DIGITS = 3 if on_gpu() else 1
PROMPT, STEPS = 64, 32
MARK = "<!-- tables of decode.py -->"
COLUMNS = {
    "ours": "TextPolicy",
    "ours_with_lora": "with LoRA",
    "ours_merged": "with merged LoRA",
    "ours_with_dora": "with DoRA",
    "ours_by_openblas": "by OpenBLAS alone",
    "mlx_lm_by_openblas": "mlx-lm by OpenBLAS",
    "mlx_lm": "mlx-lm with our products",
    "transformers": "transformers",
    "transformers_in_bfloat16": "transformers in bfloat16",
    "products": "products",
}

OWN = ("ours", "ours_with_lora", "ours_merged", "ours_with_dora", "products")
OTHERS = [name for name in COLUMNS if name not in OWN]
PACKED_COLUMNS = {
    "ours_int4": "4 bits",
    "ours_int4_with_lora": "4 bits with LoRA",
    "products_int4": "products in 4 bits",
}

Seconds = Callable[[], float]
"""Decodes all steps once; returns the seconds of one step."""


def prompts(rows: int, vocabulary: int) -> list[list[int]]:
    """Return random tokens, the same for every side."""
    drawn = np.random.default_rng(0).integers(vocabulary // 2, size=(rows, PROMPT))
    return drawn.tolist()


def ours(model: nn.Module, texts: Sequence[list[int]]) -> float:
    engine = Engine(model, launch_ahead=can_launch_ahead())
    keys = random_keys(0, [(number, 0) for number in range(len(texts))])
    sampling = Sampling(max_tokens=1 + STEPS, temperature=1.0)
    for text, key in zip(texts, keys, strict=True):
        engine.submit([DecodingRow(context=text, sampling=sampling, stop=lambda _: None, key=key)])
    engine.step()
    started = time.perf_counter()
    while engine.can_step:
        engine.step()
    return (time.perf_counter() - started) / STEPS


def mlx_lm(model: nn.Module, texts: Sequence[list[int]]) -> float:
    rows = len(texts)
    generator = BatchGenerator(
        model,
        max_tokens=1 + STEPS,
        sampler=make_sampler(temp=1.0),
        completion_batch_size=rows,
        prefill_batch_size=rows,
    )
    generator.insert([*texts])
    drawn, started = 0, 0.0
    while drawn < rows * (1 + STEPS):
        drawn += len(generator.next()[1])
        if drawn == rows:
            started = time.perf_counter()
    seconds = time.perf_counter() - started
    generator.close()
    return seconds / STEPS


def matrices(model: nn.Module) -> list[mx.array]:
    """Return the weights of all products of a step; the embedding table is also the head."""
    named = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    return [weight for _, weight in named if weight.ndim == 2]


def products(model: nn.Module, rows: int) -> float:
    weights = matrices(model)
    inputs = [mx.random.normal((rows, weight.shape[1]), weight.dtype) for weight in weights]
    return seconds_of([partial(multiply, weight) for weight in weights], inputs)


def multiply(weight: mx.array, x: mx.array) -> mx.array:
    return x @ weight.T


def seconds_of(
    functions: Sequence[Callable[[mx.array], mx.array]], inputs: Sequence[mx.array]
) -> float:
    """Return the seconds of these products. Python has made them before the time starts."""
    mx.eval(inputs)
    pairs = list(zip(functions, inputs, strict=True))
    with without_gradients():
        made = [[product(x) for product, x in pairs] for _ in range(4)]
    started = time.perf_counter()
    for some in made:
        mx.eval(some)
    return (time.perf_counter() - started) / len(made)


def packed_products(model: nn.Module, rows: int) -> float:
    layers = [one for one in model.modules() if isinstance(one, nn.QuantizedLinear)]
    (table,) = (one for one in model.modules() if isinstance(one, nn.QuantizedEmbedding))
    # The embedding table is also the head.
    functions = [*layers, table.as_linear]
    widths = [one["scales"].shape[1] * one.group_size for one in (*layers, table)]
    return seconds_of(functions, [mx.random.normal((rows, width)) for width in widths])


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of all quantized weights with their scales and biases."""
    packed = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    modules = [one for one in model.modules() if isinstance(one, packed)]
    return sum(one[name].nbytes for one in modules for name in ("weight", "scales", "biases"))


def transformers(side: LibraryProcess) -> float:
    parts = side.step()
    return (parts["prompt and steps"] - parts["prompt"]) / STEPS


def bytes_a_second(threads: int) -> float:
    """Return how fast memory gives numbers: dot products of vectors of 64 MB, by all threads."""
    vectors = [np.ones(2**24, np.float32) for _ in range(threads)]

    def read(vector: np.ndarray) -> None:
        for half in (vector[: 2**23], vector[2**23 :]):
            np.dot(half, half)

    best = float("inf")
    for _ in range(5):
        workers = [threading.Thread(target=read, args=(vector,)) for vector in vectors]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - started)
    return threads * 2**26 / best


def fastest(make: Callable[[], list[mx.array]]) -> float:
    """Return the seconds in which a GPU computes the arrays: the fewest of several runs."""
    times: list[float] = []
    for _ in range(6):
        mx.synchronize()
        started = time.perf_counter()
        mx.eval(make())
        times.append(time.perf_counter() - started)
    # The first run compiles the kernels.
    return min(times[1:])


def gpu_bytes_a_second() -> float:
    """Return how fast a GPU reads and writes memory: negations of an array of 512 MB."""
    array, count = mx.ones(2**27), 32
    mx.eval(array)

    def negate() -> list[mx.array]:
        negated = array
        for _ in range(count):
            negated = -negated
        return [negated]

    return count * 2 * array.nbytes / fastest(negate)


def gpu_operations_a_second(dtype: mx.Dtype) -> float:
    """Return how fast a GPU multiplies and adds: products of square matrices in this dtype."""
    size, count = 8192, 4
    matrix = mx.random.normal((size, size), dtype)
    mx.eval(matrix)
    return count * 2 * size**3 / fastest(lambda: [matrix @ matrix for _ in range(count)])


def limit(weights: int, size: float, rows: int, threads: int, dtype: mx.Dtype) -> dict[str, float]:
    """Return the shortest time of a step, and what it is measured from.

    A weight has `size` bytes.
    """
    if on_gpu():
        speed, memory = gpu_operations_a_second(dtype), gpu_bytes_a_second()
    else:
        speed, memory = fast_cpu.measure_gflops() * 1e9, bytes_a_second(threads)
    return {
        "gflops": round(speed / 1e9, 1),
        "gigabytes_a_second": round(memory / 1e9, 1),
        "milliseconds": 1000 * max(size * weights / memory, 2 * weights * rows / speed),
    }


def adapted_model(folder: Path, *, int4: bool = False, **options: Any) -> nn.Module:
    """Return the model with adapters of rank 8 that change what it computes."""
    model, _ = load_model(folder)
    if int4:
        quantize(model, bits=4)
    container = AdapterContainer.from_model(model, AdapterConfig(rank=8, scale=2.0, **options))
    container.swap({name: a + 0.01 for name, a in container.parameters().items()})
    return model


def compare(options: argparse.Namespace, rows: int) -> dict[str, Any]:
    """Let all sides take turns; return the times of a step and their ratios."""
    model, _ = load_model(options.model)
    adapted = adapted_model(options.model)
    shapes = [weight.shape for weight in matrices(model)]
    dtype = matrices(model)[0].dtype
    texts = prompts(rows, shapes[0][0])
    task = {"model": str(options.model), "prompts": texts, "steps": STEPS}
    task |= {"threads": options.threads}
    sides: dict[str, Seconds] = {
        "ours": partial(ours, model, texts),
        "ours_with_lora": partial(ours, adapted, texts),
    }
    if dtype == mx.float32:
        sides["ours_merged"] = partial(ours, MergedCopy(adapted).refresh(), texts)
    packed = None
    if not on_gpu():
        packed, _ = load_model(options.model)
        quantize(packed, bits=4)
        packed_with_lora = adapted_model(options.model, int4=True)
        with_dora = adapted_model(options.model, kind="dora")
        sides |= {
            "ours_with_dora": partial(ours, with_dora, texts),
            "ours_int4": partial(ours, packed, texts),
            "ours_int4_with_lora": partial(ours, packed_with_lora, texts),
            "products_int4": partial(packed_products, packed, rows),
        }
    sides |= {
        "mlx_lm": partial(mlx_lm, model, texts),
        "products": partial(products, model, rows),
    }
    with ExitStack() as stack:
        processes = dict(other_processes(stack, task, dtype))
        for name, process in processes.items():
            sides[name] = partial(transformers, process)
        for side in sides.values():
            side()
        turns = [{name: side() for name, side in sides.items()} for _ in range(options.runs)]
    copied = keep_copies(model, 1 << 60) > 0
    size = (mx.bfloat16 if copied else dtype).size
    count = sum(a * b for a, b in shapes)
    bound = limit(count, size, rows, options.threads, dtype)
    bounds = dict.fromkeys(sides, bound)
    if packed is not None:
        of_packed = limit(count, packed_bytes(packed) / count, rows, options.threads, dtype)
        bounds |= dict.fromkeys(PACKED_COLUMNS, of_packed)
    times = {name: sorted(1000 * turn[name] for turn in turns) for name in sides}
    medians = {name: statistics.median(some) for name, some in times.items()}
    return {
        "rows": rows,
        "versions": {name: process.facts for name, process in processes.items()},
        "milliseconds": {name: round(median, DIGITS) for name, median in medians.items()},
        "quartiles": {name: quartiles(some) for name, some in times.items()},
        "others_over_ours": {
            name: round(medians[name] / medians["ours"], 2) for name in OTHERS if name in medians
        },
        "fraction_in_products": round(medians["products"] / medians["ours"], 2),
        "bytes_of_a_weight": size,
        "limit": bound,
        "limits": {name: one["milliseconds"] for name, one in bounds.items()},
        "fraction_of_the_limit": {
            name: round(bounds[name]["milliseconds"] / median, 3)
            for name, median in medians.items()
        },
    }


def other_processes(
    stack: ExitStack, task: Any, dtype: mx.Dtype
) -> Iterator[tuple[str, LibraryProcess]]:
    """Start transformers, if it is installed, with weights of this dtype.

    On a CPU, also start transformers in bfloat16, and both libraries without our compiled loops.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    task = task | {"dtype": str(dtype).removeprefix("mlx.core.")}
    (folder / "task.json").write_text(json.dumps(task))
    found = find_interpreters(["trl"])
    by_openblas = () if on_gpu() else ("ours_by_openblas", "mlx_lm_by_openblas")
    pythons = dict.fromkeys(by_openblas, found["ours"])
    pythons |= {"transformers": found["trl"]} if "trl" in found else {}
    for name, python in pythons.items():
        yield name, stack.enter_context(running(name, python, folder / "task.json"))
    if "trl" in found and not on_gpu():
        (folder / "bfloat16.json").write_text(json.dumps(task | {"dtype": "bfloat16"}))
        process = running("transformers", found["trl"], folder / "bfloat16.json")
        yield "transformers_in_bfloat16", stack.enter_context(process)


def tables(results: Sequence[Any]) -> str:
    """Return the record as tables: milliseconds of a step, and the ratios."""
    names = [name for name in COLUMNS if name in results[0]["milliseconds"]]
    columns = dict(COLUMNS)
    if "mlx_lm_by_openblas" not in names:
        columns["mlx_lm"] = "mlx-lm"
    lines = [f"| rows | {' | '.join(columns[name] for name in names)} | limit |"]
    lines += ["|---" * (len(names) + 2) + "|"]
    for one in results:
        cells = [cell(one["milliseconds"][name], one["quartiles"][name]) for name in names]
        shortest = one["limit"]["milliseconds"]
        shown = f"{shortest:.1f}" if shortest >= 1 else f"{shortest:.3f}"
        lines.append(f"| {one['rows']} | {' | '.join(cells)} | {shown} |")
    others = [name for name in names if name in results[0]["others_over_ours"]]
    lines += ["", f"| rows | {' | '.join(columns[name] for name in others)} | of the limit |"]
    lines += ["|---" * (len(others) + 2) + "|"]
    for one in results:
        ratios = [f"{one['others_over_ours'][name]:.2f}" for name in others]
        share = one["fraction_of_the_limit"]["ours"]
        lines.append(f"| {one['rows']} | {' | '.join(ratios)} | {share:.0%} |")
    if "ours_int4" in results[0]["milliseconds"]:
        lines += ["", *packed_table(results)]
    return "\n".join(lines)


def packed_table(results: Sequence[Any]) -> list[str]:
    """Return the table of weights in 4 bits: milliseconds of a step, and shares of the limit."""
    shares = ["step, of the limit", "products, of the limit"]
    lines = [f"| rows | {' | '.join([*PACKED_COLUMNS.values(), 'limit', *shares])} |"]
    lines += ["|---" * (len(PACKED_COLUMNS) + 4) + "|"]
    for one in results:
        cells = [cell(one["milliseconds"][name], one["quartiles"][name]) for name in PACKED_COLUMNS]
        cells.append(f"{one['limits']['ours_int4']:.1f}")
        of_limit = one["fraction_of_the_limit"]
        cells += [f"{of_limit[name]:.0%}" for name in ("ours_int4", "products_int4")]
        lines.append(f"| {one['rows']} | {' | '.join(cells)} |")
    return lines


def cell(median: float, spread: Sequence[float]) -> str:
    return f"{median} ({spread[0]} to {spread[1]})"


def quartiles(times: Sequence[float]) -> list[float]:
    first, _, third = statistics.quantiles(times, n=4)
    return [round(first, DIGITS), round(third, DIGITS)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder (default: SmolLM2)")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="separated by commas")
    parser.add_argument("--runs", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the object to a file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the record's tables there")
    options = parser.parse_args()
    if options.page:
        write_page(options.page, MARK, tables(json.loads(RECORD.read_text())["results"]))
        return
    if options.runs < 2:
        parser.error(f"--runs is {options.runs}; expected at least 2")
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(options.threads)
    found = [compare(options, int(rows)) for rows in options.rows.split(",")]
    asked = {
        "runs": options.runs,
        "model": options.model.name,
        "few_rows": fast_cpu.enable().few_rows,
    }
    record = {"setting": setting() | asked, "results": found}
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
