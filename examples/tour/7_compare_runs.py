"""Compare runs: two settings, the same held-out tasks, an interval for the difference, a report.

python examples/tour/7_compare_runs.py [STEPS]
"""

import sys
import tempfile
from pathlib import Path

import textpolicy as tp
from textpolicy.environments import load
from textpolicy.evaluation import Evaluation, HeldOut, compare, evaluate
from textpolicy.rewards import scorer_of
from textpolicy.tracking.report import write_report


def train(folder: Path, rate: float, steps: int) -> tp.RunResult:
    settings = {
        "task": {"env": "add"},
        "trainer": {"lr": rate},
        "run": {"steps": steps},
        "evaluation": {"count": 64},
    }
    return tp.run(settings, output=folder)


def measure(result: tp.RunResult, held_out: HeldOut) -> Evaluation:
    """Return the greedy answers of a run's best adapter."""
    model, tokenizer = tp.load_model("tiny", result.directory.chosen_adapter())
    return evaluate(tp.create_policy(model, tokenizer), held_out)


def main(steps: int = 30) -> None:
    add = load("add")
    with tempfile.TemporaryDirectory() as name:
        results = [train(Path(name) / f"lr-{rate:g}", rate, steps=steps) for rate in (1e-4, 1e-3)]
        with scorer_of(add.reward) as scorer:
            tasks = add.heldout(128)
            held_out = HeldOut(name="add", tasks=tasks, scorer=scorer, max_tokens=add.max_tokens)
            slow, quick = (measure(result, held_out) for result in results)
        found = compare(tasks, slow, quick)
        # An interval that contains 0 says that the difference may be chance.
        print(f"gain {found.gain:+.3f}, 95 % from {found.low:+.3f} to {found.high:+.3f}")
        print(f"{found.better} tasks better, {found.worse} worse")
        page = write_report([result.directory.path for result in results], Path(name) / "both.html")
        print(f"curves of both runs in {page.name}, {page.stat().st_size // 1000} KB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
