"""Conversations of one person with several models: each side answers and keeps its own history."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textpolicy.cli.columns import AnswersView
from textpolicy.errors import PromptError
from textpolicy.file_writing import atomic_replace
from textpolicy.generation.policy import ModelPolicy
from textpolicy.types import Message, StopReason


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer of a side to a question, or the error for which there is no answer."""

    side: str
    question: str
    version: int
    answer: str | None = None
    stop_reason: StopReason | None = None
    error: str | None = None


class Side:
    """A model in the chat, by name, with its conversation. `adapter` is None for the base model."""

    def __init__(
        self, name: str, policy: ModelPolicy, beginning: Sequence[Message], adapter: Path | None
    ) -> None:
        self.name = name
        self.policy = policy
        self.adapter = adapter
        self._beginning = list(beginning)
        self.messages = list(beginning)

    def reset(self) -> None:
        """Begin a new conversation, with the system message only."""
        self.messages = list(self._beginning)

    def take_back(self) -> str | None:
        """Forget the last question and its answer; return the question, or None without one."""
        if len(self.messages) == len(self._beginning):
            return None
        *self.messages, question, _ = self.messages
        return question["content"]

    def data(self) -> dict[str, Any]:
        """Return the conversation for JSON. `textpolicy sft` reads its `messages`."""
        return {
            "side": self.name,
            "adapter": str(self.adapter) if self.adapter else None,
            "version": self.policy.version,
            "messages": self.messages,
        }


def ask(sides: Sequence[Side], question: str, seed: int, view: AnswersView) -> list[Reply]:
    """Ask all sides; they answer by turns, a piece each, and remember question and answer.

    All sides draw with the same random keys. A side that cannot read the question, because its
    conversation would become too long, forgets it.
    """
    answers = {number: _Answer(side, question, seed) for number, side in enumerate(sides)}
    unfinished = dict(answers)
    while unfinished:
        for number, answer in list(unfinished.items()):
            if piece := answer.next_piece():
                view.add(number, piece)
            else:
                view.end(number, failed=answer.error is not None)
                del unfinished[number]
    return [answer.reply() for answer in answers.values()]


class _Answer:
    """An answer that a side gives piece by piece."""

    def __init__(self, side: Side, question: str, seed: int) -> None:
        self._side = side
        self._asked: list[Message] = [*side.messages, {"role": "user", "content": question}]
        self._stop_reason: StopReason | None = None
        self._pieces: list[str] = []
        self.error: str | None = None
        self._stream = self._read(seed)

    def next_piece(self) -> str:
        """Return the next piece of the answer, or an empty text at its end."""
        return next(self._stream, "")

    def reply(self) -> Reply:
        """Return the whole answer, once it has ended; the side remembers it from now on."""
        side, answer = self._side, "".join(self._pieces)
        if self.error is None:
            side.messages = [*self._asked, {"role": "assistant", "content": answer}]
        return Reply(
            side=side.name,
            question=self._asked[-1]["content"],
            version=side.policy.version,
            answer=answer if self.error is None else None,
            stop_reason=self._stop_reason,
            error=self.error,
        )

    def _read(self, seed: int) -> Iterator[str]:
        stream = self._side.policy.stream(self._asked, seed=seed)
        try:
            while True:
                piece = next(stream)
                self._pieces.append(piece)
                yield piece
        except StopIteration as end:
            self._stop_reason = end.value
        except PromptError as error:
            self.error = str(error)


def save_conversations(sides: Sequence[Side], path: Path) -> None:
    """Write each side's conversation as a line of JSON, which `textpolicy sft --data` reads."""
    with atomic_replace(path, private=True) as temporary:
        lines = [json.dumps(side.data(), ensure_ascii=False) for side in sides]
        temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")
