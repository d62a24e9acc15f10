"""A program that each rank runs: they exchange messages, and one has the fault that is named."""

import os
import signal
import sys
import time

from textpolicy.cli.output import print_note
from textpolicy.errors import RunInterruptedError
from textpolicy.ranks import join_ranks


def have_fault(name: str) -> None:
    if name == "raise":
        raise ValueError("the second rank has a bug")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "leaves":
        sys.exit(0)
    time.sleep(1000)


if __name__ == "__main__":
    _, fault, deadline, *_ = sys.argv
    number = int(os.environ.get("MLX_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
    if fault == "never joins" and number == 1:
        time.sleep(1000)
    try:
        ranks = join_ranks(deadline=float(deadline), tell=print_note)
        for turn in range(4):
            ranks.gather(b"turn %d" % turn)
            if turn == 2 and number == 1:
                have_fault(fault)
    except RunInterruptedError as error:
        print_note(str(error))
        os._exit(os.EX_TEMPFAIL)
