"""The real model of `make real-model`."""

from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "build" / "smollm2-135m"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def real_model() -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct and its tokenizer, in float32."""
    import mlx.core as mx

    from textpolicy.generation.mlx_generation import load_model

    if not FOLDER.exists():
        pytest.skip("there is no real model: `make real-model` makes it")
    return load_model(FOLDER, dtype=mx.float32)
