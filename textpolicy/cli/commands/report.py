"""`textpolicy report`: write an HTML page about one or several runs."""

from argparse import Namespace

from textpolicy.cli.answer import Report
from textpolicy.tracking.report import write_report


def run(options: Namespace) -> Report:
    path = write_report(options.paths, options.output)
    return Report(data={"report": str(path)}, text=f"{path}")
