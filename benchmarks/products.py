"""Measure the two exact ways to multiply with quantized weights on this machine.

For each number format and number of rows, the script measures mlx's kernel for quantized weights,
and a product with the weights unpacked to floats first. With many rows,
`textpolicy.adapters.quantization.packed_product` takes the second way.

    python benchmarks/products.py --json > benchmarks/results/products.json
"""

import argparse
import json
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from setting import setting

from textpolicy import fast_cpu
from textpolicy.adapters.quantization.nf4 import NF4Linear
from textpolicy.adapters.quantization.stored_weights import float_weight

FORMATS = [(4, "affine"), (8, "affine"), (4, "mxfp4"), (8, "mxfp8"), (4, "nvfp4")]
ROWS = (1, 2, 3, 4, 8, 16, 24, 32, 128)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--size", type=int, default=1024, help="inputs and outputs of the layer")
    options.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = options.parse_args()
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    results = [row for rows in ROWS for row in measure(arguments.size, rows)]
    if arguments.json:
        asked = {"size": arguments.size}
        print(json.dumps({"setting": setting() | asked, "milliseconds": results}, indent=1))
        return
    for row in results:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


def measure(size: int, rows: int) -> list[dict[str, str | int | float]]:
    """Return the milliseconds of each format with float32 inputs."""
    linear = nn.Linear(size, size, bias=False)
    x = mx.random.normal((rows, size))
    found: list[dict[str, str | int | float]] = []
    for bits, mode in FORMATS:
        layer = nn.QuantizedLinear.from_linear(linear, bits=bits, mode=mode)
        kernel = milliseconds(lambda layer=layer: layer(x))
        unpacked = milliseconds(lambda layer=layer: x @ float_weight(layer).T)
        name = f"{mode} {bits}-bit"
        found.append({"format": name, "rows": rows, "kernel": kernel, "unpacked": unpacked})
    layer = NF4Linear.from_linear(linear)
    found.append({"format": "nf4", "rows": rows, "unpacked": milliseconds(lambda: layer(x))})
    found.append({"format": "float32", "rows": rows, "plain": milliseconds(lambda: linear(x))})
    return found


def milliseconds(compute: Callable[[], mx.array], repeats: int = 7) -> float:
    """Return the least time of some repeats, because the machine may be busy."""
    mx.eval(compute())
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        mx.eval(compute())
        times.append(time.perf_counter() - started)
    return round(1000 * min(times), 2)


if __name__ == "__main__":
    main()
