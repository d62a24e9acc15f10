"""What a run trains on: a stream of tasks, a fixed held-out list, and the reward of both."""

from textpolicy.environments.dataset import Dataset
from textpolicy.environments.environment import Environment, check, load
from textpolicy.environments.rows import columns_of, load_rows

__all__ = ["Dataset", "Environment", "check", "columns_of", "load", "load_rows"]
