"""The `textpolicy` command: what was asked, the answer on stdout, and one message if it failed."""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module

from textpolicy import backend, fast_cpu
from textpolicy.cli.options import build_parser
from textpolicy.errors import TextPolicyError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 misused, 130 interrupted."""
    options = build_parser().parse_args(argv)
    failed = f"textpolicy {options.command}: "
    if missing := backend.missing_backend():
        print(f"{failed}{missing}", file=sys.stderr)
        return 1
    try:
        _set_threads(options)
        report = import_module(f"textpolicy.cli.{options.module}").run(options)
    except KeyboardInterrupt:
        print(f"{failed}interrupted", file=sys.stderr)
        return 130
    except (TextPolicyError, OSError) as error:
        print(f"{failed}{error}", file=sys.stderr)
        return 1
    print(json.dumps(report.data) if options.json else report.text)
    return report.exit_code


def _set_threads(options: Namespace) -> None:
    if options.threads:
        fast_cpu.use_threads(options.threads)
    elif options.model == "tiny" and fast_cpu.status().threads:
        fast_cpu.use_threads(1)
