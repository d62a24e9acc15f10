"""Adapters of the embedded model as files, and commands run as a user does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.cli.conftest import answer, failure

__all__ = ["answer", "failure"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Callable[..., str]:
    """Return a function that writes adapters which change the embedded model's answers.

    `bits` and `mode` quantize the base as a run does.
    """
    from textpolicy.adapters import AdapterConfig, AdapterContainer
    from textpolicy.adapters.quantization.quantize import quantize
    from textpolicy.generation.mlx_generation import load_model

    made: dict[str, str] = {}

    def save(
        bits: int | None,
        size: float,
        mode: str = "affine",
        config: Any = None,
        name: str = "plain",
        model: str = "tiny",
    ) -> str:
        key = f"{bits}-{mode}-{size}-{name}"
        if key not in made:
            network, _ = load_model(model)
            if bits:
                quantize(network, bits=bits, mode=mode)
            container = AdapterContainer.from_model(
                network, config or AdapterConfig(rank=4), seed=3
            )
            keys = iter(mx.random.split(mx.random.key(0), 100))
            container.swap(
                {
                    name: value + size * mx.random.normal(value.shape, key=next(keys))
                    for name, value in container.parameters().items()
                }
            )
            path: Path = tmp_path_factory.mktemp("trained") / "adapters.safetensors"
            container.publish(path)
            made[key] = str(path)
        return made[key]

    return save
