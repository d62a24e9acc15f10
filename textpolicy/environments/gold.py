"""The right answers to a task, turn by turn: what checks play and supervised warm-up imitates."""

from textpolicy.environments.environment import Environment
from textpolicy.environments.faults import environment_errors
from textpolicy.errors import TaskError
from textpolicy.types import Task

_MAX_TURNS = 200


def gold_answers(environment: Environment, task: Task) -> list[str]:
    """An answer a turn, from the environment's `gold`, or from playing what its infos call gold."""
    if environment.gold is not None:
        gold = environment.gold(task.example)
        return [gold] if isinstance(gold, str) else gold
    if task.env is None:
        raise TaskError(f"environment {environment.name} has no gold answers")
    answers: list[str] = []
    with environment_errors(task.id, "playing gold answers"):
        env = task.env()
        _, info = env.reset(seed=task.seed)
        over = False
        while not over and len(answers) < _MAX_TURNS:
            if "gold" not in info:
                raise TaskError("info has no 'gold': the environment does not tell right answers")
            answers.append(info["gold"])
            _, _, terminated, truncated, info = env.step(answers[-1])
            over = terminated or truncated
        env.close()
    return answers
