"""Your first reward: a function, a check of it on right and wrong answers, and a short run.

python examples/tour/1_your_first_reward.py [STEPS]
"""

import sys
import tempfile

import textpolicy as tp
from textpolicy.environments import load


def close(completion, example):
    """Return 1 for the sum, less for a more distant number, and 0 for other text."""
    if not completion.strip().isdecimal():
        return 0.0
    return 1 / (1 + abs(int(completion) - example["sum"]))


def main(steps: int = 40) -> None:
    rows = [{"prompt": task.prompt, **task.example} for task in load("add").heldout(32)]
    # A reward that gives a wrong or an empty answer as much as the right one teaches nothing.
    print(tp.check_reward(close, rows, gold="sum"))

    with tempfile.TemporaryDirectory() as folder:
        result = tp.run(
            {
                # The run loads the function from this file.
                "task": {"env": "add", "reward": f"{__file__}:close"},
                "model": {"name": "tiny"},  # or a folder, or "Qwen/Qwen3-0.6B"
                "run": {"steps": steps},
                "evaluation": {"count": 128},
            },
            output=folder,
            on_event=lambda event: print(event.text) if event.kind == "step" else None,
        )
        print(f"held-out reward {result.before} before, {result.after} after")
        # Read what the policy writes before you trust a rising number.
        print(result.directory.samples.read_text().splitlines()[-1])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
