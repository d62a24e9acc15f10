"""Decode steps of this library, in which OpenBLAS multiplies few rows too."""

import os
import sys
from pathlib import Path

os.environ["TEXTPOLICY_COMPILE"] = "off"
sys.path.insert(0, str(Path(__file__).parent.parent))

from decode import STEPS, ours
from protocol import Steps, read_task

from textpolicy import fast_cpu
from textpolicy.generation.mlx_generation import load_model


def main() -> None:
    steps, task = Steps(), read_task()
    model, _ = load_model(task["model"])
    fast_cpu.set_threads(task["threads"])
    assert not fast_cpu.enable().few_rows
    ours(model, task["prompts"])
    steps.ready()
    while steps.wait():
        seconds = ours(model, task["prompts"])
        steps.done(**{"prompt": 0.0, "prompt and steps": seconds * STEPS})
    steps.end()


if __name__ == "__main__":
    main()
