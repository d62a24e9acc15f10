"""Compare the speed of runs that sample in one process, in rollout workers, and by several ranks.

    python benchmarks/workers.py --json
    python benchmarks/workers.py --larger build/smollm2-135m --output results/workers.json
    python benchmarks/workers.py --page docs/benchmarks.md

Each side is `textpolicy train` in a fresh process, with the defaults of the command and one thread
of matrix products in each process. A side's number is rollouts per second of whole steps: sampling,
rewards, update, new adapters and checkpoint. The first steps are left out, because workers load
their model in them. The sides run in turns; the table has medians, and the least and the most.

"waits" is a task of two turns. Each call of its environment takes 50 ms: reset, two steps and close
(sides/waiting_sum.py). In one process up to 64 of these waits overlap, also with decoding.

The record also has the seconds of each phase of a run in one process, for 8 and for 16 groups a
step, the rate of one of two such runs at the same time, which says what the cores take from each
other, and with `--larger FOLDER` the phases of another model on `word_count`. simulate.py computes
from them what other numbers of workers and ranks do. `--phases` measures only these, and keeps the
table on record.

Ray actors need the package ray. The exit code is 1 if workers gain less than EXPECTED.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pages import write_page
from setting import setting

HERE = Path(__file__).resolve().parent
RECORD = HERE / "results" / "workers.json"
MARK = "<!-- tables of workers.py -->"
WAITING = str(HERE / "sides" / "waiting_sum.py")
# Times one process, on two quiet cores.
EXPECTED = {("add", "1 worker"): 1.35, ("waits", "2 workers"): 2.0}


@dataclass(frozen=True)
class Side:
    """A way to run, as options of the command."""

    name: str
    options: tuple[str, ...] = ()


SIDES = (
    Side("one process"),
    Side("1 worker", ("--workers", "1", "--max-staleness", "1")),
    Side("2 workers", ("--workers", "2", "--max-staleness", "1")),
    Side("2 Ray actors", ("--workers", "2", "--ray", "local", "--max-staleness", "1")),
    Side("2 ranks", ("--ranks", "2")),
)
TASKS = {
    "add": ("--env", "add"),
    "waits": ("--env", WAITING),
    "word_count": ("--env", "word_count"),
}
# Sizes of the runs of `--larger`, small enough for a minute each.
LARGER = {"groups": 8, "size": 4, "steps": 3, "skip": 1}
LARGER_TOKENS = 40


@dataclass(frozen=True)
class Measured:
    """What a run took after its first steps; `phases` are medians of a step, in seconds."""

    rate: float
    phases: dict[str, float]


def measure(task: str, side: Side, groups: int, options: argparse.Namespace) -> Measured:
    """Train, and return the rollouts per second after the first steps."""
    last = options.skip + options.steps
    with tempfile.TemporaryDirectory() as folder:
        run, errors = Path(folder) / "run", Path(folder) / "errors.txt"
        command = [sys.executable, "-m", "textpolicy", "train", *TASKS[task], *side.options]
        command += ["--model", options.model, "--threads", "1", "--output", str(run)]
        command += ["--steps", str(last), "--count", "50"]
        command += ["--groups-per-step", str(groups), "--group-size", str(options.size)]
        variables = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                command, env=variables, stdout=subprocess.DEVNULL, stderr=stderr
            ) as process,
        ):
            began = wait_for_step(run / "metrics.jsonl", options.skip, process)
            ended = wait_for_step(run / "metrics.jsonl", last, process)
        if began is None or ended is None or process.returncode:
            sys.exit(f"a run failed:\n{errors.read_text('utf-8')}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    seconds = ended - began
    steps = [row for row in rows if "time/step" in row][options.skip :]
    names = ("time/generate", "time/reward", "time/train", "num_tokens")
    phases = {
        name: statistics.median(row[name] for row in steps) for name in names if name in steps[0]
    }
    phases["whole step"] = seconds / options.steps
    return Measured(options.steps * groups * options.size / seconds, phases)


def wait_for_step(metrics: Path, steps: int, process: subprocess.Popen[bytes]) -> float | None:
    """Return the time at which the metrics of so many steps were there, or None if they fail."""
    while True:
        is_over, now = process.poll() is not None, time.perf_counter()
        if metrics.exists() and metrics.read_bytes().count(b'"time/step"') >= steps:
            return now
        if is_over:
            return None
        time.sleep(0.01)


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each task and side. The sides take turns."""
    sides = [side for side in SIDES if side.name != "2 Ray actors" or find_spec("ray")]
    found: dict[tuple[str, str], list[float]] = {}
    for turn in range(options.runs):
        for task in options.tasks.split(","):
            for side in sides:
                rate = measure(task, side, options.groups, options).rate
                found.setdefault((task, side.name), []).append(rate)
                print(f"{turn + 1}/{options.runs} {task}, {side.name}: {rate:.1f}", file=sys.stderr)
    return [
        {
            "task": task,
            "side": side,
            "median": statistics.median(rates),
            "least": min(rates),
            "most": max(rates),
            "times_one_process": statistics.median(
                rate / alone for rate, alone in zip(rates, found[task, SIDES[0].name], strict=True)
            ),
        }
        for (task, side), rates in found.items()
    ]


def phases_of_one_process(task: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Return the medians of the phases of a step in one process, for half and for all groups."""
    sizes = (options.groups // 2, options.groups)
    found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(options.runs):
        for size in sizes:
            found[size].append(measure(task, SIDES[0], size, options).phases)
    return [
        {"groups": float(size)}
        | {name: statistics.median(one[name] for one in phases) for name in phases[0]}
        for size, phases in found.items()
    ]


def speed_beside_another(task: str, options: argparse.Namespace) -> float:
    """Return the rate of one of two runs at the same time, as a part of the rate of one alone."""

    def rate(_: int) -> float:
        return measure(task, SIDES[0], options.groups, options).rate

    found: list[float] = []
    for _ in range(options.runs):
        alone = rate(0)
        with ThreadPoolExecutor(2) as threads:
            found.append(statistics.mean(threads.map(rate, range(2))) / alone)
    return statistics.median(found)


def phases_of_larger_model(model: str) -> dict[str, Any]:
    """Return the phases of a step of another model."""
    options = argparse.Namespace(model=model, runs=1, **LARGER)
    phases = phases_of_one_process("word_count", options)
    return {"model": model, "max_tokens": LARGER_TOKENS, **LARGER, "phases": phases}


def table(record: dict[str, Any]) -> str:
    """Return the record as a table in Markdown."""
    lines = [
        "| task | side | rollouts/s | least to most | times one process |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['task']} | {row['side']} | {row['median']:.0f} | {row['least']:.0f} to "
        f"{row['most']:.0f} | {row['times_one_process']:.2f} |"
        for row in record["rows"]
    ]
    return "\n".join(lines)


def gains_enough(rows: list[dict[str, Any]]) -> bool:
    """Return whether every side gains at least what is expected of it."""
    return all(
        row["times_one_process"] >= EXPECTED.get((row["task"], row["side"]), 0) for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="default: %(default)s")
    parser.add_argument("--tasks", default="add,waits", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=25, help="measured (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=5, help="left out (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=5, help="default: %(default)s")
    text = "another model, such as build/smollm2-135m, whose phases the record gets too"
    parser.add_argument("--larger", metavar="FOLDER", help=text)
    text = "measure only what simulate.py reads, and keep the table on record"
    parser.add_argument("--phases", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--output", type=Path, help="write the record to this file")
    parser.add_argument("--page", type=Path, help="only write the recorded table into this page")
    options = parser.parse_args()
    if options.page:
        write_page(options.page, MARK, table(json.loads(RECORD.read_text("utf-8"))))
        return
    names = ("model", "tasks", "steps", "skip", "groups", "size", "runs")
    if options.phases:
        record = json.loads(RECORD.read_text("utf-8"))
    else:
        record = {
            "command": f"python benchmarks/workers.py {' '.join(sys.argv[1:])}",
            "setting": setting(),
            "options": {name: getattr(options, name) for name in names},
            "rows": compare(options),
        }
    record["phases"] = phases_of_one_process("add", options)
    record["beside_another"] = speed_beside_another("add", options)
    if options.larger:
        record["larger"] = phases_of_larger_model(options.larger)
    text = json.dumps(record, indent=2)
    if options.output:
        options.output.write_text(text + "\n", "utf-8")
    print(text if options.json else table(record))
    sys.exit(not gains_enough(record["rows"]))


if __name__ == "__main__":
    main()
