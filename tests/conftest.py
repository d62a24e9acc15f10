"""Fixtures of all tests: the embedded model, and a fresh random state for each test."""

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Set before mlx is imported. Threads of several test processes on few cores would wait for each
# other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# On an NVIDIA GPU, mlx rounds float32 factors to 10 bits unless this is 0.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir

from tests.faults.attempts import attempts, pytest_itemcollected

__all__ = ["attempts", "pytest_itemcollected"]

# A shell starts a job in the background with Ctrl-C ignored, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run. `pytest --hypothesis-profile thorough` draws 150 times as many,
# and new ones each time. Fixtures of a test are shared by its examples.
QUICK = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    # Without the phase that explains a failure, which takes minutes.
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("quick", QUICK)
settings.register_profile(
    "thorough", QUICK, max_examples=150 * QUICK.max_examples, derandomize=False
)
settings.load_profile("quick")
set_hypothesis_home_dir(Path(__file__).parents[1] / ".pytest_cache" / "hypothesis")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort files by their number of slow tests, so that no process is left with a long file."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


# The fixtures import textpolicy, and this file does not: an import here would run before pytest
# installs the shape checks, and the checks would then check nothing.


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
    """Return the folder of the embedded model."""
    from textpolicy.generation.model_files import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def float32_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of the embedded model in float32: a GPU keeps a checkpoint's dtype."""
    from textpolicy.generation.model_files import tiny_model

    tiny = tiny_model()
    folder = tmp_path_factory.mktemp("float32") / "tiny"
    shutil.copytree(tiny, folder)
    weights: Any = mx.load(str(tiny / "model.safetensors"))
    arrays = {name: array.astype(mx.float32) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    config = json.loads((tiny / "config.json").read_text()) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def load_tiny() -> Callable[[], tuple[Any, Any]]:
    """Return a function that loads the embedded model in float32: each call gives a fresh model."""
    from textpolicy.generation.mlx_generation import load_model

    return lambda: load_model("tiny", dtype=mx.float32)
