"""The processes of rollout workers: which they are, and what they have computed."""

import os
from pathlib import Path

from textpolicy.rollout.executors.crew import Crew


def process_of(crew: Crew, number: int = 1) -> int:
    """Return the id of a worker's process, which is below its guard."""
    guard = crew._workers[number - 1].link.process.process.pid
    return int(Path(f"/proc/{guard}/task/{guard}/children").read_text().split()[0])


def cpu_seconds_of(process: int) -> float:
    """Return the CPU time that a process has used."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
