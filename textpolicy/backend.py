"""Whether mlx can compute here, and one line on what to install if it cannot.

On Linux `pip install textpolicy` brings mlx without a backend, and the import of `mlx.core` fails.
"""

import sys
from contextlib import suppress
from functools import cache
from importlib import import_module


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
