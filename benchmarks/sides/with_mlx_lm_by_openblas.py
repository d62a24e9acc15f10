"""Decode steps of mlx-lm as its users load it, with OpenBLAS in place of the BLAS of its wheel.

The weights become float32, because mlx's products in bfloat16 are far slower on a CPU.
"""

# This import comes first: it switches the compiled products off.
from with_ours_by_openblas import decode_by_openblas  # isort: skip

from typing import Any

import mlx.core as mx
import mlx_lm
from decode import mlx_lm as decode


def load(path: str) -> Any:
    model, *others = mlx_lm.load(path)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model, *others


if __name__ == "__main__":
    decode_by_openblas(load, decode)
