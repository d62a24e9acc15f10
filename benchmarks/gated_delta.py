"""Compare the gradient of the gated delta rule in chunks with mlx-lm's loop over time.

One layer has 8 heads of 128 key and 128 value dimensions, and one row. The script reports the
processor's seconds of a forward and a backward pass, and the peak memory above the inputs. Seconds
of the processor, unlike those of a clock, do not count what other programs take.

    python benchmarks/gated_delta.py --json --output benchmarks/results/gated_delta.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_ops, normalize_qk
from setting import setting

from textpolicy import fast_cpu
from textpolicy.layer_gradients.gated_delta import gated_delta_in_chunks

HEADS, WIDTH = 8, 128
Arrays = list[mx.array]


def loop_over_time(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the results of mlx-lm's loop."""
    return gated_delta_ops(q, k, v, mx.exp(log_decay), beta)


def random_inputs(tokens: int, decay: str) -> Arrays:
    """Return random arrays, with a decay for each head or for each key dimension."""
    heads, wide = (1, tokens, HEADS), (1, tokens, HEADS, WIDTH)
    q, k = normalize_qk(
        mx.random.normal(wide), mx.random.normal(wide), inv_scale=WIDTH**-0.5, eps=1e-6
    )
    log_decay = -mx.exp(mx.random.normal(wide if decay == "dimension" else heads) - 2)
    arrays = [q, k, mx.random.normal(wide), log_decay, mx.sigmoid(mx.random.normal(heads))]
    mx.eval(arrays)
    return arrays


def measured(function: Callable[..., Any], arrays: Arrays, runs: int) -> dict[str, float]:
    """Return the median seconds and the peak megabytes of a forward and a backward pass."""
    seconds: list[float] = []
    gradient = mx.grad(lambda *arrays: function(*arrays)[0].square().sum(), argnums=[*range(5)])
    peak = 0
    for _ in range(runs + 1):
        mx.clear_cache()
        mx.reset_peak_memory()
        before, started = mx.get_active_memory(), time.process_time()
        mx.eval(gradient(*arrays))
        seconds.append(time.process_time() - started)
        peak = mx.get_peak_memory() - before
    return {
        "processor_seconds": round(statistics.median(seconds[1:]), 3),
        "megabytes": round(peak / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument(
        "--loop-tokens", type=int, default=1024, help="the longest row for mlx-lm's loop"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the object to a file too"
    )
    options = parser.parse_args()
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}; expected at least 1")
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    results: list[dict[str, Any]] = []
    for decay in ("head", "dimension"):
        for tokens in options.tokens:
            arrays = random_inputs(tokens, decay)
            row: dict[str, Any] = {"decay": decay, "tokens": tokens}
            row["chunks"] = measured(gated_delta_in_chunks, arrays, options.runs)
            if tokens <= options.loop_tokens:
                row["loop"] = measured(loop_over_time, arrays, options.runs)
            results.append(row)
    record = {"setting": setting() | {"runs": options.runs}, "results": results}
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    if options.json:
        print(json.dumps(record, indent=1))
        return
    for row in results:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
