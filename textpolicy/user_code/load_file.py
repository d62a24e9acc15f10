"""Load a Python file of the user by its path, such as a reward, an environment or an algorithm."""

import importlib.util
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import ModuleType

from textpolicy.errors import ConfigError, TextPolicyError
from textpolicy.user_code.faults import raise_user_errors_as
from textpolicy.user_code.process_state import keep_working_directory

_MODULE_PREFIX = "textpolicy_file_"
_module_numbers = count(1)
SCRIPT_MODULE = "__mp_main__"
"""The name under which another process runs the main script, as multiprocessing does. The part of
the script under `if __name__ == "__main__"` does not run then."""


def split_file_and_name(text: str) -> tuple[Path, str] | None:
    """Return the path and the name of "FILE.py:NAME", or None if `text` names no Python file.

    The name is empty for "FILE.py" alone.
    """
    file, _, name = (text, "", "") if text.endswith(".py") else text.rpartition(":")
    return (Path(file), name) if file.endswith(".py") else None


def load_python_file(
    path: Path, *, what: str, error: type[TextPolicyError], module_name: str | None = None
) -> ModuleType:
    """Run a Python file and return its module.

    The file can import the files beside it, as under `python FILE.py`. `what` is the word for the
    file in messages, such as "reward". If the file's code raises, `error` is raised and names the
    line.
    """
    _check_exists(path, what)
    # The prefix and the number keep a file named json.py from replacing the module `json`.
    name = module_name or f"{_MODULE_PREFIX}{next(_module_numbers)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{what} file {path} is not a Python file: expected a name ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses and pickle look up a class's module there.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with raise_user_errors_as(error, f"importing {path}", file=str(path)):
        spec.loader.exec_module(module)
    return module


def load_beside_run(path: Path, *, what: str, error: type[TextPolicyError]) -> ModuleType:
    """Run a Python file in the working directory of the user's code, and return its module.

    A relative path begins at the run's own working directory.
    """
    _check_exists(path, what)
    absolute = path.absolute()
    with keep_working_directory():
        return load_python_file(absolute, what=what, error=error)


def _check_exists(path: Path, what: str) -> None:
    if not path.is_file():
        raise ConfigError(f"{what} file {str(path)!r} does not exist (looked in {Path.cwd()})")


def has_file_module_name(module_name: str) -> bool:
    """Return whether `load_python_file` made up this module name, which no import could find."""
    return module_name.startswith(_MODULE_PREFIX)


def files_named_in(packed: bytes) -> dict[str, str]:
    """Return the files that no import could find, by the names of their modules, of a pickle."""
    return {
        name: str(module.__file__)
        for name, module in list(sys.modules.items())
        if has_file_module_name(name) and name.encode() in packed
    }


def provide_files(files: Mapping[str, str], *, what: str, error: type[TextPolicyError]) -> None:
    """Make the modules of these files known by these names, so that a pickle finds them.

    A file that was loaded under another name is not loaded again.
    """
    loaded = {
        str(module.__file__): module
        for name, module in list(sys.modules.items())
        if has_file_module_name(name)
    }
    for name, file in files.items():
        if name in sys.modules:
            continue
        if file in loaded:
            sys.modules[name] = loaded[file]
        else:
            load_python_file(Path(file), what=what, error=error, module_name=name)
