"""What scoring costs: in this process and in others, starting those, matching, comparing answers.

    python benchmarks/rewards.py --output benchmarks/results/rewards.json

Each number is the median of several repetitions. `overhead` is what a call of an empty reward takes
in a process of its own, beyond the call itself.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

from setting import setting

from textpolicy.rewards import Rewards, Scorer, load_reward, sample_of
from textpolicy.rewards.verifiers import json_match, math_equal, pattern_match, run_code

SAMPLES = [sample_of("prompt", "completion", {"answer": "4"}) for _ in range(256)]
ANSWERS = [(r"\boxed{\frac{1}{2}}", "0.5"), ("(x+1)^2", "x^2+2x+1"), ("the sum is 1,234.", "1234")]


def seconds(action: Callable[[], object], repetitions: int = 7) -> float:
    """The median time of an action, the first call left out."""
    action()
    times: list[float] = []
    for _ in range(repetitions):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return median(times)


def start(rewards: Rewards) -> None:
    with closing(Scorer(rewards)) as scorer:
        scorer.score(SAMPLES[:1])


def measure() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "empty.py"
        file.write_text("def empty(completion):\n    return 1.0\n")
        reward = load_reward(str(file))
        assert not isinstance(reward, Rewards)
        here, there = Rewards(reward), Rewards(reward, timeout=60, workers=1)
        with closing(Scorer(here)) as near, closing(Scorer(there)) as far:
            call = seconds(lambda: near.score(SAMPLES)) / len(SAMPLES)
            distant = seconds(lambda: far.score(SAMPLES)) / len(SAMPLES)
        started = seconds(lambda: start(there))
    compared = seconds(lambda: [math_equal(*pair) for pair in ANSWERS]) / len(ANSWERS)
    schema = {"type": "object", "required": ["age"], "properties": {"age": {"minimum": 0}}}
    results = {
        "call_us": 1e6 * call,
        "overhead_us": 1e6 * (distant - call),
        "start_ms": 1e3 * started,
        "math_equal_us": 1e6 * compared,
        "json_match_us": 1e6 * seconds(lambda: json_match('{"age": 3}', schema)),
        "pattern_match_us": 1e6 * seconds(lambda: pattern_match("a1", "[0-9]", seconds=5)),
        "run_code_unsafe_ms": 1e3 * seconds(lambda: run_code("x = 1", unsafe=True)),
    }
    return {name: round(value, 1) for name, value in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the record there too")
    options = parser.parse_args()
    results = measure()
    record = {"setting": setting() | {"load": round(os.getloadavg()[0], 1)}, **results}
    print(json.dumps(record))
    if options.output:
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
