"""Your own rows: a file of tasks, and a reward that reads its columns.

python examples/tour/2_your_own_rows.py [STEPS]
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import textpolicy as tp
from textpolicy.environments import Dataset


def in_order(completion, solution):
    """Return 1 for the right answer: `solution` is a column of the rows."""
    return float(completion.strip() == solution)


def write_rows(path: Path, count: int = 1000) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            digits = "".join(draw.choices("0123456789", k=8))
            row = {"question": f"sort {digits}", "solution": "".join(sorted(digits))}
            file.write(json.dumps(row) + "\n")


def main(steps: int = 40) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl")
        # A tenth of the different prompts is held out, and never trained on.
        data = Dataset.load(folder / "rows.jsonl", "{question}")
        print(len(data.train), "rows to train on,", len(data.held_out), "held out")

        result = tp.run(
            {
                "task": {
                    "data": str(folder / "rows.jsonl"),
                    "prompt": "{question}",  # a template with columns in braces
                    "reward": f"{__file__}:in_order",
                },
                "run": {"steps": steps},
            },
            output=folder / "run",
            on_event=print,
        )
        print(f"held-out reward {result.before} before, {result.after} after")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
