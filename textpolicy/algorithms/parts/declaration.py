"""What an algorithm's file declares beside its two functions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """Facts about an algorithm that its two functions cannot say; `DECLARATION` in its file."""

    paper: str = ""
    """The arXiv number of the paper, or its author and year."""
    needs_advantages: bool = False
    """Whether the gradient of the loss, without KL term and entropy bonus, is 0 where all
    advantages are 0. The trainer then skips backward passes."""
    needs_teacher: bool = False
    """Whether the loss needs another model as the trainer's `reference`."""
    dynamic_sampling: bool = False
    """Whether the paper replaces groups without signal while it collects rollouts."""
    trainer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keywords of `Trainer` that differ from one update on freshly sampled rollouts."""
