"""Whether mlx can compute here, what to install if it cannot, and what mlx needs on NVIDIA GPUs.

On Linux `pip install textpolicy` brings mlx without a backend, and the import of `mlx.core` fails.
"""

import os
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module

_CUDA_SETTINGS = {"MLX_ENABLE_CACHE_THRASHING_CHECK": "0", "MLX_CUDA_GRAPH_CACHE_SIZE": "2000"}
"""Environment variables that mlx reads on an NVIDIA GPU, when a thread first computes there."""


def set_cuda_defaults() -> None:
    """Let mlx compute for as long as a run lasts, unless the user has set the variables.

    On CUDA, mlx keeps each different sequence of kernels that it launches, and raises an error once
    a process has had more than 800 of them. A run may have more, because steps differ. The
    variables do nothing on other devices.
    """
    for name, value in _CUDA_SETTINGS.items():
        os.environ.setdefault(name, value)


@cache
def missing_backend() -> str:
    """Return what is wrong and what to install, in one line, or an empty text if mlx works."""
    try:
        import_module("mlx.core")
    except ImportError as error:
        extra = "textpolicy (on Apple silicon)"
        if sys.platform != "darwin":
            extra = "'textpolicy[cpu]' (NVIDIA GPU: 'textpolicy[cuda13]')"
        return f"mlx has no backend here ({error}); install one with: pip install {extra}"
    return ""


def versions() -> dict[str, str | None]:
    """Return the version of each package that computes, or None if it is not installed."""
    return {package: version_of(package) for package in ("textpolicy", "mlx", "mlx-lm")}


def version_of(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    # `import textpolicy` reads this file, and importlib.metadata doubles the time of that import.
    from importlib.metadata import PackageNotFoundError, version

    with suppress(PackageNotFoundError):
        return version(package)
    return None
