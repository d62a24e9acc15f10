"""Measure what a model earns on the ready environments before any training.

    python benchmarks/first_scores.py --model build/smollm2-135m --output FILE

For each environment the script runs `textpolicy check --sample 8`, and keeps the first greedy
score, the mean reward of sampled answers, and how many groups of eight have different rewards.
`FIRST_SCORES` in `envs/__init__.py` has the greedy scores that `textpolicy envs` shows.
"""

import argparse
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from setting import setting

from textpolicy.cli import main as textpolicy

ENVS = ("number_words", "letter", "one_word", "sum_story", "json_keys", "word_count")


def first_score(env: str, model: str, rows: int, seconds: float) -> dict[str, Any]:
    """Return what `textpolicy check` says about the model's answers, and its command."""
    argv = ["check", "--env", env, "--model", model, "--sample", "8", "--rows", f"{rows}"]
    argv += ["--seconds", f"{seconds:g}", "--threads", "1", "--json"]
    with redirect_stdout(io.StringIO()) as said:
        if code := textpolicy(argv):
            sys.exit(code)
    signal = json.loads(said.getvalue())["signal"]
    kept = ("verdict", "greedy", "mean", "groups", "differing", "cut", "shown")
    return {
        "env": env,
        "command": " ".join(["textpolicy", *argv[:-1]]),
        **{key: signal[key] for key in kept},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="default: the embedded model")
    parser.add_argument("--env", nargs="+", default=ENVS, help="default: those for real models")
    parser.add_argument("--rows", type=int, default=64, help="held-out tasks (default: 64)")
    parser.add_argument("--seconds", type=float, default=45.0, help="for one task (default: 45)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the records here")
    options = parser.parse_args()
    records = []
    for env in options.env:
        records.append(first_score(env, options.model, options.rows, options.seconds))
        print(json.dumps(records[-1]), flush=True)
    if options.output:
        found = {"setting": setting(), "model": Path(options.model).name, "tasks": records}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
