"""Decode steps of mlx-lm as its users load it, with OpenBLAS in place of the BLAS of its wheel."""

import os
import sys
from pathlib import Path

os.environ["TEXTPOLICY_COMPILE"] = "off"
sys.path.insert(0, str(Path(__file__).parent.parent))

from decode import STEPS, mlx_lm
from mlx_lm import load
from protocol import Steps, read_task

from textpolicy import fast_cpu


def main() -> None:
    steps, task = Steps(), read_task()
    assert not fast_cpu.enable().few_rows
    model, *_ = load(task["model"])
    fast_cpu.set_threads(task["threads"])
    mlx_lm(model, task["prompts"])
    steps.ready()
    while steps.wait():
        seconds = mlx_lm(model, task["prompts"])
        steps.done(**{"prompt": 0.0, "prompt and steps": seconds * STEPS})
    steps.end()


if __name__ == "__main__":
    main()
