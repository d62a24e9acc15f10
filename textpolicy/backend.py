"""Whether mlx can compute here, and one line on what to install where it cannot.

On Linux `pip install textpolicy` brings mlx without a backend, and the import of `mlx.core` fails.
"""

import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

# What runs without mlx: enough for `textpolicy --help`, and for the command to say what is missing.
_LIGHT = {"backend", "cli", "config", "errors", "fast_cpu"}


@cache
def missing_backend() -> str:
    """What is wrong and what to install, in one line; empty where mlx can be used."""
    try:
        import_module("mlx.core")
    except ImportError as error:
        return f"mlx has no backend here ({error}); {_install()}"
    return ""


def versions() -> dict[str, str | None]:
    """What computes here, and its version; None is what runs from its sources or is missing."""
    return {package: _installed(package) for package in ("textpolicy", "mlx", "mlx-lm")}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Refusal(MetaPathFinder):
    """Answers imports of the submodules that need mlx with an ImportError of that one line."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        package, _, rest = fullname.partition(".")
        if package == "textpolicy" and rest.partition(".")[0] not in _LIGHT:
            raise ImportError(missing_backend(), name=fullname)


def _install() -> str:
    if sys.platform == "darwin":
        return "install one with: pip install textpolicy (on Apple silicon)"
    return "install one with: pip install 'textpolicy[cpu]' (NVIDIA GPU: 'textpolicy[cuda13]')"
