"""Compare our attention, SwiGLU, norm and exponential functions on a CPU with mlx's, in turns.

For each function and shape the script reports the forward pass and the pass with the gradient:
median milliseconds, and the peak memory above the inputs.

    python benchmarks/functions.py --json --output benchmarks/results/functions.json
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from measurement import MeasurementParser, output_record
from mlx_lm.models import activations, base
from setting import setting

from textpolicy.fast_cpu.attention import scaled_dot_product_attention
from textpolicy.fast_cpu.exponential import exp
from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.fast_cpu.mlx_operations import reason_of_none
from textpolicy.fast_cpu.model_functions import swiglu
from textpolicy.fast_cpu.rms_norm import FastRMSNorm

WIDTH = 64
# Rows, query heads, key heads, query positions, key positions.
ATTENTION = {
    "decoding 32 rows": (32, 4, 2, 1, 96),
    "8 completions": (8, 4, 2, 64, 127),
    "1,024 tokens": (1, 4, 2, 1024, 1024),
    "4,096 tokens": (1, 4, 2, 4096, 4096),
}
TOKENS = {"decoding 32 rows": 32, "8 completions": 575, "1,024 tokens": 1024}


class Pair(NamedTuple):
    """mlx's function and ours, with the inputs of both."""

    function: str
    shape: str
    mlx: Callable[..., mx.array]
    ours: Callable[..., mx.array]
    inputs: list[mx.array]


def pairs(longest: int) -> Iterator[Pair]:
    """Yield every function with every shape of at most `longest` tokens."""
    for shape, (rows, heads, key_heads, queries, keys) in ATTENTION.items():
        if keys > longest:
            continue
        sizes = ((heads, queries), (key_heads, keys), (key_heads, keys))
        inputs = [mx.random.normal((rows, *size, WIDTH)) for size in sizes]
        mask = "causal" if queries > 1 else None
        mlx, ours = (
            partial(function, cache=None, scale=WIDTH**-0.5, mask=mask)
            for function in (base.scaled_dot_product_attention, scaled_dot_product_attention)
        )
        yield Pair("attention", shape, mlx, ours, inputs)
    for shape, tokens in TOKENS.items():
        if tokens <= longest:
            inputs = [mx.random.normal((tokens, 768)) for _ in range(2)]
            yield Pair("swiglu", shape, activations.swiglu, swiglu, inputs)
            norms = nn.RMSNorm(768), FastRMSNorm(768)
            yield Pair("norm", shape, *norms, inputs[:1])
    yield Pair("exp", "a million numbers", mx.exp, exp, [mx.random.normal((2**20,))])


def measured(pair: Pair, runs: int) -> dict[str, Any]:
    """Return the times and the peak memory of both functions, which run in turns."""
    found: dict[str, Any] = {"function": pair.function, "shape": pair.shape}
    weights = mx.random.normal(pair.mlx(*pair.inputs).shape)
    mx.eval(pair.inputs, weights)

    def forwards(function: Callable[..., mx.array]) -> mx.array:
        with without_gradients():
            return function(*pair.inputs)

    ways: dict[str, Callable[..., Any]] = {"forwards": forwards}
    if pair.function != "exp":
        numbers = list(range(len(pair.inputs)))

        def gradient(function: Callable[..., mx.array]) -> Any:
            def total(*inputs: mx.array) -> mx.array:
                return (function(*inputs) * weights).sum()

            return mx.grad(total, argnums=numbers)(*pair.inputs)

        ways["gradient"] = gradient
    for way, compute in ways.items():
        seconds: dict[str, list[float]] = {"mlx": [], "ours": []}
        peaks: dict[str, float] = {}
        for number in range(runs + 1):
            for name, function in (("mlx", pair.mlx), ("ours", pair.ours)):
                before = mx.get_active_memory()
                mx.reset_peak_memory()
                started = time.perf_counter()
                mx.eval(compute(function))
                if number:
                    seconds[name].append(time.perf_counter() - started)
                peaks[name] = (mx.get_peak_memory() - before) / 1e6
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        found[way] = {
            "milliseconds": {name: round(1000 * median, 2) for name, median in medians.items()},
            "megabytes": {name: round(peak, 1) for name, peak in peaks.items()},
            "times_as_fast": round(medians["mlx"] / medians["ours"], 2),
        }
    return found


def main() -> None:
    parser = MeasurementParser(__doc__, runs=9)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the longest shape")
    options = parser.options()
    results = [measured(pair, options.runs) for pair in pairs(options.tokens)]
    asked = {"runs": options.runs, "compiled_operations": not reason_of_none()}
    lines = ["  ".join(f"{name} {value}" for name, value in row.items()) for row in results]
    output_record({"setting": setting() | asked, "results": results}, lines, options)


if __name__ == "__main__":
    main()
