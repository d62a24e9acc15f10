"""Measure the exact ways to multiply with quantized weights on this machine.

For each number format and number of rows, the script measures mlx's kernel for quantized weights, a
product with the weights unpacked to floats first by mlx, and the layer of this library. With many
rows, `textpolicy.adapters.quantization.packed_product` takes the second way; for weights of 4 and 8
bits it has compiled functions. The three take turns.

    python benchmarks/products.py --output benchmarks/results/products.json
    python benchmarks/products.py --page docs/adapters.md
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from pages import write_page
from setting import setting

from textpolicy import fast_cpu
from textpolicy.adapters.quantization.nf4 import NF4Linear, unpack_nf4
from textpolicy.adapters.quantization.packed_product import use_fast_products
from textpolicy.adapters.quantization.stored_weights import float_weight

FORMATS = [(4, "affine"), (8, "affine"), (4, "mxfp4"), (8, "mxfp8"), (4, "nvfp4")]
ROWS = (1, 2, 3, 4, 8, 16, 24, 32, 64, 128)


_TOGETHER = 4  # Products that are timed together.


RECORD = Path(__file__).parent / "results" / "products.json"
MARK = "<!-- table of products.py -->"
_SHOWN_ROWS = (1, 8, 64, 128)
_NAMES = {"affine 4-bit": "int4", "affine 8-bit": "int8", "mxfp4 4-bit": "mxfp4"}
_NAMES |= {"mxfp8 8-bit": "mxfp8", "nvfp4 4-bit": "nvfp4", "nf4": "nf4"}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--size", type=int, default=1024, help="inputs and outputs of the layer")
    options.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options.add_argument("--output", type=Path, metavar="FILE", help="write the object to a file")
    options.add_argument("--page", type=Path, metavar="FILE", help="write the record's table there")
    arguments = options.parse_args()
    if arguments.page:
        write_page(arguments.page, MARK, table(json.loads(RECORD.read_text())["milliseconds"]))
        return
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    results = [row for rows in ROWS for row in measure(arguments.size, rows)]
    record = {"setting": setting() | {"size": arguments.size}, "milliseconds": results}
    text = json.dumps(record, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text if arguments.json else table(results))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the milliseconds of mlx's kernel, of unpacking by mlx, and of our layer."""
    heads = [f"{rows} row{'s' if rows > 1 else ''}" for rows in _SHOWN_ROWS]
    lines = [f"| format | {' | '.join(heads)} |"]
    lines += ["|---" * (len(_SHOWN_ROWS) + 1) + "|"]
    for format_name, name in _NAMES.items():
        found = {one["rows"]: one for one in results if one["format"] == format_name}
        cells = [
            ", ".join(str(found[rows].get(way, "-")) for way in ("kernel", "unpacked", "layer"))
            for rows in _SHOWN_ROWS
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(size: int, rows: int) -> list[dict[str, str | int | float]]:
    """Return the milliseconds of each format with float32 inputs."""
    linear = nn.Linear(size, size, bias=False)
    x = mx.random.normal((rows, size))
    found: list[dict[str, str | int | float]] = []
    for bits, mode in FORMATS:
        layer = nn.QuantizedLinear.from_linear(linear, bits=bits, mode=mode)
        model = nn.Sequential(nn.QuantizedLinear.from_linear(linear, bits=bits, mode=mode))
        use_fast_products(model)
        ways = {
            "kernel": lambda layer=layer: layer(x),
            "unpacked": lambda layer=layer: x @ float_weight(layer).T,
            "layer": lambda model=model: model(x),
        }
        found.append({"format": f"{mode} {bits}-bit", "rows": rows, **milliseconds(ways)})
    layer = NF4Linear.from_linear(linear)
    ways = {
        "unpacked": lambda: x @ unpack_nf4(layer.weight, layer.scales).T,
        "layer": lambda: layer(x),
    }
    found.append({"format": "nf4", "rows": rows, **milliseconds(ways)})
    plain = milliseconds({"plain": lambda: linear(x)})
    found.append({"format": "float32", "rows": rows, **plain})
    return found


def milliseconds(ways: Mapping[str, Callable[[], mx.array]], repeats: int = 7) -> dict[str, float]:
    """Return the least time of some repeats of each way, because the machine may be busy."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    # The first time prepares what the others find ready.
    for repeat in range(repeats + 1):
        for name, compute in ways.items():
            started = time.perf_counter()
            mx.eval([compute() for _ in range(_TOGETHER)])
            if repeat:
                times[name].append((time.perf_counter() - started) / _TOGETHER)
    return {name: round(1000 * min(some), 2) for name, some in times.items()}


if __name__ == "__main__":
    main()
