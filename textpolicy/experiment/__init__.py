"""A run from its config: directory, evaluation, tracking, checkpoints, best adapter, report."""
