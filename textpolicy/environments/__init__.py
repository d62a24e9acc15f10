"""What a run trains on: a stream of tasks, a fixed held-out list, and the reward of both."""

from textpolicy.environments.environment import Environment, check, load

__all__ = ["Environment", "check", "load"]
