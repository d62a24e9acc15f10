"""Turning scored rollouts, or demonstrations, into moved weights."""

from textpolicy.training.trainer import Trainer

__all__ = ["Trainer"]
