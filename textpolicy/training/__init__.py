"""Training: policy gradients on rollouts with rewards, and supervised training in `sft`."""

from textpolicy.training.trainer import Trainer

__all__ = ["Trainer"]
