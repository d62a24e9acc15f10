"""`LocalRay`: Ray on this machine for one run, which listens to this machine alone.

Two of Ray's own processes outlive a driver that is killed. Here all of them are below the guard of
a `KillableProcess`, and end when the run's process ends, however it ends.
"""

import os
import secrets
import shutil
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import wait
from time import monotonic
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.user_code.killable_process import KillableProcess, ParentLink

_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""With "0", Ray takes 127.0.0.1 for the address of the machine, on Linux too."""
_STARTUP_SECONDS = 180.0
_STORE_BYTES = 256 << 20
"""For the messages that are on their way, the adapters among them. More goes to the disk."""


def import_ray() -> Any:
    """Return the package `ray`. Raise `ConfigError` if it is not installed."""
    # Ray prints to standard output that an actor has ended. The crew says so itself.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        return import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "rollout workers that are Ray actors need Ray: pip install 'textpolicy[ray]'"
        ) from error


class LocalRay:
    """Starts Ray with room for `workers` actors. Only processes that it starts can talk to it."""

    def __init__(self, workers: int) -> None:
        if "ray" in sys.modules and os.environ.get(_LOOPBACK) != "0":
            raise ConfigError(
                "Ray was imported before the run could start it on this machine. Start it yourself "
                "with `ray start --head`, and give the run its address, such as --ray "
                "127.0.0.1:6379"
            )
        # Ray reads these when it is imported, here and in its own processes.
        os.environ[_LOOPBACK] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # By default, actors get the cores that no other process wants.
        os.environ.setdefault("RAY_worker_niceness", "0")
        import_ray()
        # The paths of sockets must be short: no folder of the run, and none of macOS for one user.
        self._folder = tempfile.mkdtemp(prefix="textpolicy-ray-", dir="/tmp")
        self._process = KillableProcess(f"{__name__}:{serve_ray.__name__}")
        self._process.send((self._folder, workers))
        self.address = self._read_address()

    def close(self) -> None:
        """End all processes of Ray and remove its files."""
        self._process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read_address(self) -> str:
        how, end = f"did not start in {_STARTUP_SECONDS:.0f} s", monotonic() + _STARTUP_SECONDS
        try:
            while (left := end - monotonic()) > 0:
                wait([self._process.socket, self._process.output], left)
                for message in self._process.read_messages():
                    return str(message["address"])
        except EOFError:
            how = self._process.kill_and_describe()
        self.close()
        raise ConfigError(f"Ray on this machine {how}")


def serve_ray(parent: ParentLink) -> None:
    """Start Ray, tell its address, and wait until the parent closes its end."""
    folder, workers = parent.receive()
    context = import_ray().init(
        address="local",
        num_cpus=workers,
        object_store_memory=_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=folder,
    )
    parent.send(address=context.address_info["gcs_address"])
    with suppress(EOFError):
        parent.receive()
