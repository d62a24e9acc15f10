"""`textpolicy report`: write an HTML page about one or several runs."""

from argparse import Namespace

from textpolicy.cli.answer import Answer
from textpolicy.tracking.report import write_report


def run(options: Namespace) -> Answer:
    path = write_report(options.paths, options.output)
    return Answer(data={"report": str(path)}, text=f"{path}")
