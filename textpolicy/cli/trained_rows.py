"""Measured tasks that an adapter was trained on, as far as the files of its run still say."""

from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

from textpolicy.cli.typed_flags import short_path
from textpolicy.config import TrainConfig
from textpolicy.config.train import TaskOptions
from textpolicy.environments import load
from textpolicy.environments.data_files import load_rows
from textpolicy.environments.dataset import Dataset, prompt_key
from textpolicy.errors import ConfigError, DataError, TaskError
from textpolicy.experiment.resuming import read_started_config
from textpolicy.experiment.tasks import data_source_of
from textpolicy.runs.named_adapter import run_of_adapter
from textpolicy.types import Task


def note_about_trained_rows(adapter: Path, tasks: Sequence[Task]) -> list[str]:
    """Say how many of the tasks the run of the adapter trains on, or nothing if it is none.

    Nothing is known of streamed rows, of rows that are not in a file here, and of other adapters.
    """
    run = run_of_adapter(adapter)
    if run is None:
        return []
    try:
        config = read_started_config(run)
        trained = _training_prompts(config.task) if isinstance(config, TrainConfig) else set()
    except (ConfigError, DataError, TaskError):
        # The rows or the environment may have changed since the run, which is no fault here.
        return []
    found = sum(prompt_key(task.prompt) in trained for task in tasks)
    if not found:
        return []
    return [
        f"{found} of these {len(tasks)} tasks {'is' if found == 1 else 'are'} among the rows that "
        f"{short_path(run.path)} trains on, so its score is not one of held-out tasks. Measure "
        "on rows that no run has trained on: --eval-data ROWS"
    ]


def _training_prompts(task: TaskOptions) -> set[str]:
    if task.data is None or task.data_stream or not Path(task.data).is_file():
        return set()
    source = data_source_of(task)
    if task.env is None:
        tasks = source.tasks(task.prompt, name="rows")
        train = tasks.train if isinstance(tasks, Dataset) else []
        return {prompt_key(one.prompt) for one in train}
    with closing(load(task.env, source, agent_processes=task.agent_processes)) as environment:
        # No epoch has more tasks than the file has rows.
        train = islice(environment.stream(0), len(load_rows(task.data)))
        return {prompt_key(one.prompt) for one in train}
