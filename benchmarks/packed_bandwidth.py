"""Compare the speed at which products read packed weights with the speed of memory, on a CPU.

    python benchmarks/packed_bandwidth.py --output benchmarks/results/packed_bandwidth.json
    python benchmarks/packed_bandwidth.py --page docs/benchmarks.md

The products are those of a decode step of SmolLM2-135M in 4 bits, NF4 and 8 bits, with groups of 64
weights, by the compiled functions alone: no operation of mlx and no layer is in the time. There are
as many matrices of each shape as the model has blocks, so that they come from memory as in a step.
The bytes are those of codes, scales and biases. The speed of memory is that of dot products of long
vectors by as many threads. Both take turns, and the script reports medians of the shares, with the
least and the most.
"""

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from decode import bytes_a_second
from few_rows import BLOCKS, HIDDEN, KEYS, VOCABULARY, WIDTH
from pages import write_page
from setting import setting

from textpolicy import fast_cpu
from textpolicy.fast_cpu.few_rows import compiled_loops

RECORD = Path(__file__).parent / "results" / "packed_bandwidth.json"
MARK = "<!-- table of packed_bandwidth.py -->"
# How often a block has a shape of outputs and inputs, and the head.
SHAPES = {
    (WIDTH, WIDTH): 2 * BLOCKS,
    (KEYS, WIDTH): 2 * BLOCKS,
    (HIDDEN, WIDTH): 2 * BLOCKS,
    (WIDTH, HIDDEN): BLOCKS,
    (VOCABULARY, WIDTH): 1,
}
GROUP = 64
# The number of a format in C, the bits of a code, and how many floats a group has.
FORMATS = {"4 bits": (1, 4, 2), "NF4": (3, 4, 1), "8 bits": (2, 8, 2)}
ROWS = (1, 2, 4, 8)


class Products:
    """The products of a step in one format."""

    def __init__(self, format: str, rows: int) -> None:
        number, bits, floats = FORMATS[format]
        drawn = np.random.default_rng(0)
        self.calls: list[tuple[Any, Any, Any]] = []
        self.bytes = 0
        # The functions read these arrays by their addresses.
        self.arrays: list[np.ndarray] = []
        for (outputs, inputs), count in SHAPES.items():
            x = drawn.standard_normal((rows, inputs), np.float32)
            y = np.empty((rows, outputs), np.float32)
            groups = inputs // GROUP
            numbers = (ctypes.c_int64 * 20)(rows, outputs, inputs, groups, number)
            for _ in range(count):
                codes = drawn.integers(2**32, size=(outputs, inputs * bits // 32), dtype=np.uint32)
                per_group = [
                    drawn.standard_normal((outputs, groups), np.float32) for _ in range(floats)
                ]
                read = [x, codes, *per_group]
                self.arrays += [*read, y]
                self.bytes += sum(one.nbytes for one in read[1:])
                addresses = [one.ctypes.data for one in read]
                given = (ctypes.c_void_p * len(read))(*addresses)
                self.calls.append((given, (ctypes.c_void_p * 1)(y.ctypes.data), numbers))

    def bytes_a_second(self, turns: int = 5) -> float:
        """Return how fast the products read the weights: the fastest of some turns."""
        multiply = compiled_loops().compiled_packed_product
        best = float("inf")
        for _ in range(turns):
            started = time.perf_counter()
            for call in self.calls:
                multiply(*call)
            best = min(best, time.perf_counter() - started)
        return self.bytes / best


def compare(threads: int, runs: int) -> list[dict[str, Any]]:
    fast_cpu.set_threads(threads)
    results: list[dict[str, Any]] = []
    for format in FORMATS:
        for rows in ROWS:
            products = Products(format, rows)
            turns = [(bytes_a_second(threads), products.bytes_a_second()) for _ in range(runs)]
            shares = [speed / memory for memory, speed in turns]
            memory, speed = (statistics.median(some) / 1e9 for some in zip(*turns, strict=True))
            results.append(
                {
                    "format": format,
                    "threads": threads,
                    "rows": rows,
                    "gigabytes_a_second": round(speed, 1),
                    "gigabytes_a_second_of_memory": round(memory, 1),
                    "share": round(statistics.median(shares), 3),
                    "shares": [round(min(shares), 3), round(max(shares), 3)],
                }
            )
            print(results[-1], flush=True)
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = ["| weights | threads | rows | GB/s | memory, GB/s | share |", "|---" * 6 + "|"]
    for one in results:
        least, most = one["shares"]
        share = f"{one['share']:.2f} ({least:.2f} to {most:.2f})"
        speeds = f"{one['gigabytes_a_second']} | {one['gigabytes_a_second_of_memory']}"
        lines.append(f"| {one['format']} | {one['threads']} | {one['rows']} | {speeds} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the record to a file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the record's table there")
    options = parser.parse_args()
    if options.page:
        write_page(options.page, MARK, table(json.loads(RECORD.read_text())["results"]))
        return
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}; expected at least 1")
    if not fast_cpu.enable().few_rows:
        parser.error("there are no compiled functions here; expected a CPU with a C compiler")
    results = [one for threads in options.threads for one in compare(threads, options.runs)]
    record = {"setting": setting() | {"runs": options.runs}, "results": results}
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
