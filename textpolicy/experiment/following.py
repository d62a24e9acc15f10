"""What the first rank of a run sends the others, and how the others run without a run directory."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from textpolicy.config import SFTConfig, TrainConfig, changed, config_from, to_toml
from textpolicy.errors import ConfigError
from textpolicy.experiment.assembly import RunConfig, checkpoints_of
from textpolicy.experiment.identity import Hashes, changes_of
from textpolicy.experiment.resuming import Parts, Start
from textpolicy.ranks import Ranks
from textpolicy.runs import RunDirectory
from textpolicy.training.checkpoint import Checkpoint, part_of_rank, ranks_in, read_checkpoint
from textpolicy.untrusted.parsing import parse_json, parse_toml

# Services would get each row twice, and the first rank watches for all.
_FIRST_RANK_ONLY = {
    "tracking.wandb_artifacts": False,
    "tracking.wandb": None,
    "tracking.trackio": None,
    "tracking.tensorboard": False,
    "run.sample_groups": 0,
    "run.stop_on_stall": False,
}


@dataclass(frozen=True, kw_only=True)
class FollowedRun:
    """The run of the first rank, as another rank takes part in it. `directory` is thrown away."""

    settings: TrainConfig
    directory: RunDirectory
    force: bool
    resume: Checkpoint | None

    def start(self, ranks: Ranks, parts: Parts) -> Start:
        """Return where this rank starts."""
        return Start(
            checkpoints=checkpoints_of(self.settings, self.directory, ranks),
            parts=parts,
            resume=self.resume,
            force=self.force,
            ranks=ranks,
        )


def send_start(settings: TrainConfig, directory: RunDirectory, start: Start) -> None:
    """Send the other ranks the config, and the rows and the checkpoint that a run resumes from.

    They may be on other machines, which do not have the folder of the run.
    """
    ranks, resume = start.ranks, start.resume
    if ranks.size == 1:
        return
    told = {"config": to_toml(settings), "force": start.force, "step": resume and resume.step}
    ranks.send_first(json.dumps(told).encode())
    if resume:
        ranks.send_first(start.checkpoints.path_of(resume).read_bytes())
        ranks.send_first(directory.metrics.read_bytes() if directory.metrics.exists() else b"")


@contextmanager
def followed_run(ranks: Ranks) -> Generator[FollowedRun]:
    """Receive a run from the first rank; its directory lasts as long as the block."""
    told = parse_json(ranks.send_first(b""))
    settings = config_from(
        parse_toml(told["config"]), TrainConfig(), "the config that the first rank has sent"
    )
    with TemporaryDirectory(prefix="textpolicy-rank-") as folder:
        directory = RunDirectory(Path(folder))
        directory.claim()
        with directory.lock():
            resume = None
            if told["step"] is not None:
                path = directory.checkpoints / "received.safetensors"
                path.write_bytes(ranks.send_first(b""))
                directory.metrics.write_bytes(ranks.send_first(b""))
                resume = part_of_rank(read_checkpoint(path), ranks)
            yield FollowedRun(
                settings=changed(settings, _FIRST_RANK_ONLY),
                directory=directory,
                force=told["force"],
                resume=resume,
            )


def check_can_be_divided(settings: RunConfig, ranks: int) -> None:
    """Raise `ConfigError` if several ranks cannot train by this config together."""
    if ranks == 1:
        return
    if isinstance(settings, SFTConfig):
        raise ConfigError(
            f"supervised training runs in one process, and {ranks} ranks were started. Type "
            "the command without mpirun and mlx.launch; several ranks train by reinforcement "
            "learning only"
        )
    rollout = settings.rollout
    if rollout.workers:
        raise ConfigError(
            f"workers is {rollout.workers} and the run has {ranks} ranks, each of which "
            "samples its part itself. Leave out --workers, or train with one rank"
        )
    synchronous = rollout.steps_per_generation - 1
    if rollout.max_staleness not in (None, synchronous):
        raise ConfigError(
            f"max_staleness is {rollout.max_staleness} and the run has {ranks} ranks, which "
            "must all train on the same groups. Leave out --max-staleness, or train with one rank "
            "and --workers"
        )


def check_same_files(identity: Hashes, ranks: Ranks) -> None:
    """Raise `ConfigError` if a file that the numbers depend on differs among the ranks."""
    first, *others = ranks.gather_json(identity)
    for rank, other in enumerate(others, 1):
        if changes := changes_of(first, other):
            raise ConfigError(
                f"rank {rank} does not have the files of rank 0: {', '.join(changes)}. Copy the "
                "model, the data and your code to the same paths on every machine"
            )


def check_ranks(checkpoint: Checkpoint, ranks: Ranks, *, force: bool) -> None:
    """Raise `ConfigError` if another number of ranks made the checkpoint, unless `force`."""
    before = ranks_in(checkpoint)
    if before != ranks.size and not force:
        raise ConfigError(
            f"the run has {before} rank{'s' * (before > 1)} so far, and is resumed with "
            f"{ranks.size}. Another number of ranks sums gradients in another order, so the last "
            f"digits of its numbers differ. Resume with {before}, or add --force"
        )
