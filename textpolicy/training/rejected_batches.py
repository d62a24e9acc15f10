"""Files of batches whose gradient was not finite, for finding the reason."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from textpolicy.types import RolloutGroup


def save_rejected_batch(groups: Sequence[RolloutGroup], folder: Path) -> Path:
    """Write each rollout with its task as a JSON line, and return the path of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"batch-{len(list(folder.iterdir())):04d}.jsonl"
    lines = (
        json.dumps({"task": group.task.id} | asdict(rollout))
        for group in groups
        for rollout in group.rollouts
    )
    path.write_text("\n".join(lines) + "\n")
    return path
