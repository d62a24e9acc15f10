"""The text of an answer as clients see it: cut at stop strings, thoughts and tool calls apart."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.prompts import decode_text
from textpolicy.generation.streamed_text import StreamedText
from textpolicy.generation.thinking import ThoughtReader, thought_marks
from textpolicy.serving.faults import attempt_step

Kind = Literal["content", "reasoning", "call"]


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """A piece of an answer. `name` is the function of a call, whose text has the arguments."""

    kind: Kind
    text: str
    name: str = ""


class AnswerReader:
    """Reads the answers of one tokenizer."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._thoughts = ThoughtReader(tokenizer)
        self._marks, mark_tokens = thought_marks(tokenizer)
        added = tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        calls = {*(tokenizer.tool_call_start_tokens or ()), *(tokenizer.tool_call_end_tokens or ())}
        shown = special & (mark_tokens | calls)
        # None if the text without special tokens has all marks.
        self._hidden = special - shown if shown else None

    def completion(self, stop: Sequence[str]) -> "AnswerText":
        """Return a reader of one completion, which is all content."""
        return AnswerText(StreamedText(self._tokenizer), StopCut(stop), None)

    def chat(
        self, prompt: Sequence[int], stop: Sequence[str], tools: Sequence[Mapping[str, Any]]
    ) -> "AnswerText":
        """Return a reader of one answer in a conversation."""
        inside = self._thoughts.begins_inside(prompt)
        parts = PartSplitter(self._tokenizer, self._marks, tools, in_thought=inside)
        return AnswerText(StreamedText(self._tokenizer, self._decode), StopCut(stop), parts)

    def _decode(self, tokens: Sequence[int]) -> str:
        if self._hidden is None:
            return decode_text(self._tokenizer, tokens)
        shown = [token for token in tokens if token not in self._hidden]
        return self._tokenizer.decode(shown, skip_special_tokens=False)


class AnswerText:
    """One answer while its tokens come."""

    def __init__(self, text: StreamedText, stop: "StopCut", parts: "PartSplitter | None") -> None:
        self._text = text
        self._stop = stop
        self._parts = parts

    def take(self, tokens: Sequence[int], *, ended: bool) -> list[AnswerPart]:
        """Return what the answer has more than before, when it has these tokens."""
        piece = self._stop.take(self._text.next_piece(tokens, ended=ended), ended=ended)
        if self._parts is not None:
            return self._parts.take(piece, ended=ended)
        return [AnswerPart("content", piece)] if piece else []


class StopCut:
    """Ends a text before the first stop string, which may come in several pieces."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._waiting = ""
        self._cut = False

    def take(self, piece: str, *, ended: bool) -> str:
        """Return the part of the text that is certain now."""
        if self._cut:
            return ""
        text = self._waiting + piece
        found = [at for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            self._cut = True
            return text[: min(found)]
        certain = len(text) if ended else len(text) - _unsure(text, self._strings)
        self._waiting = text[certain:]
        return text[:certain]


class PartSplitter:
    """Tells thoughts, calls and content apart by their marks."""

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        marks: tuple[str, str],
        tools: Sequence[Mapping[str, Any]],
        *,
        in_thought: bool,
    ) -> None:
        self._opening, self._closing = marks
        calls = bool(tools) and tokenizer.has_tool_calling
        self._call_start: str | None = tokenizer.tool_call_start if calls else None
        self._call_end: str = (tokenizer.tool_call_end or "") if calls else ""
        self._parser = tokenizer.tool_parser
        self._tools = list(tools)
        self._kind: Kind = "reasoning" if in_thought else "content"
        self._waiting = ""
        # White space around a thought or a call belongs to no part.
        self._trims = in_thought
        self._space = ""
        self._begins = in_thought

    def take(self, piece: str, *, ended: bool) -> list[AnswerPart]:
        """Return the parts that are certain now."""
        self._waiting += piece
        parts: list[AnswerPart] = []
        while found := self._next_mark():
            at, mark, following = found
            before, self._waiting = self._waiting[:at], self._waiting[at + len(mark) :]
            parts += self._leave(before, closed=True)
            self._enter(following)
        if ended:
            rest, self._waiting = self._waiting, ""
            parts += self._leave(rest, closed=False)
        elif self._kind != "call":
            certain = len(self._waiting) - _unsure(self._waiting, list(self._marks()))
            text, self._waiting = self._waiting[:certain], self._waiting[certain:]
            parts += self._show(text)
        return parts

    def _marks(self) -> dict[str, Kind]:
        """Return the marks that end the present part, each with the part that follows."""
        if self._kind == "reasoning":
            return {self._closing: "content"}
        if self._kind == "call":
            return {self._call_end: "content"} if self._call_end else {}
        calls: dict[str, Kind] = {self._call_start: "call"} if self._call_start else {}
        return {self._opening: "reasoning", **calls}

    def _next_mark(self) -> tuple[int, str, Kind] | None:
        found: list[tuple[int, str, Kind]] = [
            (at, mark, kind)
            for mark, kind in self._marks().items()
            if (at := self._waiting.find(mark)) >= 0
        ]
        return min(found) if found else None

    def _enter(self, kind: Kind) -> None:
        self._trims = self._trims or kind != "content"
        self._begins = self._trims
        self._kind, self._space = kind, ""

    def _leave(self, text: str, *, closed: bool) -> list[AnswerPart]:
        """Return the last of the present part."""
        return self._call(text, closed=closed) if self._kind == "call" else self._show(text)

    def _show(self, text: str) -> list[AnswerPart]:
        if self._begins:
            text = text.lstrip()
            if self._kind == "reasoning":
                text = text.removeprefix(self._opening).lstrip()
        if self._trims:
            text = self._space + text
            shown = text.rstrip()
            self._space = text[len(shown) :] if shown else text
            text = shown
        if not text:
            return []
        self._begins = False
        return [AnswerPart(self._kind, text)]

    def _call(self, text: str, *, closed: bool) -> list[AnswerPart]:
        """Return the calls that the text spells, or the text as content if it spells none."""
        parser: Any = self._parser
        parsed, _ = attempt_step(lambda: parser(text, self._tools))
        found: list[Any] = parsed if isinstance(parsed, list) else [parsed]
        if all(isinstance(one, dict) and "name" in one for one in found):
            return [_call_part(one) for one in found]
        end = self._call_end if closed else ""
        return [AnswerPart("content", f"{self._call_start}{text}{end}")]


def _call_part(call: Mapping[str, Any]) -> AnswerPart:
    arguments = call.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return AnswerPart("call", text, name=str(call["name"]))


def new_call_id() -> str:
    """Return an id for a tool call, by which a later message names it."""
    return f"call_{secrets.token_hex(12)}"


def _unsure(text: str, marks: Sequence[str]) -> int:
    """Return how many last characters may be the beginning of a mark."""
    longest = min(len(text), max((len(mark) for mark in marks), default=1) - 1)
    lengths = range(longest, 0, -1)
    return next((n for n in lengths if any(mark.startswith(text[-n:]) for mark in marks)), 0)
