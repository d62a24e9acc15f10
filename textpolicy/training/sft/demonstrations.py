"""Demonstrations: token ids, and which of them are learned. Data rows become demonstrations.

The chat template is applied by the same function as in sampling (`textpolicy/chat_template.py`), so
the prompt of a demonstration has exactly the tokens that a policy reads when it samples.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.chat_template import check_arguments, render_chat
from textpolicy.control_tokens import ControlTokens, PlainContent, encode_text
from textpolicy.environments.data_files import DataRow
from textpolicy.errors import ConfigError, DataError, PromptError, TrainingError
from textpolicy.types import Message

# Keys in which other libraries keep a part of a message.
_UNSUPPORTED_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """One sequence to imitate. `mask` is True on the answer, stop token included."""

    tokens: list[int]
    mask: list[bool]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.mask):
            raise ValueError(
                "a demonstration's tokens and mask must have equal length; got "
                f"{len(self.tokens)} and {len(self.mask)}"
            )
        if not any(self.mask) or self.mask[0]:
            raise TrainingError(
                "a demonstration needs at least one token to learn, and a token before it: "
                f"mask is {self.mask}"
            )

    def truncate(self, length: int) -> "Demonstration | None":
        """Return the first `length` tokens, or None if none of them is learned."""
        if len(self.tokens) <= length:
            return self
        if not any(self.mask[:length]):
            return None
        return replace(self, tokens=self.tokens[:length], mask=self.mask[:length])


PackedRow = Sequence[Demonstration]
"""One row of a batch: one demonstration, or several packed one after another."""


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """Demonstrations, and how many rows were longer than `max_length`."""

    demonstrations: list[Demonstration]
    places: list[int]
    """The place of each demonstration's row among the rows that were given."""
    truncated: int
    """Rows that were truncated and still have tokens to learn."""
    dropped: int
    """Rows without any token to learn before the limit. They are left out."""

    def select(self, chosen: Sequence[bool]) -> "EncodedRows":
        """Return the demonstrations that are chosen, with the counts of all rows."""
        return replace(
            self,
            demonstrations=[*compress(self.demonstrations, chosen)],
            places=[*compress(self.places, chosen)],
        )


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How data rows become token ids.

    `learn` is "answers" (of a plain text: the whole text) or "everything" (all tokens but the
    first). `system` is the system message of conversations that have none. A control token that a
    row spells, such as <|im_end|>, is plain text, unless `allow_special_tokens` is given.
    `chat_template_kwargs` are arguments of the chat template.
    """

    tokenizer: TokenizerWrapper
    learn: str = "answers"
    system: str | None = None
    max_length: int | None = 2048
    allow_special_tokens: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_arguments(self.tokenizer, self.chat_template_kwargs)
        if self.learn not in ("answers", "everything"):
            raise ConfigError(f"learn is {self.learn!r}; expected 'answers' or 'everything'")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; expected at least 2, or None")

    def encode(self, rows: Iterable[tuple[str, DataRow]]) -> EncodedRows:
        """Return the demonstrations of rows; each row comes with its location for messages."""
        rows = list(rows)
        if not self.allow_special_tokens:
            self._tell_of_control_tokens([row for _, row in rows])
        whole = [self.demonstration(row, location) for location, row in rows]
        limit = self.max_length
        short = whole if limit is None else [one.truncate(limit) for one in whole]
        kept = {place: one for place, one in enumerate(short) if one is not None}
        shortened = sum(a is not b for a, b in zip(whole, short, strict=True))
        dropped = len(whole) - len(kept)
        return EncodedRows(
            demonstrations=[*kept.values()],
            places=[*kept],
            truncated=shortened - dropped,
            dropped=dropped,
        )

    def _tell_of_control_tokens(self, rows: Sequence[DataRow]) -> None:
        control = ControlTokens.of(self.tokenizer)
        found = [name for row in rows if (name := control.spelled_in(row))]
        if found:
            warnings.warn(
                f"{len(found)} of {len(rows)} rows spell control tokens, such as {found[0]!r}, "
                "which are read as plain text. If the rows mean the tokens, allow them "
                "(--allow-special-tokens)",
                stacklevel=3,
            )

    def demonstration(self, row: DataRow, location: str) -> Demonstration:
        """Return the demonstration of one row, without truncation."""
        try:
            tokens, mask = self._encode_row(row)
            if self.learn == "everything":
                mask = [False, *[True] * (len(tokens) - 1)]
            if not any(mask):
                raise DataError("the row has nothing to learn, because its text is empty")
        except (DataError, PromptError) as error:
            raise DataError(f"{location}: {error}") from error
        return Demonstration(tokens=tokens, mask=mask)

    def _encode_row(self, row: DataRow) -> tuple[list[int], list[bool]]:
        if "messages" in row:
            if row.get("tools"):
                raise DataError(
                    "the row has tools, which the model would not see. Describe the tools in a "
                    "system message, as the chat template would"
                )
            return self._encode_conversation(_check_messages(row["messages"]))
        if row.keys() >= {"prompt", "completion"}:
            return self._encode_pair(row["prompt"], _text_of(row, "completion"))
        if row.keys() >= {"instruction", "output"}:
            extra = _text_of(row, "input") if row.get("input") else ""
            request = "\n\n".join(part for part in (_text_of(row, "instruction"), extra) if part)
            return self._encode_pair(request, _text_of(row, "output"))
        if "text" in row:
            tokens = self._end(self._encode_text(_text_of(row, "text")))
            return tokens, [False, *[True] * (len(tokens) - 1)]
        raise DataError(
            f'the row has the columns {list(row)}; expected {{"text"}}, {{"prompt", "completion"}},'
            ' {"messages"} or {"instruction", "input", "output"}, of which "input" is optional. '
            "Name the columns, such as --prompt '{question}' --gold-column answer"
        )

    def _encode_pair(self, prompt: Any, completion: str) -> tuple[list[int], list[bool]]:
        answer = {"role": "assistant", "content": completion}
        if not isinstance(prompt, str):
            return self._encode_conversation([*_check_messages(prompt), answer])
        if self.tokenizer.has_chat_template:
            return self._encode_conversation([{"role": "user", "content": prompt}, answer])
        before = self._encode_text(prompt)
        after = self._end(self._encode_text(completion, add_special_tokens=False))
        return before + after, [False] * len(before) + [True] * len(after)

    def _encode_conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the tokens up to the last answer, and a mask that is True on every answer."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        _check_turns(self.tokenizer, messages)
        if self.allow_special_tokens:
            _refuse_stop_tokens(self.tokenizer, messages)
        allowed = self.allow_special_tokens
        plain = PlainContent(
            self.tokenizer,
            list(messages),
            allow_special_tokens=allowed,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        messages = plain.hide(list(messages))

        def render(part: Sequence[Message], *, add_generation_prompt: bool) -> str:
            return render_chat(
                self.tokenizer,
                part,
                add_generation_prompt=add_generation_prompt,
                chat_template_kwargs=plain.arguments,
            )

        text = render(messages, add_generation_prompt=False)
        answers = _answers(messages)
        starts = [_start_of_answer(render, messages, n, text) for n in answers]
        spans = [*zip(answers, starts, [*starts[1:], None], strict=True)]
        tokens = plain.encode(text[: starts[0]])
        mask = [False] * len(tokens)
        for n, start, end in spans:
            _check_content_kept(messages[n], n, text[start:end])
            answer = plain.encode(text[start:end])
            learned = self._answer_length(answer, last=end is None)
            if end is None:
                answer = self._end(answer[:learned])
                learned = len(answer)
            tokens += answer
            mask += [True] * learned + [False] * (len(answer) - learned)
        return tokens, mask

    def _encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return encode_text(
            self.tokenizer,
            text,
            add_special_tokens=add_special_tokens,
            allow_special_tokens=self.allow_special_tokens,
        )

    def _answer_length(self, tokens: Sequence[int], *, last: bool) -> int:
        """Return the number of tokens up to the stop token of an answer, stop token included."""
        stops = self.tokenizer.eos_token_ids
        found = next((n for n, token in enumerate(tokens, start=1) if token in stops), None)
        if found is None and not last:
            raise DataError(
                "the chat template writes no stop token after an answer, so the end of an answer "
                "with more messages after it is unknown. Make a row of each answer"
            )
        return found or len(tokens)

    def _end(self, tokens: list[int]) -> list[int]:
        """Return the tokens with a stop token at the end."""
        if tokens and tokens[-1] in self.tokenizer.eos_token_ids:
            return tokens
        return [*tokens, self.tokenizer.eos_token_id]


def _text_of(row: DataRow, column: str) -> str:
    if not isinstance(value := row[column], str):
        raise DataError(f"the {column} is {value!r:.60}; expected text")
    return value


def _check_messages(value: Any) -> list[Message]:
    """Return the messages with role and content only. Raise if `value` is anything else."""
    valid = isinstance(value, Sequence) and all(
        isinstance(m, Mapping)
        and isinstance(m.get("role"), str)
        and isinstance(m.get("content"), str)
        for m in value
    )
    if not value or isinstance(value, str) or not valid:
        raise DataError(
            f"the messages are {value!r:.60}; expected a list of messages with a role and a "
            'content of text, such as [{"role": "user", "content": "2+2="}, '
            '{"role": "assistant", "content": "4"}]'
        )
    for number, message in enumerate(value, start=1):
        if lost := [key for key in _UNSUPPORTED_KEYS if message.get(key)]:
            raise DataError(
                f"message {number} has {lost[0]!r} beside its content, and only the content is "
                "learned. Write all that the model should say into the content"
            )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _start_of_answer(
    render: Callable[..., str], messages: Sequence[Message], n: int, text: str
) -> int:
    """Return where in the text of the whole conversation the answer in message `n` starts."""
    before = render(messages[:n], add_generation_prompt=True)
    if not text.startswith(before):
        raise DataError(
            f"the chat template writes the conversation before message {n + 1} differently "
            "when more messages follow, so the prompt of this answer is unknown. Make a row of "
            "each answer. If the prompt opens a thought that the answers do not have, switch "
            "thinking off (--thinking off)"
        )
    return len(before)


def _answers(messages: Sequence[Message]) -> list[int]:
    return [n for n, message in enumerate(messages) if message["role"] == "assistant"]


def _check_turns(tokenizer: TokenizerWrapper, messages: Sequence[Message]) -> None:
    if not tokenizer.has_chat_template:
        raise DataError(
            "the tokenizer has no chat template for messages; expected prompts and completions "
            "that are plain text, or texts"
        )
    if not (answers := _answers(messages)) or answers[0] == 0:
        roles = [message["role"] for message in messages]
        raise DataError(f"the roles are {roles}; expected an assistant's answer to a message")


def _refuse_stop_tokens(tokenizer: TokenizerWrapper, messages: Sequence[Message]) -> None:
    stops = tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
    for message in messages:
        if found := [stop for stop in stops if stop in message["content"]]:
            raise DataError(
                f"a message contains the stop token {found[0]!r}, which would end the message "
                "there. Remove the stop token: the chat template writes it"
            )


def _check_content_kept(message: Message, n: int, written: str) -> None:
    """Raise if the template left out a part of a message, as some do with thoughts and answers."""
    # Templates may add and remove white space, for example around thoughts.
    if "".join(message["content"].split()) not in "".join(written.split()):
        raise DataError(
            f"the chat template leaves out a part of message {n + 1}, {message['content']!r:.60}. "
            "If the reason is that more messages follow, make a row of each answer"
        )
