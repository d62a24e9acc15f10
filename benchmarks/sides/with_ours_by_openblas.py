"""Decode steps of this library, in which OpenBLAS multiplies few rows too."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TEXTPOLICY_COMPILE"] = "off"
sys.path.insert(0, str(Path(__file__).parent.parent))

from decode import STEPS, ours
from protocol import Steps, read_task

from textpolicy import fast_cpu
from textpolicy.generation.mlx_generation import load_model


def decode_by_openblas(load: Callable[[str], Any], decode: Callable[..., float]) -> None:
    """Take turns of `decode`, which returns the seconds of a step, on the first part of a load."""
    steps, task = Steps(), read_task()
    assert not fast_cpu.enable().few_rows
    model = load(task["model"])[0]
    fast_cpu.set_threads(task["threads"])
    decode(model, task["prompts"])
    steps.ready()
    while steps.wait():
        seconds = decode(model, task["prompts"])
        steps.done(**{"prompt": 0.0, "prompt and steps": seconds * STEPS})
    steps.end()


if __name__ == "__main__":
    decode_by_openblas(load_model, ours)
