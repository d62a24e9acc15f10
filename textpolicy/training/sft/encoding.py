"""Rows to demonstrations: what is read, what is learned, and where an answer ends.

The prompt of a demonstration is, token for token, what a policy is fed when it samples
(`textpolicy/chat_template.py` serves both), so that what is learned here is what is sampled later.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.chat_template import encode_rendered, render_chat
from textpolicy.environments.data_files import DataRow
from textpolicy.errors import ConfigError, DataError, PromptError
from textpolicy.training.sft.demonstrations import Demonstration
from textpolicy.types import Message

_ROW_FORMATS = (
    '{"text"}, {"prompt", "completion"}, {"messages"} or {"instruction", "input", "output"}, '
    "where `input` may be missing"
)


# Where other libraries keep a part of what a message says.
_BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Demonstrations, and what became of rows that are longer than was allowed."""

    demonstrations: list[Demonstration]
    truncated: int
    """Rows that were cut at the limit, and still teach what is before it."""
    dropped: int
    """Rows of which nothing to learn was left."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How rows become token ids.

    `learn` chooses between the answers (of a plain text, all of it) and everything that follows
    the first token. `system` opens conversations that have no system message of their own.
    """

    tokenizer: TokenizerWrapper
    learn: str = "answers"
    system: str | None = None
    max_length: int | None = 2048

    def __post_init__(self) -> None:
        if self.learn not in ("answers", "everything"):
            raise ConfigError(f"learn is {self.learn!r}; expected 'answers' or 'everything'")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; expected at least 2, or None")

    def encode(self, rows: Iterable[tuple[str, DataRow]]) -> Encoded:
        """The demonstrations of rows that each come with their place, for messages."""
        whole = [self.demonstration(row, place) for place, row in rows]
        if self.max_length is None:
            return Encoded(demonstrations=whole, truncated=0, dropped=0)
        cut = [one.cut(self.max_length) for one in whole]
        kept = [one for one in cut if one is not None]
        shorter = sum(a is not b for a, b in zip(whole, cut, strict=True))
        dropped = len(whole) - len(kept)
        return Encoded(demonstrations=kept, truncated=shorter - dropped, dropped=dropped)

    def demonstration(self, row: DataRow, place: str) -> Demonstration:
        """The whole of one row, however long."""
        for columns, read in _READERS:
            if all(column in row for column in columns):
                try:
                    tokens, mask = read(self, row)
                except (DataError, PromptError) as error:
                    raise DataError(f"{place}: {error}") from error
                return self._checked(tokens, mask, place)
        raise DataError(f"{place}: it has the columns {list(row)}; expected {_ROW_FORMATS}")

    def _checked(self, tokens: list[int], mask: list[bool], place: str) -> Demonstration:
        if self.learn == "everything":
            mask = [False, *[True] * (len(tokens) - 1)]
        if not any(mask):
            raise DataError(f"{place}: there is nothing to learn in it, it is empty")
        return Demonstration(tokens=tokens, mask=mask)

    def _text(self, row: DataRow) -> tuple[list[int], list[bool]]:
        tokens = list(self.tokenizer.encode(_string(row, "text")))
        tokens = _ended(self.tokenizer, tokens)
        return tokens, [False, *[True] * (len(tokens) - 1)]

    def _pair(self, row: DataRow) -> tuple[list[int], list[bool]]:
        prompt, completion = row["prompt"], _string(row, "completion")
        if not isinstance(prompt, str):
            return self._conversation([*_messages(prompt), _answer(completion)])
        if self.tokenizer.has_chat_template:
            return self._conversation([_user(prompt), _answer(completion)])
        before = list(self.tokenizer.encode(prompt))
        after = list(self.tokenizer.encode(completion, add_special_tokens=False))
        after = _ended(self.tokenizer, after)
        return before + after, [False] * len(before) + [True] * len(after)

    def _instruction(self, row: DataRow) -> tuple[list[int], list[bool]]:
        said = [_string(row, "instruction"), _string(row, "input") if row.get("input") else ""]
        request = "\n\n".join(part for part in said if part)
        return self._pair({"prompt": request, "completion": _string(row, "output")})

    def _messages(self, row: DataRow) -> tuple[list[int], list[bool]]:
        if row.get("tools"):
            raise DataError(
                "it has tools, which are not shown to the model; write them into a system message "
                "as the chat template would"
            )
        return self._conversation(_messages(row["messages"]))

    def _conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of a conversation up to its last answer; every answer in it is learned."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        _check_turns(self.tokenizer, messages)
        whole = render_chat(self.tokenizer, messages, add_generation_prompt=False)
        answers = _answers(messages)
        starts = [_opening(self.tokenizer, messages, n, whole) for n in answers]
        for n, start, end in zip(answers, starts, [*starts[1:], None], strict=True):
            _check_kept(messages[n], n, whole[start:end])
        tokens = encode_rendered(self.tokenizer, whole[: starts[0]])
        mask = [False] * len(tokens)
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            answer = encode_rendered(self.tokenizer, whole[start:end])
            learned = self._length_of_answer(answer, last=end is None)
            if end is None:
                answer = _ended(self.tokenizer, answer[:learned])
                learned = len(answer)
            tokens += answer
            mask += [True] * learned + [False] * (len(answer) - learned)
        return tokens, mask

    def _length_of_answer(self, tokens: Sequence[int], *, last: bool) -> int:
        """How many tokens are said by the model: up to its stop token, and that one too."""
        ends = self.tokenizer.eos_token_ids
        found = next((n for n, token in enumerate(tokens, start=1) if token in ends), None)
        if found is None and not last:
            raise DataError(
                "the chat template writes no stop token after an answer, so where it ends among "
                "further messages is unknown; make a row of each answer"
            )
        return found or len(tokens)


_READERS: tuple[
    tuple[tuple[str, ...], Callable[[Encoding, DataRow], tuple[list[int], list[bool]]]], ...
] = (
    (("messages",), Encoding._messages),  # pyright: ignore[reportPrivateUsage]
    (("prompt", "completion"), Encoding._pair),  # pyright: ignore[reportPrivateUsage]
    (("instruction", "output"), Encoding._instruction),  # pyright: ignore[reportPrivateUsage]
    (("text",), Encoding._text),  # pyright: ignore[reportPrivateUsage]
)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _string(row: DataRow, column: str) -> str:
    if not isinstance(value := row[column], str):
        raise DataError(f"its {column} is {value!r:.60}; expected text")
    return value


def _messages(value: Any) -> list[Message]:
    """The messages, if that is what they are."""
    sound = isinstance(value, Sequence) and all(
        isinstance(m, Mapping)
        and isinstance(m.get("role"), str)
        and isinstance(m.get("content"), str)
        for m in value
    )
    if not value or isinstance(value, str) or not sound:
        raise DataError(
            f"its messages are {value!r:.60}; expected some, each with a role and a content of "
            'text, such as [{"role": "user", "content": "2+2="}, '
            '{"role": "assistant", "content": "4"}]'
        )
    for number, message in enumerate(value, start=1):
        if lost := [key for key in _BESIDE_CONTENT if message.get(key)]:
            raise DataError(
                f"message {number} has {lost[0]!r} beside its content, which would not be learned; "
                "write it into the content, as the model is to say it"
            )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _answers(messages: Sequence[Message]) -> list[int]:
    return [n for n, message in enumerate(messages) if message["role"] == "assistant"]


def _check_turns(tokenizer: TokenizerWrapper, messages: Sequence[Message]) -> None:
    if not tokenizer.has_chat_template:
        raise DataError(
            "the tokenizer has no chat template to write messages with; expected plain prompts "
            "and completions, or texts"
        )
    if not (answers := _answers(messages)) or answers[0] == 0:
        roles = [message["role"] for message in messages]
        raise DataError(f"its roles are {roles}; expected an assistant's answer to something")
    ends = tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
    for message in messages:
        if spelled := [end for end in ends if end in message["content"]]:
            raise DataError(
                f"a message spells {spelled[0]!r}, the stop token, which would end it there; "
                "leave it out, the chat template writes it"
            )


def _opening(tokenizer: TokenizerWrapper, messages: Sequence[Message], n: int, whole: str) -> int:
    """Where in the whole text message `n` begins to be the model's own."""
    opening = render_chat(tokenizer, messages[:n], add_generation_prompt=True)
    if not whole.startswith(opening):
        raise DataError(
            f"the chat template writes the conversation before message {n + 1} otherwise once it "
            "goes on, so what the model would have read there is unknown; make a row of each answer"
        )
    return len(opening)


def _check_kept(message: Message, n: int, written: str) -> None:
    """Templates take thoughts, or whole answers, out of all turns but the last."""
    # What it adds and takes of white space, around thoughts for one, is its own.
    if "".join(message["content"].split()) not in "".join(written.split()):
        raise DataError(
            f"the chat template leaves out a part of message {n + 1}, {message['content']!r:.60}; "
            "if that is because the conversation goes on, make a row of each answer"
        )


def _ended(tokenizer: TokenizerWrapper, tokens: list[int]) -> list[int]:
    """The tokens with a stop token last."""
    if tokens and tokens[-1] in tokenizer.eos_token_ids:
        return tokens
    return [*tokens, tokenizer.eos_token_id]
