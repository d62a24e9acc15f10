"""Products of few rows, such as those of decoding, at the speed at which memory gives the weights.

OpenBLAS takes up to three times as long for a matrix of 1 to 32 rows. The loops of `few_rows.c` and
of `bfloat16_copies.c` are compiled for the processor by the C compiler of the machine. On a machine
without a C compiler, OpenBLAS computes these products too.
"""

import ctypes
from contextlib import suppress
from typing import Any

from textpolicy.fast_cpu.compiler import NATIVE, CompiledLibrary, once

_OPTIMISED = ("-O3", NATIVE, "-fno-math-errno", "-fno-trapping-math", "-pthread")
LOOPS = CompiledLibrary(
    name="loops",
    language="C",
    compilers=("cc", "gcc", "clang"),
    sources=(
        "few_rows.c",
        "bfloat16_copies.c",
        "packed_weights.c",
        "elementwise.c",
        "attention.c",
        "attention_of_positions.c",
        "token_logprobs.c",
        "drawn_tokens.c",
        "lora.c",
        "decoder_block.c",
        "threads.c",
    ),
    headers=("loops.h", "rows.h"),
    # With threads if the compiler has OpenMP.
    options=((*_OPTIMISED, "-fopenmp"), _OPTIMISED),
)


@once
def compiled_loops() -> ctypes.CDLL:
    """Return the compiled loops; raise `NotCompiled` where there are none."""
    return LOOPS.load()


def load_product(others: int, thread_count: int) -> int:
    """Return the address of a `cblas_sgemm` that is fast for few rows.

    It calls the function at `others` for other products, and asks the one at `thread_count` how
    many threads it may use. Raise `NotCompiled` where there is no such function.
    """
    library = compiled_loops()
    library.few_rows_begin(ctypes.c_void_p(others), ctypes.c_void_p(thread_count))
    address = ctypes.cast(library.few_rows_product, ctypes.c_void_p).value
    assert address is not None
    return address


def share_threads(setter: Any, count: int) -> None:
    """Let OpenBLAS compute with the threads of the loops, which become so many.

    `setter` is OpenBLAS' function `openblas_set_threads_callback_function`.
    """
    with suppress(AttributeError):  # clang has its own threads.
        compiled_loops().threads_begin(ctypes.cast(setter, ctypes.c_void_p), count)
