"""`textpolicy inspect`: describe an adapter on disk without loading its model."""

from argparse import Namespace
from dataclasses import asdict

from textpolicy.adapters.files.inspection import inspect_adapter
from textpolicy.cli.answer import Answer


def run(options: Namespace) -> Answer:
    summary = inspect_adapter(options.path)
    data = asdict(summary) | {"parameters": summary.parameters}
    return Answer(data=data, text=str(summary), exit_code=int(bool(summary.not_finite)))
