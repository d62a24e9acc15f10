"""What makes mlx fast on Linux CPUs: a faster BLAS, and faster functions for models to call.

Importing this package changes nothing. `enable` switches the BLAS of the process. `load_model`
calls `enable`; if you build a model without `load_model`, call `enable` yourself.
"""

from textpolicy.fast_cpu.blas import (
    BlasStatus,
    ThreadSpeeds,
    default_threads,
    enable,
    measure_gflops,
    measure_threads,
    set_threads,
)

__all__ = [
    "BlasStatus",
    "ThreadSpeeds",
    "default_threads",
    "enable",
    "measure_gflops",
    "measure_threads",
    "set_threads",
]
