"""Compare products of few rows by the compiled loops with those by OpenBLAS.

    python benchmarks/few_rows.py --output benchmarks/results/few_rows.json
    python benchmarks/few_rows.py --page docs/benchmarks.md

The products are those of a decode step of SmolLM2-135M: each of its weights, in float32, times as
many rows as decode together. The weights are numbers of bfloat16; "copies" multiplies by their
bfloat16 copies, "loops" by the weights themselves. "int4", "nf4" and "int8" multiply by the same
matrices in these formats, with groups of 64 weights. Every side runs in a process of its own, with
one thread, and the sides take turns. The script reports medians and quartiles of the processor's
milliseconds, because other programs may use the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from pages import write_page
from setting import setting

from textpolicy import fast_cpu
from textpolicy.adapters import quantize
from textpolicy.fast_cpu.bfloat16_copies import keep_copies
from textpolicy.fast_cpu.gradients import without_gradients

RECORD = Path(__file__).parent / "results" / "few_rows.json"
MARK = "<!-- tables of few_rows.py -->"
ROWS = (1, 2, 4, 8, 16, 32, 48, 64)
SIDES = {"copies": "on", "loops": "on", "OpenBLAS": "off", "int4": "on", "nf4": "on", "int8": "on"}
FORMATS = {"int4": ("affine", 4), "nf4": ("nf4", 4), "int8": ("affine", 8)}
WIDTH, KEYS, HIDDEN, BLOCKS, VOCABULARY = 576, 192, 1536, 30, 49152
SHAPES = [
    *[(WIDTH, WIDTH), (KEYS, WIDTH), (KEYS, WIDTH), (WIDTH, WIDTH)] * BLOCKS,
    *[(HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)] * BLOCKS,
    (VOCABULARY, WIDTH),
]


def measure(side: str) -> dict[int, float]:
    """Return the processor's milliseconds of all products of a step, by the number of rows."""
    fast_cpu.enable()
    fast_cpu.set_threads(1)
    model = nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for outputs, inputs in SHAPES))
    model.set_dtype(mx.bfloat16)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    if side == "copies":
        assert keep_copies(model, 1 << 60)
    if side in FORMATS:
        mode, bits = FORMATS[side]
        quantize(model, mode=mode, bits=bits)
    mx.eval(model.parameters())
    found: dict[int, float] = {}
    for rows in ROWS:
        inputs = {width: mx.random.normal((rows, width)) for width in (WIDTH, HIDDEN)}
        seconds: list[float] = []
        for _ in range(4):
            started = time.process_time()
            layers = zip(model.layers, SHAPES, strict=True)
            # No gradient is needed, as in a decode step.
            with without_gradients():
                products = [layer(inputs[shape[1]]) for layer, shape in layers]
            mx.eval(products)
            seconds.append(time.process_time() - started)
        # The first pass also makes the inputs.
        found[rows] = 1000 * statistics.median(seconds[1:])
    return found


def run_side(side: str) -> Mapping[str, float]:
    environment = os.environ | {"TEXTPOLICY_COMPILE": SIDES[side]}
    command = [sys.executable, __file__, "--one", side]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def compare(turns: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for rows in ROWS:
        times = {side: [turn[side][str(rows)] for turn in turns] for side in SIDES}
        medians = {side: statistics.median(some) for side, some in times.items()}
        spread = {side: statistics.quantiles(some, n=4)[::2] for side, some in times.items()}
        results.append(
            {
                "rows": rows,
                "milliseconds": {side: round(median, 1) for side, median in medians.items()},
                "quartiles": {side: [round(x, 1) for x in some] for side, some in spread.items()},
                "times_as_fast": {
                    side: round(medians["OpenBLAS"] / medians[side], 2) for side in SIDES
                },
            }
        )
    return results


def tables(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the record as a table."""
    others = [side for side in SIDES if side != "OpenBLAS"]
    names = [f"{side}, ms" for side in SIDES] + [f"{side}, times as fast" for side in others[:1]]
    lines = [f"| rows | {' | '.join([*names, *others[1:]])} |"]
    lines += ["|---" * (len(SIDES) + len(others) + 1) + "|"]
    for one in results:
        cells = [
            f"{one['milliseconds'][side]} ({one['quartiles'][side][0]} to "
            f"{one['quartiles'][side][1]})"
            for side in SIDES
        ]
        cells += [f"{one['times_as_fast'][side]:.2f}" for side in others]
        lines.append(f"| {one['rows']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--one", choices=SIDES, help="measure one side and print JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the object to a file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the record's table there")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    if options.page:
        write_page(options.page, MARK, tables(json.loads(RECORD.read_text())["results"]))
        return
    if options.runs < 2:
        parser.error(f"--runs is {options.runs}; expected at least 2")
    turns = [{side: run_side(side) for side in SIDES} for _ in range(options.runs)]
    fast_cpu.enable()
    fast_cpu.set_threads(1)
    record = {"setting": setting() | {"runs": options.runs}, "results": compare(turns)}
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
