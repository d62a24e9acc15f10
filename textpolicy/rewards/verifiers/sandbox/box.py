"""A box: a process under bubblewrap that sees Python's files, read-only, and nothing else.

A box has no network, no environment, no /proc, no writable file and no capabilities. Started by
root, its processes become a user that owns nothing on this machine. A filter limits their system
calls, and the kernel limits their memory, their number and their time.
"""

import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

from textpolicy.errors import ConfigError
from textpolicy.rewards.verifiers.sandbox.syscall_filter import system_call_filter
from textpolicy.untrusted.parsing import parse_json
from textpolicy.user_code.killable_process import kill_descendants

_PROGRAMS = Path(__file__).parent / "inside"
_MODULES = "textpolicy.rewards.verifiers.sandbox.inside"
_LOADER = """\
import json, sys, types
for name, text in json.loads(sys.argv[1]):
    sys.modules[name] = module = types.ModuleType(name)
    exec(compile(text, name, "exec"), vars(module))
vars(module)["run_" + name.rpartition(".")[2]]()
"""
_SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/nix/store")
# Made first: bubblewrap would make them for the user that starts it alone.
_FOLDERS = ("/python", "/python/bin", "/usr", "/usr/share", "/dev")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_ENVIRONMENT = {"PATH": "/usr/bin:/bin"}
_NAMESPACES = (
    *("--unshare-pid", "--unshare-ipc", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
    *("--hostname", "box", "--die-with-parent", "--new-session", "--clearenv"),
)
_FIRST_USER, _USERS = 2_000_000_000, 1 << 27
"""Numbers of users that no system gives to a person or a service."""
_MAX_PROCESSES = 64
_LIMITS = {
    "RLIMIT_FSIZE": 1 << 20,
    "RLIMIT_NOFILE": 64,
    # With 0 the kernel would still start a program that collects crashes; with 1 it does not.
    "RLIMIT_CORE": 1,
    "RLIMIT_MEMLOCK": 1 << 16,
    "RLIMIT_MSGQUEUE": 0,
    "RLIMIT_SIGPENDING": 256,
    "RLIMIT_RTPRIO": 0,
    "RLIMIT_NICE": 0,
}
STARTING_SECONDS, _CLOSING_SECONDS = 20.0, 2.0
_MOST_READ = 1 << 20
UNSAFE_ADVICE = (
    "or pass unsafe=True to run the code as a plain process that can read and delete your files"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A running box: `control` is the parent's socket, the other two are what it prints."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    output: int
    errors: int
    unsafe: bool

    def close(self) -> None:
        """Kill every process of the box, and return when they have ended."""
        if self.unsafe:
            kill_descendants(self.process.pid)
        # The end of bubblewrap is the end of its namespace, and so of all processes in it.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if not self.unsafe:
            read_to_end(self.output, seconds=_CLOSING_SECONDS)
        self.control.close()
        os.close(self.output)
        os.close(self.errors)


def start_box(program: str, *, memory: int, unsafe: bool) -> Box:
    """Start a program of `inside/` in a box, or with `unsafe` as a plain process with limits."""
    if not unsafe:
        check_boxes()
    return _start(program, memory=memory, unsafe=unsafe)


@cache
def check_boxes() -> None:
    """Raise `ConfigError` if boxes cannot be had here, or if a box has a hole."""
    box = _start("box_check", memory=1 << 29, unsafe=False)
    try:
        printed = read_to_end(box.output, seconds=STARTING_SECONDS)
        complaints = read_to_end(box.errors, seconds=_CLOSING_SECONDS)
    finally:
        box.close()
    try:
        holes: list[str] = parse_json(printed)
    except ValueError as error:
        raise cannot_isolate(complaints) from error
    if holes:
        raise ConfigError(
            "running model-written code was refused, because the sandbox of this machine does not "
            f"isolate: a process in it {'; '.join(holes)}. Report this with the version of "
            f"bubblewrap (bwrap --version), {UNSAFE_ADVICE}"
        )


def cannot_isolate(complaints: str) -> ConfigError:
    """Return the error for a box that did not start; `complaints` is what it printed."""
    return ConfigError(
        "running model-written code was refused, because bubblewrap could not isolate it here: "
        f"{complaints.strip()[-500:] or 'it printed nothing'}. Inside a container, allow user "
        "namespaces (docker run --security-opt seccomp=unconfined --security-opt "
        "apparmor=unconfined --cap-add SYS_ADMIN); on Ubuntu, sysctl "
        f"kernel.apparmor_restrict_unprivileged_userns=0; {UNSAFE_ADVICE}"
    )


def _start(program: str, *, memory: int, unsafe: bool) -> Box:
    user = None if unsafe else _unused_user()
    config = {
        "boxed": not unsafe,
        # Names the run in the list of processes.
        "run": os.getpid(),
        "user": user,
        "group": user,
        "packages": [] if unsafe else ["/python/packages"],
        "processes": _MAX_PROCESSES,
        "limits": _LIMITS | {"RLIMIT_AS": memory},
    }
    arguments = ["-I", "-c", _LOADER, json.dumps(_sources(program)), json.dumps(config)]
    with tempfile.TemporaryFile() as filter_file:
        command = [sys.executable]
        if not unsafe:
            command = _bubblewrap(filter_file.fileno(), as_root=user is not None)
            filter_file.write(system_call_filter(platform.machine()))
            filter_file.seek(0)
        own_socket, box_socket = socket.socketpair()
        output, box_output = os.pipe()
        errors, box_errors = os.pipe()
        with box_socket:
            process = subprocess.Popen(
                [*command, *arguments],
                stdin=box_socket.fileno(),
                stdout=box_output,
                stderr=box_errors,
                cwd="/",
                env=_ENVIRONMENT,
                pass_fds=[] if unsafe else [filter_file.fileno()],
                start_new_session=True,
            )
    os.close(box_output)
    os.close(box_errors)
    return Box(process=process, control=own_socket, output=output, errors=errors, unsafe=unsafe)


def _sources(program: str) -> list[tuple[str, str]]:
    """Return the names and texts of the modules of a program; the last one is the program."""
    names = dict.fromkeys(["fork_server", "plain_values", program])
    return [(f"{_MODULES}.{name}", (_PROGRAMS / f"{name}.py").read_text("utf-8")) for name in names]


def _bubblewrap(filter_descriptor: int, *, as_root: bool) -> list[str]:
    bubblewrap = shutil.which("bwrap")
    if sys.platform != "linux":
        raise ConfigError(
            "running model-written code needs bubblewrap to isolate the code, and bubblewrap runs "
            f"on Linux only; run the code there, {UNSAFE_ADVICE}"
        )
    if bubblewrap is None:
        raise ConfigError(
            "running model-written code needs bubblewrap to isolate the code, and the command "
            "`bwrap` is not installed; install it (Debian, Ubuntu: apt install bubblewrap), "
            + UNSAFE_ADVICE
        )
    # Root has to become another user inside; nobody else has capabilities to begin with.
    capabilities = ["--cap-drop", "ALL"]
    if as_root:
        capabilities += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        capabilities += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
        capabilities += [*_can_disable_namespaces(bubblewrap)]
    python = f"/python/bin/{Path(sys.executable).resolve().name}"
    return [
        *(bubblewrap, *_NAMESPACES, *capabilities, "--seccomp", str(filter_descriptor)),
        *(part for folder in _FOLDERS for part in ("--dir", folder)),
        *(part for source, place in _visible_files() for part in ("--ro-bind-try", source, place)),
        *(part for device in _DEVICES for part in ("--dev-bind", device, device)),
        *("--setenv", "LD_LIBRARY_PATH", "/python/lib", "--setenv", "OPENBLAS_NUM_THREADS", "1"),
        *("--remount-ro", "/", "--chdir", "/", python),
    ]


def _visible_files() -> Iterator[tuple[str, str]]:
    """Yield what a box can read, and where it finds it: the libraries and Python, no programs."""
    yield from ((folder, folder) for folder in _SYSTEM_LIBRARIES)
    python = Path(sys.executable).resolve()
    yield str(python), f"/python/bin/{python.name}"
    for folder in ("lib", "lib64"):
        yield f"{sys.base_prefix}/{folder}", f"/python/{folder}"
    yield sysconfig.get_path("purelib"), "/python/packages"
    yield "/usr/share/zoneinfo", "/usr/share/zoneinfo"


@cache
def _can_disable_namespaces(bubblewrap: str) -> Sequence[str]:
    """Return the option that forbids more user namespaces, where this bubblewrap knows it."""
    shown = subprocess.run([bubblewrap, "--help"], capture_output=True, text=True, timeout=20)
    return ["--disable-userns"] if "--disable-userns" in shown.stdout else []


def _unused_user() -> int | None:
    """Return the number of a user that owns nothing, if this process may become that user."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return None
    user = _FIRST_USER + secrets.randbelow(_USERS)
    if all(_has_user(Path(f"/proc/self/{kind}_map"), user) for kind in ("uid", "gid")):
        return user
    return None


def _has_user(user_map: Path, user: int) -> bool:
    lines = [[int(part) for part in line.split()] for line in user_map.read_text().splitlines()]
    return any(first <= user < first + count for first, _, count in lines)


def read_to_end(pipe: int, *, seconds: float) -> str:
    """Return the rest of what is written to a pipe, or what was written within some seconds."""
    data, deadline = b"", time.monotonic() + seconds
    while wait([pipe], max(0.0, deadline - time.monotonic())):
        part = os.read(pipe, 1 << 16)
        data += part
        if not part or len(data) > _MOST_READ:
            break
    return data.decode(errors="replace")
