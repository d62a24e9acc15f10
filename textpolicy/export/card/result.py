"""The scores and the curve of the run, in a model card."""

from collections.abc import Iterator
from pathlib import Path

from textpolicy.export.card.facts import CardFacts
from textpolicy.export.curve_picture import draw_curves
from textpolicy.export.markdown import code, markdown_table
from textpolicy.export.run_facts import HeldOutScore, RunFacts

PICTURE = "curve.png"
_NUMBERS = 8


def result_parts(card: CardFacts, folder: Path) -> Iterator[str]:
    """Yield the part about scores and the curve, which is drawn as a picture."""
    run = card.run
    if run is None or not (run.curves or run.before or run.after):
        return
    yield "## Result"
    measure = "validation loss" if run.supervised else "greedy reward on held-out tasks"
    rows: list[tuple[str, str]] = []
    if run.before:
        started = run.setting("adapter.start") is not None
        rows += _rows_of(run.before, measure, "before this run" if started else "of the base")
    if run.after:
        same = run.after.version == card.adapter.version
        whose = "of this adapter" if same else f"of version {run.after.version} of the adapter"
        rows += _rows_of(run.after, measure, whose)
    if rows:
        yield markdown_table(rows)
    if run.after and run.after.standard_error is not None:
        yield f"The number after ± is the standard error over {_task_count(run)} tasks."
    if run.after and card.was_chosen_by_score:
        yield "The adapter was chosen by this score, so the score is a little too good."
    if run.curves:
        (folder / PICTURE).write_bytes(draw_curves(list(run.curves.values())))
        yield f"![curve of the run]({PICTURE})"
        yield f"{_caption(run)}."


def _rows_of(score: HeldOutScore, measure: str, whose: str) -> list[tuple[str, str]]:
    """Return the score, and a few of the numbers that the rewards gave beside it."""
    numbers = [f"{code(one.name)} {one.amount}" for one in score.numbers[:_NUMBERS]]
    beside = [(f"numbers beside it, {whose}", ", ".join(numbers))] if numbers else []
    return [(f"{measure}, {whose}", f"{score}"), *beside]


def _task_count(run: RunFacts) -> str:
    count = run.setting("evaluation.count")
    return f"at most {count}" if isinstance(count, int) else "the"


def _caption(run: RunFacts) -> str:
    names = {
        "reward": "mean reward of the sampled completions",
        "eval/reward": "greedy reward on held-out tasks",
        "loss": "training loss",
        "validation/loss": "validation loss",
    }
    shown = [
        f"{names[name]} ({color})"
        for name, color in zip(run.curves, ("blue", "orange"), strict=False)
    ]
    text = " and ".join(shown)
    return f"{text[0].upper()}{text[1:]}, by step"
