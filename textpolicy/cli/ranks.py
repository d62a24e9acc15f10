"""A run by several processes: starting them, and what a process prints that is not the first."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from textpolicy.cli.answer import Answer
from textpolicy.cli.listener import quiet_listener
from textpolicy.cli.output import print_note
from textpolicy.errors import RunInterruptedError
from textpolicy.experiment import run
from textpolicy.ranks import Ranks
from textpolicy.ranks.launcher import launch
from textpolicy.ranks.patience import LAUNCHER

_HERE = ("--ranks", "--backend")
"""Flags for the process that starts the others."""


def launch_ranks(options: Namespace) -> Answer:
    """Run the same command in several processes, and return the exit code of all of them."""
    status = launch(
        [sys.executable, "-P", "-m", "textpolicy", *_without_own_flags(options.given)],
        options.ranks,
        backend=options.backend,
        deadline=options.rank_deadline,
        tell=print_note,
    )
    # The first process has printed the answer.
    return Answer(data=None, text="", exit_code=status)


def follow_first_rank(ranks: Ranks) -> Answer:
    """Take part in the run of the first process, and print nothing but errors."""
    with quiet_listener() as listener:
        try:
            run(on_event=listener, ranks=ranks)
        except RunInterruptedError:
            if not (ranks.lost_another and LAUNCHER in os.environ):
                raise
            # The rank that has ended says why, and the launcher names it.
            return Answer(data=None, text="", exit_code=os.EX_TEMPFAIL)
    return Answer(data=None, text="", exit_code=0)


def _without_own_flags(given: Sequence[str]) -> list[str]:
    kept: list[str] = []
    words = iter(given)
    for word in words:
        if word in _HERE:
            next(words, None)
        elif word.partition("=")[0] not in _HERE:
            kept.append(word)
    return kept
