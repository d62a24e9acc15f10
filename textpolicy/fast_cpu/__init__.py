"""What makes mlx fast on Linux CPUs: another matrix product, and functions that models call."""

from textpolicy.fast_cpu.blas import Blas, enable, measure_gflops, status, use_threads

__all__ = ["Blas", "enable", "measure_gflops", "status", "use_threads"]
