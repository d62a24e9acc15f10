"""Libraries that the machine's compiler makes of sources in this folder, once, and keeps.

The files lie in the user's cache folder. Their names depend on the sources and on the processor,
because a home folder may be shared by machines whose processors know other instructions. The
environment variable `TEXTPOLICY_COMPILE=off` says not to compile.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from threading import RLock
from typing import TypeVar

from textpolicy.activity import doing
from textpolicy.fast_cpu.cache_folder import cache_folder

FOLDER = Path(__file__).parent
NATIVE = {"aarch64": "-mcpu=native"}.get(platform.machine(), "-march=native")
_SECONDS = 120
_ONE_AT_A_TIME = RLock()
Result = TypeVar("Result")


class NotCompiled(Exception):
    """There are no compiled functions; the message says why."""


class _TookTooLong(NotCompiled):
    """A program was stopped at its time limit."""


def once(function: Callable[[], Result]) -> Callable[[], Result]:
    """Return the function with a memory: no two threads call it, or another such one, at once."""
    remembered = cache(function)
    results: list[Result] = []

    @wraps(remembered)
    def call() -> Result:
        # A decode step calls such a function a hundred times; it does not lock each time.
        if not results:
            with _ONE_AT_A_TIME:
                results.append(remembered())
        return results[0]

    return call


@dataclass(frozen=True)
class CompiledLibrary:
    """How a library is compiled. `headers` are files that the sources include.

    The first list of `options` with which the compiler succeeds is taken. `others` is a text that
    changes with whatever else the library depends on. `trial` is a Python program that takes the
    path of a new file, and fails if the file does not work. It may crash without harm.
    """

    name: str
    language: str
    compilers: Sequence[str]
    sources: Sequence[str]
    headers: Sequence[str]
    options: Sequence[Sequence[str]]
    others: str = ""
    trial: str = ""

    def load(self) -> ctypes.CDLL:
        """Load the library, compiled now if need be; raise `NotCompiled` where it cannot be."""
        if os.environ.get("TEXTPOLICY_COMPILE") == "off":
            raise NotCompiled("TEXTPOLICY_COMPILE=off")
        try:
            path = self.compiled(cache_folder())
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                # A file that a full disk has cut short is written again.
                path.unlink()
                return ctypes.CDLL(str(self.compiled(path.parent)))
        except (OSError, RuntimeError) as error:
            raise NotCompiled(f"compiled {self.name} cannot be kept or opened: {error}") from None

    def compiled(self, folder: Path) -> Path:
        """Return the library's file in this folder; compile it if it is new."""
        path = folder / f"{self.name}-{self.key}.so"
        failed = path.with_suffix(".failed")
        if path.exists():
            return path
        if failed.exists():
            raise NotCompiled(f"{failed.read_text()}; to try again, remove {failed}")
        compiler = self._find_compiler()
        with (
            doing("compiling functions for this processor, only this once"),
            tempfile.TemporaryDirectory(dir=folder) as scratch,
        ):
            new = Path(scratch) / path.name
            try:
                self._compile(compiler, new)
                self.try_out(new)
            except NotCompiled as error:
                # The next process does not spend the seconds of a trial again. A busy machine may
                # have more time then.
                if self.trial and not isinstance(error, _TookTooLong):
                    failed.write_text(str(error))
                raise
            new.replace(path)
        return path

    @property
    def key(self) -> str:
        """What names the compiled file: the sources, the processor, and the rest."""
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
        text = b"".join((FOLDER / name).read_bytes() for name in (*self.sources, *self.headers))
        facts = [platform.machine(), *sorted(processor), repr(self.options), self.others]
        return hashlib.sha256(text + "\n".join(facts).encode()).hexdigest()[:16]

    def try_out(self, path: Path) -> None:
        """Run the trial; raise if a new library fails it."""
        if not self.trial:
            return
        failed = _run([sys.executable, "-c", self.trial, str(path)])
        if failed is not None:
            raise NotCompiled(f"{self.name} does not work on this machine: {failed}")

    def _find_compiler(self) -> str:
        compiler = next(filter(None, map(shutil.which, self.compilers)), None)
        if compiler is None:
            names = " or ".join([", ".join(self.compilers[:-1]), self.compilers[-1]])
            raise NotCompiled(f"no {self.language} compiler ({names}) is installed")
        return compiler

    def _compile(self, compiler: str, path: Path) -> None:
        sources = [str(FOLDER / name) for name in self.sources]
        command = [compiler, "-shared", "-fPIC", "-w", "-o", str(path), *sources]
        failed = None
        for options in self.options:
            failed = _run([*command, *options])
            if failed is None:
                return
        raise NotCompiled(f"{compiler} failed: {failed}")


def _run(command: Sequence[str]) -> str | None:
    """Run a program; return None, or the last line that it printed if it failed."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise _TookTooLong(f"{command[0]} took more than {_SECONDS} seconds") from None
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
