"""The rollout workers of a run: how each is built in its process, and the crew of all."""

from collections.abc import Callable
from dataclasses import dataclass

from textpolicy.config import TrainConfig
from textpolicy.config.train import NO_RAY
from textpolicy.device_sizes import sizes_of, use_sizes
from textpolicy.experiment.assembly import build_policy, load_adapted_model, sampling_of
from textpolicy.experiment.tasks import find_worker_task
from textpolicy.experiment.threads import apply_thread_option
from textpolicy.rollout.executors.crew import Crew
from textpolicy.rollout.executors.ray import RayWorkers
from textpolicy.rollout.executors.rollout_worker import RolloutWorker
from textpolicy.rollout.executors.spawned import SpawnedWorkers
from textpolicy.runs import RunDirectory
from textpolicy.training.checkpoint import seed_random_numbers

NO_SWAP = (
    "--swap tokens changes nothing in this run, because nothing is sampled while the trainer "
    "trains. It has an effect with --workers, and with a --max-staleness of at least "
    "--steps-per-generation"
)


@dataclass(frozen=True)
class BuildRunWorker:
    """Builds a worker of a run: the policy, the rewards and the environment of its config.

    The adapters are those that the run began with. A worker loads the newest ones before its first
    job.
    """

    config: TrainConfig

    def __call__(self) -> RolloutWorker:
        config = self.config
        apply_thread_option(config.model, workers=config.rollout.workers)
        use_sizes(sizes_of(config.sizes))
        # As in the trainer's process: before the user's code is loaded.
        seed_random_numbers(config.run.seed)
        environment, rewards = find_worker_task(config.task)
        model, tokenizer, _ = load_adapted_model(config)
        policy = build_policy(model, tokenizer, config, sampling_of(config, environment))
        return RolloutWorker(policy, rewards, attach=environment.attach)


def open_crew(config: TrainConfig, directory: RunDirectory, note: Callable[[str], None]) -> Crew:
    """Start the workers of a run. Their incidents are lines for `note`."""
    build, rollout = BuildRunWorker(config), config.rollout
    without_ray = rollout.ray == NO_RAY
    return Crew(
        SpawnedWorkers(build) if without_ray else RayWorkers(build, rollout.workers, rollout.ray),
        rollout.workers,
        directory.workers,
        deadline=rollout.worker_deadline,
        note=note,
    )
