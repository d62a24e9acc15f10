"""Decode steps of mlx-lm as its users load it, with OpenBLAS in place of the BLAS of its wheel."""

# This import comes first: it switches the compiled products off.
from with_ours_by_openblas import decode_by_openblas  # isort: skip

from decode import mlx_lm
from mlx_lm import load

if __name__ == "__main__":
    decode_by_openblas(load, mlx_lm)
