"""What the tests share: the embedded model, and a random state that no test inherits."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before mlx is imported: threads of several test processes on few cores wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import pytest

# textpolicy is imported inside the fixtures: an import up here would run before pytest's shape
# checks are installed, and they would check nothing.


@pytest.fixture(autouse=True)
def seeded() -> None:
    mx.random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def fast_products() -> None:
    """Let models that the tests build themselves multiply with the BLAS of loaded models."""
    from textpolicy import fast_cpu

    fast_cpu.enable()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the embedded model."""
    from textpolicy.generation.model_files import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def load_tiny() -> Callable[[], tuple[Any, Any]]:
    """A function that loads the embedded model: a fresh (model, tokenizer) for each call."""
    from textpolicy.generation.mlx_generation import load_model

    return lambda: load_model("tiny")
