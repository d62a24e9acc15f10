"""The other end of `textpolicy.rewards.children`: a process that calls rewards until told to stop.

It reads calls from one socket and writes JSON to it. What the user's code prints goes elsewhere.
"""

import faulthandler
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from textpolicy.errors import RewardError, TextPolicyError
from textpolicy.rewards.call_reward import Callee, RewardResult
from textpolicy.rewards.reward_file import MAIN
from textpolicy.rewards.reward_function import Reward, Sample
from textpolicy.user_code import load_python_file, raise_user_errors_as

STARTUP_SECONDS = 60.0
"""How long a child may take to import the file of its rewards."""
GRACE = 1.0
"""Seconds after its deadline that a child ends by itself, should its parent be gone."""


@dataclass(frozen=True, slots=True)
class Call:
    """Samples for the reward at `index`: `limit` seconds for each await, `seconds` for all."""

    index: int
    samples: Sequence[Sample]
    limit: float
    seconds: float


def serve_rewards(descriptor: int, lifeline: int) -> None:
    """Serve the parent on this socket until it closes it, or ends, which ends the lifeline."""
    # Programs that the user's code starts must not hold the socket.
    os.set_inheritable(descriptor, False)
    os.set_inheritable(lifeline, False)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    # A thread cannot help where C code holds the interpreter; an alarm can.
    _set_alarm(STARTUP_SECONDS + GRACE)
    _limit(resource.RLIMIT_CORE, 0)
    faulthandler.enable()
    connection = Connection(descriptor)
    try:
        callees = [Callee(reward) for reward in _receive_rewards(connection)]
    except TextPolicyError as error:
        _send(connection, failed=str(error))
        return
    _send(connection, ready=True)
    _set_alarm(0)
    try:
        while True:
            _serve(connection, callees)
    except EOFError:
        return


def _end_with_parent(lifeline: int) -> None:
    """Wait for the parent's end, then kill this process and whatever it has started."""
    os.read(lifeline, 1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _receive_rewards(connection: Connection) -> list[Reward]:
    received: tuple[Mapping[str, str], int | None] = connection.recv()
    files, memory = received
    if memory is not None:
        _limit(resource.RLIMIT_AS, memory)
    for name, file in files.items():
        module = load_python_file(Path(file), what="reward", error=RewardError, module_name=name)
        if name == MAIN:
            # What a script defines is known as part of __main__, wherever it is looked up.
            sys.modules["__main__"] = module
    with raise_user_errors_as(RewardError, "finding the reward functions in a new process"):
        return connection.recv()


def _limit(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most, hard))


def _serve(connection: Connection, callees: list[Callee]) -> None:
    data = connection.recv_bytes()

    def emit(position: int, outcome: RewardResult) -> None:
        _send(connection, position=position, outcome=asdict(outcome))

    try:
        with raise_user_errors_as(RewardError, "reading the rows in the reward's process"):
            # The stub takes this function for a method.
            call: Call = ForkingPickler.loads(data)  # pyright: ignore[reportAttributeAccessIssue]
        _set_alarm(call.seconds + GRACE)
        callees[call.index].run(call.samples, emit, call.limit)
    except TextPolicyError as error:
        _send(connection, failed=str(error))
    else:
        _send(connection, done=True)
    finally:
        _set_alarm(0)


def _set_alarm(seconds: float) -> None:
    # The default action of this signal ends the process, even one that is stuck in C.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _send(connection: Connection, **message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode())
