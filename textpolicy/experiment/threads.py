"""How many threads the matrix products of a command get."""

from textpolicy import fast_cpu
from textpolicy.config.sections import ModelOptions


def use_threads(options: ModelOptions) -> None:
    """As many as asked for; one for the embedded model, whose products are too small to share."""
    if options.threads:
        fast_cpu.set_threads(options.threads)
    elif options.name == "tiny" and fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
