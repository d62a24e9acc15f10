"""How many rows an environment trains on, if its tasks are rows."""

from textpolicy.environments.dataset import Dataset
from textpolicy.environments.environment import AgentTasks, Environment, EpisodeTasks
from textpolicy.environments.preamble import TasksWithPreamble


def count_training_rows(environment: Environment) -> int | None:
    """Return the number of training rows, or None if the tasks are drawn or streamed."""
    tasks = environment.tasks
    while isinstance(tasks, EpisodeTasks | AgentTasks | TasksWithPreamble):
        tasks = tasks.source
    return len(tasks.train) or None if isinstance(tasks, Dataset) else None
