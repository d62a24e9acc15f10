"""Tells the thought of a completion apart from the visible answer, by the marks of the thought."""

from typing import Any

THINK_MARKS = ("<think>", "</think>")
"""The marks of a thought, where a model has no others."""


def split_thought(
    text: str, *, in_thought: bool = False, marks: tuple[str, str] = THINK_MARKS
) -> tuple[str, str]:
    """Return the thought and the visible answer of a text.

    `in_thought` says that the prompt has opened the thought, so that the text begins inside it. The
    answer is what follows the last closing mark. A text without marks is all answer. A thought that
    is not closed has no answer, which is an empty text then; so is the thought of a text without
    one.
    """
    opening, closing = marks
    thought, closed, answer = text.rpartition(closing)
    if opening in answer or (in_thought and not closed):
        thought, answer = text, ""
    elif not closed:
        return "", text
    return thought.strip().removeprefix(opening).strip(), answer.strip()


def thought_fields(
    text: str, *, in_thought: bool = False, thought: str | None = None, answer: str | None = None
) -> dict[str, Any]:
    """Return what a reward may ask for about the thought of a completion.

    If the policy has not told `thought` and `answer` apart, the marks in the text do.
    """
    if thought is None or answer is None:
        thought, answer = split_thought(text, in_thought=in_thought)
    return {"thought": thought, "visible_answer": answer, "in_thought": in_thought}
