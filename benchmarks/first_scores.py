"""Measure what models earn on ready environments before any training.

    python benchmarks/first_scores.py --model tiny build/smollm2-135m --output FILE

For each environment the script runs `textpolicy check --sample 8`, and keeps the first greedy
score, the mean reward of sampled answers, and how many groups of eight have different rewards.
`FIRST_SCORES` in `envs/__init__.py` has the greedy scores that `textpolicy envs` shows.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from setting import setting

ENVS = {
    "tiny": ("add", "sort", "reverse", "countdown"),
    "real": ("number_words", "letter", "one_word", "sum_story", "json_keys", "word_count"),
}
KEPT = ("verdict", "greedy", "greedy_rows", "mean", "groups", "differing", "cut", "shown")


def first_score(env: str, model: str, rows: int, seconds: float) -> dict[str, Any]:
    """Return what `textpolicy check` says about the model's answers, and its command."""
    argv = ["check", "--env", env, "--model", model, "--sample", "8", "--rows", f"{rows}"]
    argv += ["--seconds", f"{seconds:g}", "--threads", "1"]
    asked = [sys.executable, "-m", "textpolicy", *argv, "--json"]
    said = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout
    signal = json.loads(said)["signal"]
    command = " ".join(["textpolicy", *argv])
    return {"env": env, "command": command, **{key: signal[key] for key in KEPT}}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["tiny"], help="default: the embedded one")
    text = "default: those that suit the embedded model or a real one"
    parser.add_argument("--env", nargs="+", help=text)
    parser.add_argument("--rows", type=int, default=64, help="held-out tasks (default: 64)")
    parser.add_argument("--seconds", type=float, default=45.0, help="for one task (default: 45)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the records here too")
    options = parser.parse_args()
    models: dict[str, list[dict[str, Any]]] = {}
    found = {"models": models, "setting": setting()}
    for model in options.model:
        records = models.setdefault(Path(model).name, [])
        for env in options.env or ENVS["tiny" if model == "tiny" else "real"]:
            records.append(first_score(env, model, options.rows, options.seconds))
            print(f"{model}, {env}: {records[-1]['greedy']}", file=sys.stderr, flush=True)
            if options.output:
                text = json.dumps(found, indent=2, ensure_ascii=False)
                options.output.write_text(f"{text}\n")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
