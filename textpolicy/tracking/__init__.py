"""Tracking: metrics and samples of a run, in files, in the console, in services and as a report."""
