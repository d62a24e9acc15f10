"""The bodies of answers, whole and in chunks: OpenAI's two forms, and vLLM's generate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.serving.answer_text import AnswerPart, new_call_id
from textpolicy.serving.generation_request import Generation
from textpolicy.serving.requests import Asked
from textpolicy.types import StopReason

_FINISH = {
    StopReason.STOP_TOKEN: "stop",
    StopReason.STOP_STRING: "stop",
    StopReason.LENGTH: "length",
    StopReason.CANCELLED: "cancelled",
}


@dataclass(slots=True)
class Choice:
    """One answer as far as it has come."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def add(self, parts: Sequence[AnswerPart]) -> list[dict[str, Any]]:
        """Add parts, and return the `delta` objects that show them in a stream."""
        return [self._add(part) for part in parts]

    def _add(self, part: AnswerPart) -> dict[str, Any]:
        if part.kind == "reasoning":
            self.reasoning += part.text
            return {"reasoning_content": part.text}
        if part.kind == "content":
            self.content += part.text
            return {"content": part.text}
        function = {"name": part.name, "arguments": part.text}
        call = {"id": new_call_id(), "type": "function", "function": function}
        self.calls.append(call)
        return {"tool_calls": [{"index": len(self.calls) - 1, **call}]}

    def message(self) -> dict[str, Any]:
        """Return the answer as a message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message |= {"content": self.content or None, "tool_calls": self.calls}
        return message


def finish_reason(row: DecodingRow, choice: Choice | None = None) -> str | None:
    """Return why a row has ended in OpenAI's words, or None if it has not."""
    if row.stop_reason is None:
        return None
    reason = _FINISH[row.stop_reason]
    return "tool_calls" if reason == "stop" and choice and choice.calls else reason


def usage_of(generation: Generation) -> dict[str, int]:
    """Return how many tokens a request has cost; the prompt of several answers counts once."""
    prompt = sum(map(len, generation.request.prompts))
    sampled = sum(generation.lengths)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }


def fingerprint_of(generation: Generation) -> str:
    """Return the name and the version of the weights that a request is answered with."""
    assert generation.weights is not None
    return f"{generation.weights.name}@{generation.weights.version}"


class TokenWriter:
    """Writes log-probabilities of tokens in the forms of OpenAI's two endpoints.

    They are the model's own, before temperature and truncation. With `as_ids`, tokens are shown
    as vLLM's "token_id:7".
    """

    def __init__(self, tokenizer: TokenizerWrapper, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def chat(self, row: DecodingRow, start: int, end: int) -> dict[str, Any]:
        """Return the `logprobs` object of some tokens of a chat answer."""
        entries: list[dict[str, Any]] = []
        for token, details in zip(row.tokens[start:end], row.details[start:end], strict=True):
            top = [self._entry(number, logprob) for number, logprob in details.top]
            entries.append(self._entry(token, details.logprob) | {"top_logprobs": top})
        return {"content": entries, "refusal": None}

    def completion(self, row: DecodingRow, start: int, end: int, offset: int) -> dict[str, Any]:
        """Return the `logprobs` object of some tokens, whose text begins at `offset`."""
        tokens = [self._text(token) for token in row.tokens[start:end]]
        details = row.details[start:end]
        offsets: list[int] = []
        for text in tokens:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in details],
            "top_logprobs": [
                {self._text(number): logprob for number, logprob in one.top} for one in details
            ],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        if self._as_ids:
            return f"token_id:{token}"
        return self._tokenizer.decode([token], skip_special_tokens=False)


class _Form:
    """What the forms of answers share: the head of each body, and the last chunk of a stream."""

    whole_object: ClassVar[str]
    """The value of "object" in a whole answer."""
    chunk_object: ClassVar[str]
    """The value of "object" in a chunk of a stream."""

    def __init__(
        self, tokenizer: TokenizerWrapper, asked: Asked, request_id: str, created: int
    ) -> None:
        self._asked = asked
        self._names = {"id": request_id, "created": created, "model": asked.model}
        self._tokens = TokenWriter(tokenizer, as_ids=asked.tokens_as_ids)

    def usage(self, generation: Generation) -> dict[str, Any]:
        """Return the last chunk, with the number of tokens."""
        return self._chunk(generation, []) | {"usage": usage_of(generation)}

    def _chunk(self, generation: Generation, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._body(generation, choices, self.chunk_object)

    def _whole(self, generation: Generation, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": usage_of(generation)}
        return self._body(generation, choices, self.whole_object) | usage

    def _body(
        self, generation: Generation, choices: list[dict[str, Any]], name: str
    ) -> dict[str, Any]:
        names = {"object": name, "system_fingerprint": fingerprint_of(generation)}
        return self._names | names | {"choices": choices}


class ChatForm(_Form):
    """The form of answers to one chat request."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def whole(self, generation: Generation, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the body of a whole answer."""
        shown = [
            self._span(row, index, (0, len(row.tokens)))
            | {"message": choice.message(), "finish_reason": finish_reason(row, choice)}
            for index, (row, choice) in enumerate(zip(generation.rows, choices, strict=True))
        ]
        body = self._whole(generation, shown)
        if self._asked.return_token_ids:
            body["prompt_token_ids"] = generation.rows[0].context
        return body

    def begin(self, generation: Generation, index: int) -> dict[str, Any]:
        """Return the first chunk of an answer, which names the role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = self._chunk(generation, [choice])
        if self._asked.return_token_ids:
            chunk["prompt_token_ids"] = generation.rows[0].context
        return chunk

    def chunks(
        self,
        generation: Generation,
        index: int,
        parts: Sequence[AnswerPart],
        span: tuple[int, int],
        choice: Choice,
    ) -> list[dict[str, Any]]:
        """Return the chunks that show new parts and new tokens of an answer."""
        row, reason = generation.rows[index], None
        deltas = choice.add(parts)
        if span[1] == len(row.tokens):
            reason = finish_reason(row, choice)
        shows_tokens = self._asked.logprobs is not None or self._asked.return_token_ids
        if not deltas and (reason or shows_tokens):
            deltas = [{}]
        spans = [span, *[(span[1], span[1])] * (len(deltas) - 1)]
        shown = [
            self._span(row, index, tokens) | {"delta": delta, "finish_reason": None}
            for delta, tokens in zip(deltas, spans, strict=False)
        ]
        if shown:
            shown[-1]["finish_reason"] = reason
        return [self._chunk(generation, [one]) for one in shown]

    def _span(self, row: DecodingRow, index: int, span: tuple[int, int]) -> dict[str, Any]:
        shown: dict[str, Any] = {"index": index, "logprobs": None}
        if self._asked.logprobs is not None and span[0] < span[1]:
            shown["logprobs"] = self._tokens.chat(row, *span)
        if self._asked.return_token_ids:
            shown["token_ids"] = row.tokens[slice(*span)]
        return shown


class CompletionForm(_Form):
    """The form of answers to one completion request."""

    whole_object = chunk_object = "text_completion"

    def __init__(
        self, tokenizer: TokenizerWrapper, asked: Asked, request_id: str, created: int
    ) -> None:
        super().__init__(tokenizer, asked, request_id, created)
        self._offsets: dict[int, int] = {}

    def whole(self, generation: Generation, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the body of a whole answer."""
        shown = [
            self._choice(row, index, choice.content, (0, len(row.tokens)))
            | {"finish_reason": finish_reason(row)}
            for index, (row, choice) in enumerate(zip(generation.rows, choices, strict=True))
        ]
        return self._whole(generation, shown)

    def begin(self, generation: Generation, index: int) -> None:
        """Return no first chunk: this form has none."""

    def chunks(
        self,
        generation: Generation,
        index: int,
        parts: Sequence[AnswerPart],
        span: tuple[int, int],
        choice: Choice,
    ) -> list[dict[str, Any]]:
        """Return the chunk that shows new text and new tokens of an answer."""
        choice.add(parts)
        row, text = generation.rows[index], "".join(part.text for part in parts)
        reason = finish_reason(row) if span[1] == len(row.tokens) else None
        shows_tokens = self._asked.logprobs is not None or self._asked.return_token_ids
        if not (text or reason or shows_tokens):
            return []
        shown = self._choice(row, index, text, span) | {"finish_reason": reason}
        return [self._chunk(generation, [shown])]

    def _choice(
        self, row: DecodingRow, index: int, text: str, span: tuple[int, int]
    ) -> dict[str, Any]:
        shown: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        if self._asked.logprobs is not None:
            offset = self._offsets.get(index, 0)
            shown["logprobs"] = self._tokens.completion(row, *span, offset)
            self._offsets[index] = offset + sum(map(len, shown["logprobs"]["tokens"]))
        if self._asked.return_token_ids:
            shown["token_ids"] = row.tokens[slice(*span)]
            shown["prompt_token_ids"] = row.context if span[0] == 0 else None
        return shown


def generate_body(request_id: str, generation: Generation) -> dict[str, Any]:
    """Return vLLM's body: token ids with log-probabilities under the sampling distribution."""
    assert generation.weights is not None
    version = generation.weights.version
    choices = [
        {
            "index": index,
            "token_ids": row.tokens,
            "finish_reason": finish_reason(row),
            "logprobs": {
                "content": [
                    {"token": f"token_id:{token}", "logprob": logprob, "bytes": None}
                    | {"top_logprobs": _likeliest(row, number)}
                    for number, (token, logprob) in enumerate(
                        zip(row.tokens, row.logprobs, strict=True)
                    )
                ]
            },
            "weight_versions": [{"version": str(version), "start": 0, "end": len(row.tokens)}],
        }
        for index, row in enumerate(generation.rows)
    ]
    names = {"model": generation.request.model, "usage": usage_of(generation)}
    return {"request_id": request_id, "choices": choices, **names, "prompt_logprobs": None}


def _likeliest(row: DecodingRow, number: int) -> list[Mapping[str, Any]]:
    if row.top_logprobs is None:
        return []
    return [
        {"token": f"token_id:{token}", "logprob": logprob}
        for token, logprob in row.details[number].top
    ]
