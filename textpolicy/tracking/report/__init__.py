"""A run, or several beside each other, as one HTML file that needs nothing else."""

from textpolicy.tracking.report.page import write_report

__all__ = ["write_report"]
