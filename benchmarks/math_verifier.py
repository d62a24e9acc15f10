"""Count what `math_equal` and math-verify say about pairs of answers whose truth is known.

    python benchmarks/math_verifier.py --math-verify /path/to/its/bin/python

math-verify is measured with the Python that has it: `pip install "math-verify[antlr4_13_2]==0.9.0"`
in an environment of its own. A false yes calls a wrong answer right, and a false no a right one
wrong. `--show` lists them.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from textpolicy.rewards.verifiers import math_equal

ROOT = Path(__file__).parent.parent
PAIRS = [
    ROOT / "tests/rewards/math_pairs.jsonl",
    ROOT / "tests/rewards/math_pairs_held_back.jsonl",
]
SIDE = Path(__file__).parent / "sides" / "with_math_verify.py"


@dataclass(frozen=True)
class Pair:
    """An answer, the right answer, and whether the first is right."""

    kind: str
    answer: str
    gold: str
    equal: bool


def read_pairs(path: Path) -> list[Pair]:
    return [Pair(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def judge_with_math_verify(pairs: list[Pair], python: str) -> dict[str, list[bool]]:
    """Return the verdicts by the way in which answers are given, or nothing without math-verify."""
    question = json.dumps([(pair.answer, pair.gold) for pair in pairs])
    result = subprocess.run(
        [python, str(SIDE)], input=question, capture_output=True, text=True, check=False
    )
    if "No module named 'math_verify'" in result.stderr:
        return {}
    if result.returncode:
        raise SystemExit(result.stderr)
    answer = json.loads(result.stdout)
    return {
        f"math-verify {answer['version']}, {name}": verdicts
        for name, verdicts in answer["verdicts"].items()
    }


def show_mistakes(pairs: list[Pair], verdicts: list[bool]) -> None:
    for pair, verdict in zip(pairs, verdicts, strict=True):
        if verdict != pair.equal:
            mistake = "false yes" if verdict else "false no"
            print(f"  {mistake:9}  {pair.kind}: {pair.answer!r} for {pair.gold!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="count mistakes of math_equal and math-verify")
    parser.add_argument("--pairs", type=Path, nargs="+", default=PAIRS, help="JSONL files")
    parser.add_argument("--math-verify", default=sys.executable, help="a Python with math-verify")
    parser.add_argument("--show", action="store_true", help="list the mistakes")
    options = parser.parse_args()
    for path in options.pairs:
        pairs = read_pairs(path)
        started = time.perf_counter()
        ours = [math_equal(pair.answer, pair.gold) for pair in pairs]
        milliseconds = 1e3 * (time.perf_counter() - started) / len(pairs)
        print(f"\n{path.name}: {len(pairs)} pairs, {milliseconds:.2f} ms for one of ours")
        print(f"{'':34}{'right':>7}{'share':>7}{'false yes':>11}{'false no':>10}")
        others = judge_with_math_verify(pairs, options.math_verify)
        for name, verdicts in {"math_equal": ours, **others}.items():
            judged = list(zip(verdicts, pairs, strict=True))
            right = sum(verdict == pair.equal for verdict, pair in judged)
            false_yes = sum(verdict and not pair.equal for verdict, pair in judged)
            false_no = len(pairs) - right - false_yes
            print(f"{name:34}{right:7}{right / len(pairs):7.1%}{false_yes:11}{false_no:10}")
            if options.show:
                show_mistakes(pairs, verdicts)
        if not others:
            print(f"math-verify is not measured: {options.math_verify} does not have it.")


if __name__ == "__main__":
    main()
