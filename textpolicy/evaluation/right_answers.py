"""What a reward reports for the right answers to held-out tasks, beside what a policy earns."""

import numpy as np

from textpolicy.environments.chat import prompt_text
from textpolicy.errors import RewardError, TaskError
from textpolicy.evaluation.evaluate import HeldOut, equal_share
from textpolicy.rewards import sample_of
from textpolicy.tracking.doubts import EQUAL_ANSWERS, RIGHT_ANSWERS
from textpolicy.types import Metrics

# A judge may take seconds for each answer.
_SCORED = 8


def right_answer_metrics(heldout: HeldOut, *, scored: bool = True) -> Metrics:
    """Return how many right answers are equal and, if `scored`, what a few of them earn.

    Tasks of several turns, and tasks whose right answers are not known, have no numbers.
    """
    try:
        return _measure(heldout, _SCORED if scored else 0)
    except (RewardError, TaskError):
        # The run has ended well, and a right answer need not be one that the reward can read.
        return {}


def _measure(heldout: HeldOut, scored: int) -> Metrics:
    tasks = [task for task in heldout.tasks if not (task.env or task.agent)]
    golds = [heldout.gold(task.example) if heldout.gold else None for task in tasks]
    known = [(task, gold) for task, gold in zip(tasks, golds, strict=True) if gold is not None]
    if not known:
        return {}
    verdicts = heldout.scorer.score(
        [sample_of(prompt_text(task.prompt), gold, task.example) for task, gold in known[:scored]]
    )
    reported = [
        {**one.metrics, **{f"{name}/mean": part for name, part in one.parts.items()}}
        for one in verdicts
    ]
    names = dict.fromkeys(name for one in reported for name in one)
    metrics = {
        f"rewards/{name}": float(np.mean([one[name] for one in reported if name in one]))
        for name in names
    }
    metrics |= {EQUAL_ANSWERS: equal_share([gold for _, gold in known])}
    return {f"{RIGHT_ANSWERS}{name}": value for name, value in metrics.items()}
