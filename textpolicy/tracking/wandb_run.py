"""A run on Weights & Biases: the same metrics under the same names, with explicit steps."""

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from textpolicy.types import Metrics

# Without it `finish` waits for ever once the network is gone; the local file stays complete.
_FINISH_SECONDS = 30
_INIT_SECONDS = 30


class WandbRun:
    """Logs to `project`: online where an API key is at hand, into `folder` without network if not.

    `WANDB_MODE` decides if it is set. Runs kept offline are uploaded later by `wandb sync`.
    """

    def __init__(self, project: str, *, folder: Path, config: Mapping[str, Any]) -> None:
        # The import takes more than a second, and most runs do without.
        import wandb

        chosen = "WANDB_MODE" in os.environ
        self._run = wandb.init(
            project=project,
            dir=str(folder),
            config=dict(config),
            mode=None if chosen else "online" if _has_key() else "offline",
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,
            ),
        )

    def write(self, step: int, metrics: Metrics) -> None:
        """Log `metrics` at `step`."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """Finish the run, within a bounded time."""
        self._run.finish()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
