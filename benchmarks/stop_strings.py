"""Measure what a stop string adds to the time of decoding a long completion.

    python benchmarks/stop_strings.py --output benchmarks/results/stop_strings.json
    python benchmarks/stop_strings.py --model build/smollm2-135m --rows 1

Both sides decode the same tokens to the end. "with" has a stop string that no completion contains,
and "without" has none. Unless a model is named, it is the Qwen3 of random weights of grpo_step.py.
The sides take turns at every step. Each ratio is that of one completion, and the script reports
medians over several completions, with the smallest and the largest ratio.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from grpo_step import write_model, write_tokenizer
from measurement import MeasurementParser, output_record
from setting import default_dtype, setting

from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine, can_launch_ahead
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.sampling import random_keys
from textpolicy.generation.stop_rules import StopAtStrings
from textpolicy.types import Sampling, StopReason

PROMPT = [5, 6, 7, 8]
STRINGS = {"without": (), "with": ("</answer>",)}


class _EndAtString(StopAtStrings):
    """Looks for the strings, and lets no stop token end a row."""

    def __call__(self, tokens: list[int]) -> StopReason | None:
        reason = super().__call__(tokens)
        return None if reason == StopReason.STOP_TOKEN else reason


def start(model: Any, tokenizer: Any, side: str, rows: int, tokens: int) -> Engine:
    """Return an engine whose rows have their first token."""
    engine = Engine(model, launch_ahead=can_launch_ahead())
    keys = random_keys(0, [(0, number) for number in range(rows)])
    sampling = Sampling(max_tokens=1 + tokens)
    stop = _EndAtString(tokenizer, STRINGS[side])
    engine.submit(
        [DecodingRow(context=PROMPT, sampling=sampling, stop=stop, key=key) for key in keys]
    )
    engine.step()
    return engine


def milliseconds(model: Any, tokenizer: Any, rows: int, tokens: int) -> dict[str, float]:
    """Return the mean milliseconds of a step of each side. The sides take turns at every step."""
    engines = {side: start(model, tokenizer, side, rows, tokens) for side in STRINGS}
    seconds = dict.fromkeys(STRINGS, 0.0)
    order = [*STRINGS]
    for _ in range(tokens):
        order.reverse()
        for side in order:
            started = time.perf_counter()
            engines[side].step()
            seconds[side] += time.perf_counter() - started
    assert not any(engine.can_step for engine in engines.values())
    return {side: 1000 * number / tokens for side, number in seconds.items()}


def compare(model: Any, tokenizer: Any, rows: int, tokens: int, runs: int) -> dict[str, Any]:
    milliseconds(model, tokenizer, rows, 8)
    found = [milliseconds(model, tokenizer, rows, tokens) for _ in range(runs)]
    ratios = [one["with"] / one["without"] for one in found]
    medians = {side: round(statistics.median(one[side] for one in found), 3) for side in STRINGS}
    spread = [round(min(ratios), 3), round(max(ratios), 3)]
    ratio = round(statistics.median(ratios), 3)
    return {"rows": rows, "milliseconds": medians, "ratio": ratio, "ratios": spread}


def main() -> None:
    parser = MeasurementParser(__doc__, runs=5, threads=os.cpu_count())
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: random weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=1024, help="of a completion (default: 1024)")
    options = parser.options()
    with tempfile.TemporaryDirectory() as made:
        folder = options.model or Path(made)
        if not options.model:
            write_model(folder, default_dtype())
            write_tokenizer(folder)
        model, tokenizer = load_model(folder)
        found = [
            compare(model, tokenizer, rows, options.tokens, options.runs) for rows in options.rows
        ]
    asked = {
        "model": options.model.name if options.model else "random weights",
        "tokens": options.tokens,
        "runs": options.runs,
    }
    output_record({"setting": setting() | asked, "results": found}, [*map(str, found)], options)


if __name__ == "__main__":
    main()
