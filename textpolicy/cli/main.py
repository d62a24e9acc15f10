"""The `textpolicy` command: runs a command, prints its answer, or one error message."""

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from textpolicy import backend
from textpolicy.cli.parser import build_parser
from textpolicy.errors import ConfigError, RunInterruptedError, TextPolicyError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 1: failed. 2: wrong usage. 75: the run can be resumed. 130, 143: ended by a signal.
    """
    given = sys.argv[1:] if argv is None else argv
    options = build_parser(next(iter(given), "")).parse_args(given)
    failed = f"textpolicy {options.command}: "
    if missing := backend.missing_backend():
        print(f"{failed}{missing}", file=sys.stderr)
        return 1
    try:
        answer = import_module(f"textpolicy.cli.commands.{options.command}").run(options)
    except KeyboardInterrupt:
        print(f"{failed}interrupted", file=sys.stderr)
        return 130
    except (TextPolicyError, OSError) as error:
        print(f"{failed}{error}", file=sys.stderr)
        return _exit_code(error)
    if text := json.dumps(answer.data) if options.json else answer.text:
        _answer(text)
    return answer.exit_code


def _answer(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # A reader such as `head` closed the pipe; Python would write again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_code(error: Exception) -> int:
    if isinstance(error, RunInterruptedError):
        return os.EX_TEMPFAIL
    return 2 if isinstance(error, ConfigError) else 1
