"""Says what a process in a box can do, for the check before the first use of boxes."""

import ctypes
import json
import os
import socket
import sys

from textpolicy.rewards.verifiers.sandbox.inside.fork_server import confine

_NO_NEW_PRIVILEGES, _SECCOMP, _NEW_USER_NAMESPACE = 39, 21, 0x10000000
_CAPABILITY_VERSION = 0x20080522
_VISIBLE = {"dev", "lib", "lib64", "nix", "python", "usr"}


def _capabilities(libc: ctypes.CDLL) -> int:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()
    return 1 if libc.capget(header, sets) else sum(sets)


def _works(attempt: object, *args: object) -> bool:
    try:
        attempt(*args)  # type: ignore[operator]
    except OSError:
        return False
    return True


def _open_descriptors() -> list[int]:
    found = []
    for descriptor in range(3, 256):
        if _works(os.fstat, descriptor):
            found.append(descriptor)
    return found


def run_box_check() -> None:
    confine()
    libc = ctypes.CDLL(None, use_errno=True)
    name = f"/box-check-{os.getpid()}"
    folders = ["/", "/dev", "/dev/shm", "/usr/lib", "/usr/lib/python3", "/python/lib"]
    report = {
        "is root": os.getuid() == 0 or os.geteuid() == 0,
        "has capabilities": _capabilities(libc) != 0,
        "can gain privileges": libc.prctl(_NO_NEW_PRIVILEGES, 0, 0, 0, 0) != 1,
        "has no filter of system calls": libc.prctl(_SECCOMP, 0, 0, 0, 0) != 2,
        "can make a user namespace": libc.unshare(_NEW_USER_NAMESPACE) == 0,
        "can mount": libc.mount(b"none", b"/dev", b"tmpfs", 0, None) == 0,
        "can open a socket": _works(socket.socket),
        "sees files of the machine": not set(os.listdir("/")) <= _VISIBLE,
        "sees processes of the machine": os.getpid() > 50 or os.getppid() != 1,
        "sees the environment": sorted(set(os.environ) - {"LD_LIBRARY_PATH", "PWD", "LC_CTYPE"})
        != ["OPENBLAS_NUM_THREADS"],
        "can write a file": any(
            _works(lambda folder: os.open(folder + name, os.O_CREAT | os.O_WRONLY), folder)
            for folder in folders
        ),
        "holds files of its parent": bool(_open_descriptors()),
    }
    sys.stdout.write(json.dumps([hole for hole, there in report.items() if there]))
