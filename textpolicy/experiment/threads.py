"""The threads of matrix products that a run takes, and advice if other programs slow them down."""

import os
import sys

from textpolicy import fast_cpu
from textpolicy.config.train import ModelOptions

ONE_IS_FASTER = "one thread is faster now, because other programs use this machine: --threads 1"


def apply_thread_option(options: ModelOptions, *, workers: int = 0) -> None:
    """Set the threads of matrix products: one for the embedded model, whose products are small.

    Beside `workers`, each process gets one thread too. Other runs leave a core to other programs.
    """
    if options.threads:
        fast_cpu.set_threads(options.threads)
    elif (options.name == "tiny" or workers) and fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    elif threads := fast_cpu.default_threads():
        fast_cpu.set_threads(threads)


def thread_advice(options: ModelOptions, *, workers: int = 0) -> str | None:
    """Return what to type if other programs make several threads slower than one; else None.

    A run that takes one thread anyway gets no advice: see `apply_thread_option`. OpenBLAS waits
    for the slowest of its threads, which gets less of its core than the others.
    """
    is_busy = sys.platform == "linux" and os.getloadavg()[0] >= 1
    if options.threads or options.name == "tiny" or workers or not is_busy:
        return None
    speeds = fast_cpu.measure_threads()
    if speeds is None or not speeds.is_one_faster:
        return None
    return (
        f"{ONE_IS_FASTER} ({speeds.gflops_of_one} GFLOP/s, and {speeds.gflops} with "
        f"{speeds.of_a_run} threads)"
    )
