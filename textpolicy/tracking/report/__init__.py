"""The HTML report of one or several runs, in a single file that loads nothing else."""

from textpolicy.tracking.report.page import write_report

__all__ = ["write_report"]
