"""Products of few rows, such as those of decoding, at the speed at which memory gives the weights.

OpenBLAS takes up to three times as long for a matrix of 1 to 32 rows. The loops of `few_rows.c` and
of `bfloat16_copies.c` are compiled for the processor by the C compiler of the machine, once, and
kept in the user's cache folder. On a machine without a C compiler, OpenBLAS computes these products
too. The environment variable `TEXTPOLICY_COMPILE=off` says not to compile.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / name for name in ("few_rows.c", "bfloat16_copies.c", "loops.h")]
_COMPILERS = ("cc", "gcc", "clang")
_NATIVE = {"aarch64": "-mcpu=native"}
_SECONDS = 60
_WRITABLE_BY_OTHERS = 0o022
# OpenMP's threads poll for their next product about as long as those of OpenBLAS do, then sleep.
_POLLING = ("GOMP_SPINCOUNT", "1500")


class NotCompiled(Exception):
    """OpenBLAS computes products of few rows too; the message says why."""


def load_product(others: int, thread_count: int) -> int:
    """Return the address of a `cblas_sgemm` that is fast for few rows.

    It calls the function at `others` for other products, and asks the one at `thread_count` how
    many threads it may use. Raise `NotCompiled` where there is no such function.
    """
    library = compiled_library()
    library.few_rows_begin(ctypes.c_void_p(others), ctypes.c_void_p(thread_count))
    address = ctypes.cast(library.few_rows_product, ctypes.c_void_p).value
    assert address is not None
    return address


@cache
def compiled_library() -> ctypes.CDLL:
    """Return the compiled loops; raise `NotCompiled` where there are none."""
    if os.environ.get("TEXTPOLICY_COMPILE") == "off":
        raise NotCompiled("TEXTPOLICY_COMPILE=off")
    try:
        path = compiled_loops(_cache_folder())
        try:
            return _open(path)
        except OSError:
            # A file that a full disk has cut short is written again.
            path.unlink()
            return _open(compiled_loops(path.parent))
    except (OSError, RuntimeError) as error:
        raise NotCompiled(f"the compiled loops cannot be kept or opened: {error}") from None


def compiled_loops(folder: Path) -> Path:
    """Return the file in this folder with the loops for this processor; compile if it is new."""
    path = folder / f"few_rows-{_key()}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile(Path(scratch) / path.name).replace(path)
    return path


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "textpolicy"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & _WRITABLE_BY_OTHERS:
        raise NotCompiled(f"others than you could change the files in {folder}")
    return folder


def _key() -> str:
    """Return what names the compiled file: the source and the processor that it is for."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    # A home folder may be shared by machines whose processors know other instructions.
    processor = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    text = b"".join(source.read_bytes() for source in _SOURCES)
    text += "\n".join([platform.machine(), *sorted(processor)]).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def _compile(path: Path) -> Path:
    """Compile the sources to `path`, with threads if the compiler has OpenMP."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise NotCompiled("no C compiler (cc, gcc or clang) is installed")
    native = _NATIVE.get(platform.machine(), "-march=native")
    sources = [str(source) for source in _SOURCES if source.suffix == ".c"]
    command = [compiler, "-O3", native, "-shared", "-fPIC", "-pthread", "-w", *sources]
    command += ["-o", str(path)]
    said = ""
    for options in (["-fopenmp"], []):
        try:
            done = subprocess.run(
                [*command, *options], capture_output=True, text=True, check=False, timeout=_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise NotCompiled(f"{compiler} took more than {_SECONDS} seconds") from None
        if done.returncode == 0:
            return path
        said = done.stderr
    raise NotCompiled(
        f"{compiler} failed: {said.strip().splitlines()[-1] if said else 'no reason'}"
    )


def _open(path: Path) -> ctypes.CDLL:
    name, value = _POLLING
    given = os.environ.get(name)
    os.environ[name] = given or value
    try:
        return ctypes.CDLL(str(path))
    finally:
        if given is None:
            # OpenMP has read the variable when it started. Child processes do not inherit it.
            del os.environ[name]
