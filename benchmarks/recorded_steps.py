"""Compare decode steps from a record with decode steps by the model's Python code, on a CPU.

    make real-model
    python benchmarks/recorded_steps.py --output benchmarks/results/recorded_steps.json
    python benchmarks/recorded_steps.py --page docs/benchmarks.md

Each row goes on for 64 tokens after a prompt of 64 random tokens, which is read before the time
starts. The steps before a record and the record itself are in the time. Both sides take turns and
must give the same tokens and log-probabilities. The script reports medians of the milliseconds of a
step, and the median of the ratios of the turns with the smallest and the largest ratio. The model
is SmolLM2 with LoRA that trains biases, or with weights in 6 bits: its blocks are not compiled, and
steps of compiled blocks are not recorded. Steps are recorded on a CPU only, so the script refuses
to run on a GPU.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from decode import MODEL, prompts
from pages import write_page
from setting import on_gpu, setting

from textpolicy import fast_cpu
from textpolicy.adapters import AdapterConfig, AdapterContainer, LoRARule, quantize
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.sampling import random_keys
from textpolicy.types import Sampling

HERE = Path(__file__).parent
RECORD = HERE / "results" / "recorded_steps.json"
ROWS = (1, 8, 32)
STEPS = 64
VOCABULARY = 320  # That of the embedded model, the smallest.
MARK = "<!-- table of recorded_steps.py -->"
KINDS = {
    "lora": "float32 with LoRA and its biases",
    "int6": "6 bits",
    "int6_with_lora": "6 bits with LoRA",
}


def build(folder: Path, kind: str) -> nn.Module:
    """Return the model with weights in 6 bits or new adapters, as the kind says."""
    model, _ = load_model(folder)
    if kind.startswith("int6"):
        quantize(model, bits=6)
    if kind.endswith("lora"):
        rule = LoRARule(module_path=".*_proj", rank=8, scale=2.0, bias=kind == "lora")
        AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
    return model


def decode(
    model: nn.Module, texts: Sequence[list[int]], *, record: bool
) -> tuple[float, list[Any]]:
    """Return the milliseconds of a step, and what the rows drew."""
    engine = Engine(model, record_steps=record)
    keys = random_keys(0, [(number, 0) for number in range(len(texts))])
    rows = [
        DecodingRow(
            context=text, sampling=Sampling(max_tokens=1 + STEPS), stop=lambda _: None, key=key
        )
        for text, key in zip(texts, keys, strict=True)
    ]
    for row in rows:
        engine.submit([row])
    engine.step()
    started = time.perf_counter()
    while engine.can_step:
        engine.step()
    milliseconds = 1000 * (time.perf_counter() - started) / STEPS
    return milliseconds, [(row.tokens, row.logprobs) for row in rows]


def compare(model: nn.Module, rows: int, runs: int) -> dict[str, Any]:
    texts = prompts(rows, VOCABULARY)
    decode(model, texts, record=True)
    turns: list[tuple[float, float]] = []
    for turn in range(runs):
        order = (True, False) if turn % 2 else (False, True)
        found = {record: decode(model, texts, record=record) for record in order}
        assert found[True][1] == found[False][1], "a record gives other numbers"
        turns.append((found[True][0], found[False][0]))
    ratios = [recorded / plain for recorded, plain in turns]
    recorded, plain = (statistics.median(times) for times in zip(*turns, strict=True))
    return {
        "rows": rows,
        "recorded_ms": round(recorded, 2),
        "by_python_ms": round(plain, 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = ["| weights | rows | recorded, ms | by Python, ms | ratio |", "|---|---|---|---|---|"]
    for one in results:
        least, most = one["ratios"]
        times = f"{one['recorded_ms']:.1f} | {one['by_python_ms']:.1f}"
        spread = f"{one['ratio']:.2f} ({least:.2f} to {most:.2f})"
        lines.append(f"| {KINDS[one['weights']]} | {one['rows']} | {times} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder (default: SmolLM2)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--runs", type=int, default=6, help="turns of each side (default: 6)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the record to a file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the record's table there")
    options = parser.parse_args()
    if options.page:
        write_page(options.page, MARK, table(json.loads(RECORD.read_text())["results"]))
        return
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}; expected at least 1")
    if on_gpu():
        parser.error(
            "mlx computes on a GPU; expected a CPU, because no steps are recorded on a GPU"
        )
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(options.threads)
    results: list[dict[str, Any]] = []
    for kind in options.kinds:
        model = build(options.model, kind)
        for rows in options.rows:
            results.append({"weights": kind, **compare(model, rows, options.runs)})
            if not options.json:
                print(results[-1], flush=True)
    record = {"setting": setting() | {"runs": options.runs, "steps": STEPS}, "results": results}
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    if options.json:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
