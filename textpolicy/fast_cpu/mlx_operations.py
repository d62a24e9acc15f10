"""Operations of mlx that compute arrays by compiled functions of ours, on a Linux CPU.

mlx computes exponentials on a CPU without vector instructions, and one operation after another
reads and writes the whole array. The functions of `elementwise.c` do neither. `mlx_operations.cpp`
makes operations of them that are as lazy as mlx's own. It is compiled once against the headers in
mlx's wheel, and tried in a process of its own before it is kept. Without a C++ compiler, or where
the trial fails, mlx's own operations compute the same numbers.
"""

import ctypes
import re
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from textpolicy.fast_cpu.blas import enable
from textpolicy.fast_cpu.compiler import CompiledLibrary, NotCompiled, once
from textpolicy.fast_cpu.few_rows import compiled_loops
from textpolicy.fast_cpu.function_table import (
    NotReplaced,
    imported_functions,
    replace_functions,
)

_MLX = Path(mx.__file__).parent
_VERSION: str = cast(Any, mx).__version__
_MAKER = "_ZN3mlx4core4fast12metal_kernelE"
_LARGEST = 2**31 - 1  # Numbers are passed as 32-bit ones.
_TRIAL = """
import sys
from pathlib import Path
from textpolicy.fast_cpu.mlx_operations import try_library
try_library(Path(sys.argv[1]))
"""

_Shape = tuple[int, ...]
Operation = Callable[[Sequence[mx.array], Sequence[_Shape], Sequence[int]], list[mx.array]]
Elementwise = Callable[..., list[mx.array]]


def operation_for(
    name: str, *arrays: mx.array, vectors: int = 0, outputs: int = 1, least_width: int = 64
) -> Elementwise | None:
    """Return the operation by the function `compiled_...` of this name, if it suits these arrays.

    The arrays are of float32 and of one shape, and so are the outputs. With `vectors`, the
    operation takes so many vectors after them, as long as a row: the caller knows that they are
    of float32. `numbers` of a call are whole numbers for the function. The operation has no
    gradient, and no rule for `mx.vmap`. There is none for rows of fewer numbers than `least_width`,
    which mlx's own operations compute faster, on a GPU, and where `reason_of_none` has a reason.
    """
    first = arrays[0]
    shape = first.shape
    if not 0 < first.size <= _LARGEST or mx.default_device().type != mx.cpu:
        return None
    # The choice depends on the width alone, so what a row gives does not depend on other rows.
    if not shape or shape[-1] < least_width or first.dtype != mx.float32:
        return None
    if any(one.dtype != mx.float32 or one.shape != shape for one in arrays[1:]):
        return None
    return None if reason_of_none() else _by_elements(name, len(arrays) + vectors, outputs)


@cache
def bits_of(number: float) -> int:
    """Return the whole number with the bits of a float32 number, as compiled functions take it."""
    (bits,) = struct.unpack("<i", struct.pack("<f", number))
    return bits


@once
def reason_of_none() -> str:
    """Return why there are no such operations, or an empty text if there are."""
    blas = enable()
    if not blas.few_rows:
        return blas.few_rows_reason or f"{blas.name} multiplies, which is not OpenBLAS"
    try:
        _use(_library().load())
    except (NotCompiled, NotReplaced, OSError) as error:
        return str(error)
    return ""


def try_library(path: Path) -> None:
    """Compute with a new library, in a process that may crash; raise if a number is wrong."""
    enable()
    _use(ctypes.CDLL(str(path)))
    x = mx.array([[-1.0, 0.0, 2.0], [0.5, 3.0, 88.0]])
    (y,) = _by_elements("exp", 1, 1)(x)
    gradients = _by_elements("swiglu_gradients", 3, 2)
    of_gate, of_x = gradients(x[:, ::2], x[:, 1:], x[:, :2] + y[:, :2])
    (again,) = _by_elements("exp", 1, 1)(x.T)
    changing = compiled_operation("exp", 2, 2, changed=1)
    of_y, same = changing((y, x + 0), [x.shape, x.shape], (x.size, x.shape[-1]))
    _, same = changing((x, same), [x.shape, x.shape], (x.size, x.shape[-1]))
    expected = mx.exp(x)
    attention = compiled_operation("attention", 3, as_stored=True)
    # Where the first of two keys is used alone, its value is the mean.
    keys = mx.stack([x, y])[None]
    (seen,) = attention(
        (x[:1, None, None], keys[:, :1, :1], keys[:, 1:, :1]),
        [(1, 1, 1, 3)],
        (1, 1, 1, 1, 3, 3, 0, 0),
    )
    right = mx.allclose(y, expected) and mx.allclose(again, expected.T)
    right = right and mx.allclose(seen.reshape(3), expected[0])
    right = right and mx.array_equal(same, x) and mx.allclose(of_y, mx.exp(expected))
    if not right or (of_gate + of_x).shape != (2, 2):
        raise NotCompiled("it computes wrong numbers")


def _library() -> CompiledLibrary:
    mlx = _MLX / "lib" / "libmlx.so"
    about = mlx.stat()
    return CompiledLibrary(
        name="mlx_operations",
        language="C++",
        compilers=("c++", "g++", "clang++"),
        sources=("mlx_operations.cpp",),
        headers=(),
        # A function that mlx does not have fails when the library is opened, not when it is called.
        options=(
            [
                *("-std=c++20", "-O1", "-fvisibility=hidden"),
                *(f"-I{_MLX / 'include'}", str(mlx), "-Wl,-z,now"),
            ],
        ),
        others=f"{_VERSION} {mlx} {about.st_size} {about.st_mtime_ns}",
        trial=_TRIAL,
    )


def _use(library: ctypes.CDLL) -> None:
    """Let `mx.fast.metal_kernel` make operations of compiled functions."""
    library.textpolicy_running_mlx.restype = ctypes.c_char_p
    running = library.textpolicy_running_mlx().decode()
    major, minor, patch = map(int, re.findall(r"\d+", running)[:3])
    if library.textpolicy_compiled_for() != 100_000 * major + 1_000 * minor + patch:
        raise NotCompiled(f"this process has mlx {running}; another one is installed now")
    library.textpolicy_make_operation.restype = ctypes.c_void_p
    python_module = str(Path(mx.__file__).resolve())
    names = [name for name in imported_functions(python_module) if name.startswith(_MAKER)]
    if len(names) != 1:
        raise NotReplaced("this mlx makes operations in another way")
    replace_functions({names[0]: library.textpolicy_make_operation()}, python_module)


@cache
def _by_elements(name: str, inputs: int, outputs: int) -> Elementwise:
    kernel = compiled_operation(name, inputs, outputs)

    def compute(*arrays: mx.array, numbers: Sequence[int] = ()) -> list[mx.array]:
        # The compiled function trusts what `operation_for` has checked.
        shape = arrays[0].shape
        return kernel(arrays, [shape] * outputs, (arrays[0].size, shape[-1], *numbers))

    return compute


@cache
def compiled_operation(
    name: str, inputs: int, outputs: int = 1, *, as_stored: bool = False, changed: int = 0
) -> Operation:
    """Return the operation by the function `compiled_...` of this name.

    It takes arrays, the shapes of the outputs, which are of float32, and whole numbers for the
    function, which trusts all of them. The operation has no gradient, and no rule for `mx.vmap`.
    With `as_stored`, the function reads its inputs as they lie in memory, of at most four axes.
    It may change so many inputs from the second one on: the outputs from the second one on are the
    changed inputs, in the memory of the inputs where nobody else reads it.
    Call this only where `reason_of_none` has no reason.
    """
    function = ctypes.cast(compiled_loops()[f"compiled_{name}"], ctypes.c_void_p).value
    kernel: Any = mx.fast.metal_kernel(
        name=name,
        input_names=[f"input{number}" for number in range(inputs)],
        output_names=[f"output{number}" for number in range(outputs)],
        source=f"compiled {as_stored:d} {changed} {function}",
    )
    one, dtypes = (1, 1, 1), [mx.float32] * outputs

    def compute(
        arrays: Sequence[mx.array], shapes: Sequence[_Shape], numbers: Sequence[int]
    ) -> list[mx.array]:
        return kernel(
            inputs=arrays,
            # mlx takes the most time for arguments with names, so the numbers are a last shape.
            output_shapes=[*shapes, numbers],
            output_dtypes=dtypes,
            grid=one,
            threadgroup=one,
            stream=mx.cpu,
        )

    return compute
