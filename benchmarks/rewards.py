"""Measure the time of reward calls in this process and in another one, and of some verifiers.

    python benchmarks/rewards.py --output benchmarks/results/rewards.json

Each number is the median of several repetitions. `overhead_us` is the time that a call of an empty
reward takes in another process, beyond the time of the call in this process.
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


def median_seconds(action: Callable[[], object], repetitions: int = 7) -> float:
    """Return the median time of an action, without the first call."""
    action()
    times: list[float] = []
    for _ in range(repetitions):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return median(times)


def start_and_score(rewards: Rewards) -> None:
    with closing(Scorer(rewards)) as scorer:
        scorer.score(SAMPLES[:1])


def measure_times() -> dict[str, float]:
    """Return each time by its name, which ends in its unit."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "empty.py"
        file.write_text("def empty(completion):\n    return 1.0\n")
        reward = load_reward(str(file))
        assert not isinstance(reward, Rewards)
        local, isolated = Rewards(reward), Rewards(reward, timeout=60, workers=1)
        with closing(Scorer(local)) as scorer:
            local_call = median_seconds(lambda: scorer.score(SAMPLES)) / len(SAMPLES)
        with closing(Scorer(isolated)) as scorer:
            isolated_call = median_seconds(lambda: scorer.score(SAMPLES)) / len(SAMPLES)
        started = median_seconds(lambda: start_and_score(isolated))
    compared = median_seconds(lambda: [math_equal(*pair) for pair in ANSWERS]) / len(ANSWERS)
    schema = {"type": "object", "required": ["age"], "properties": {"age": {"minimum": 0}}}
    results = {
        "call_us": 1e6 * local_call,
        "overhead_us": 1e6 * (isolated_call - local_call),
        "start_ms": 1e3 * started,
        "math_equal_us": 1e6 * compared,
        "json_match_us": 1e6 * median_seconds(lambda: json_match('{"age": 3}', schema)),
        "pattern_match_us": 1e6 * median_seconds(lambda: pattern_match("a1", "[0-9]", seconds=5)),
        "run_code_unsafe_ms": 1e3 * median_seconds(lambda: run_code("x = 1", unsafe=True)),
    }
    return {name: round(value, 1) for name, value in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the record to this file"
    )
    options = parser.parse_args()
    results = measure_times()
    record = {"setting": setting() | {"load": round(os.getloadavg()[0], 1)}, **results}
    print(json.dumps(record))
    if options.output:
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
