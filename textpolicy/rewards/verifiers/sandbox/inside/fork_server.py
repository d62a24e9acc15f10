"""The first process of a box: it confines itself, then forks one process for each test."""

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

_CAPABILITY_VERSION = 0x20080522
HEADER = struct.Struct("!II")
"""The seconds that a test may take, and the length of the text that follows."""


def confine() -> dict[str, Any]:
    """Give up root and set the limits that the parent has passed as JSON in the last argument.

    Return what the parent has passed.
    """
    config = json.loads(sys.argv[-1])
    if config["user"] is not None:
        os.setgroups([])
        os.setresgid(*[config["group"]] * 3)
        os.setresuid(*[config["user"]] * 3)
        _drop_inheritable_capabilities()
    sys.path.extend(config["packages"])
    sys.dont_write_bytecode = True
    for name, most in config["limits"].items():
        if name in vars(resource):
            limit(vars(resource)[name], most)
    return config


def _drop_inheritable_capabilities() -> None:
    """Drop the last set of capabilities, which outlives the change of the user."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    if ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError("capset failed")


def limit(what: int, most: int) -> None:
    """Lower a limit for good."""
    _, hard = resource.getrlimit(what)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    # macOS refuses some limits.
    try:
        resource.setrlimit(what, (most, most))
    except ValueError:
        if sys.platform == "linux":
            raise


def serve_forks(serve: Callable[[str, Sequence[int]], None]) -> None:
    """Call `serve` in a fork of its own for each text and its descriptors that the parent sends."""
    config = confine()
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    control.sendall(b"R")
    child = 0
    while True:
        header, descriptors, _, _ = socket.recv_fds(control, HEADER.size, 2)
        if len(header) < HEADER.size:
            return
        seconds, length = HEADER.unpack(header)
        text = _receive(control, length)
        if child:
            # In a box, -1 is every process but this one; elsewhere it would be the whole machine.
            _end_forks(-1 if config["boxed"] else -child)
        child = os.fork()
        if not child:
            control.close()
            os.setsid()
            limit(resource.RLIMIT_CPU, seconds)
            # Outside a box this counts all processes of the user, so it is set after the fork.
            limit(resource.RLIMIT_NPROC, config["processes"])
            serve(text, descriptors)
            sys.stdout.flush()
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _end_forks(target: int) -> None:
    """Kill what the last test has left running."""
    try:
        os.kill(target, signal.SIGKILL)
        while True:
            os.waitpid(-1, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _receive(control: socket.socket, length: int) -> str:
    data = bytearray()
    while len(data) < length:
        part = control.recv(length - len(data))
        if not part:
            os._exit(1)
        data += part
    return data.decode("utf-8", "surrogatepass")
