"""The `textpolicy` command: runs a command, prints its answer, or one error message."""

import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from textpolicy import activity, backend
from textpolicy.cli.leftovers import end_soon
from textpolicy.cli.output import (
    forget_closed_pipes,
    guard_terminal,
    print_answer,
    print_note,
    print_warning,
)
from textpolicy.cli.parser import START, build_parser
from textpolicy.errors import RunInterruptedError, TextPolicyError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, as `parser.EXIT_CODES` lists them.

    Without `argv` this is the command of a process, which ends soon after it.
    """
    if argv is not None:
        return _run(argv)
    guard_terminal()
    try:
        exit_code = _run(sys.argv[1:])
    except KeyboardInterrupt:
        # Before the command began, while its parser and mlx were loaded.
        print_note("textpolicy: interrupted")
        exit_code = 130
    forget_closed_pipes()
    if exit_code and "OMPI_COMM_WORLD_RANK" in os.environ:
        # Open MPI's exit handler would wait for the other ranks, which may wait for this one.
        os._exit(exit_code)
    end_soon(exit_code)
    return exit_code


def _run(given: Sequence[str]) -> int:
    options = build_parser(_command_of(given)).parse_args(given)
    options.given = given
    if options.version:
        print_answer(_versions())
        return 0
    if options.command is None:
        print_answer(START)
        return 0
    begun = activity.times_begun()
    failed = f"textpolicy {options.command}: "
    if missing := backend.missing_backend():
        print_note(f"{failed}{missing}")
        return 1
    try:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            answer = import_module(f"textpolicy.cli.commands.{options.command}").run(options)
    except KeyboardInterrupt:
        print_note(f"{failed}interrupted")
        return 130
    except (TextPolicyError, OSError) as error:
        print_note(f"{failed}{_message(error)}")
        return _exit_code(error, begun=activity.times_begun() > begun)
    text = json.dumps(answer.data) if options.json else answer.text
    if text and answer.data is not None:
        print_answer(text)
    return answer.exit_code


def _command_of(given: Sequence[str]) -> str:
    """Return the command whose options must be known: the first word, or the one after help."""
    words = [word for word in given if not word.startswith("-") and word != "help"]
    return next(iter(words), "")


def _versions() -> str:
    # Several packages may be missing, and the answer says so without an error.
    (own, version), *others = backend.versions().items()
    packages = ", ".join(f"{name} {found or 'not installed'}" for name, found in others)
    return f"{own} {version or 'from its sources'} ({packages}, Python {platform.python_version()})"


def _message(error: Exception) -> str:
    """Return what an error says, and of an error of the system what to do next."""
    if isinstance(error, TextPolicyError) or not isinstance(error, OSError) or not error.filename:
        return str(error)
    path = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    return f"{path} cannot be used: {error.strerror}. Choose another path, or correct this one"


def _exit_code(error: Exception, *, begun: bool) -> int:
    if isinstance(error, RunInterruptedError):
        return os.EX_TEMPFAIL
    return 1 if begun else 2
