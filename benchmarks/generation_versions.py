"""Compare generation with that of another checkout: its speed, and whether it draws the same.

    git worktree add build/before HEAD~20
    python benchmarks/generation_versions.py build/before --json

Each checkout has a process of its own. The script asks one process after the other for the same
generation, so that other load on the machine slows both alike, and reports medians, the spread
from the first to the third quartile, and the median of the ratios of each turn. "tokens" and
"logprobs" say whether both have drawn the same tokens, and recorded the same log-probabilities to
the last bit. "sleeping" is 16 episodes of an environment that waits 50 ms in each step, and
"sleeping_alone" the slowest of these episodes when each is played alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from setting import setting

from textpolicy import fast_cpu

HERE = Path(__file__).resolve().parent
NAMES = ("rows", "stop", "penalty", "calculator", "sleeping", "sleeping_alone")


class Side:
    """The process of one checkout."""

    def __init__(self, checkout: Path, model: str, threads: int, stack: ExitStack) -> None:
        self._process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, str(HERE / "sides" / "generation.py"), model, str(threads)],
                env=os.environ | {"PYTHONPATH": str(checkout)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )

    def run(self, name: str) -> dict[str, Any]:
        """Return the seconds and the hashes of one generation."""
        assert self._process.stdin and self._process.stdout
        print(name, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        """Let the process end."""
        assert self._process.stdin
        self._process.stdin.close()


def compare(here: Side, before: Side, name: str, runs: int) -> dict[str, Any]:
    """Return the times of both sides in turns, and whether they draw the same."""
    here.run(name)
    before.run(name)
    turns = [(here.run(name), before.run(name)) for _ in range(runs)]
    ours, theirs = ([one["seconds"] for one in side] for side in zip(*turns, strict=True))
    return {
        "name": name,
        "milliseconds": round(1000 * statistics.median(ours), 1),
        "spread": _quartiles(ours),
        "milliseconds_before": round(1000 * statistics.median(theirs), 1),
        "spread_before": _quartiles(theirs),
        "ratio": round(statistics.median(o / t for o, t in zip(ours, theirs, strict=True)), 3),
        "tokens": all(one["hashes"][0] == other["hashes"][0] for one, other in turns),
        "logprobs": all(one["hashes"] == other["hashes"] for one, other in turns),
    }


def _quartiles(seconds: list[float]) -> list[float]:
    first, _, third = statistics.quantiles(seconds * 2, n=4)
    return [round(1000 * first, 1), round(1000 * third, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "before",
        type=Path,
        nargs="?",
        default=HERE.parent,
        help="the folder of the other checkout (default: this one, which shows the noise)",
    )
    parser.add_argument(
        "--model", default="tiny", help="a model folder (default: the embedded one)"
    )
    parser.add_argument("--runs", type=int, default=15, help="turns of each side (default: 15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--names", default=",".join(NAMES), help="separated by commas")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args()
    if not (options.before / "textpolicy").is_dir():
        parser.error(f"{options.before} has no folder textpolicy; expected a checkout")
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}; expected at least 1")
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(options.threads)
    with ExitStack() as stack:
        here = Side(HERE.parent, options.model, options.threads, stack)
        before = Side(options.before.resolve(), options.model, options.threads, stack)
        names = options.names.split(",")
        found = [compare(here, before, name, options.runs) for name in names]
        here.end()
        before.end()
    record = {"setting": setting() | {"runs": options.runs}, "results": found}
    print(json.dumps(record, indent=1) if options.json else "\n".join(map(str, found)))


if __name__ == "__main__":
    main()
