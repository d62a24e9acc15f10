"""What makes mlx fast on Linux CPUs: a faster BLAS, and faster functions for models to call.

Importing this room changes nothing. `enable` switches the BLAS of the process; `load_model` calls
`enable`, and who builds a model without `load_model` calls `enable` by hand.
"""

from textpolicy.fast_cpu.blas import BlasStatus, enable, measure_gflops, set_threads

__all__ = ["BlasStatus", "enable", "measure_gflops", "set_threads"]
