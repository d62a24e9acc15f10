"""The endpoints that sample: what they read, wait for and answer."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from textpolicy.serving.answer_text import AnswerReader, AnswerText
from textpolicy.serving.answers import (
    ChatForm,
    Choice,
    CompletionForm,
    finish_reason,
    generate_body,
)
from textpolicy.serving.encoding import PromptEncoder
from textpolicy.serving.engine_job import EngineJob
from textpolicy.serving.engine_queue import ServedEngine
from textpolicy.serving.exchange import Exchange, OnExchange, OnRefusal, PrepareRequest
from textpolicy.serving.faults import attempt_step
from textpolicy.serving.generation_request import Generation, GenerationRequest
from textpolicy.serving.mailbox import LoopMailbox
from textpolicy.serving.refusal import RefusalError
from textpolicy.serving.requests import (
    Asked,
    ChatRequest,
    CompletionRequest,
    read_chat_request,
    read_completion_request,
    read_generate_request,
)
from textpolicy.serving.security import MAX_BODY_BYTES, MAX_DISCARDED_BYTES, too_long_body
from textpolicy.untrusted.parsing import parse_json

_Asked = TypeVar("_Asked", ChatRequest, CompletionRequest)
_log = logging.getLogger("textpolicy.serving")
_BODY_SECONDS = 30.0
VERSION_HEADER = "x-textpolicy-version"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """One request with all that its answer is made of."""

    request: Request
    request_id: str
    created: int
    asked: Asked
    job: EngineJob
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    texts: list[AnswerText]
    choices: list[Choice]


class SamplingEndpoints:
    """Answers the requests that sample. Its methods run on the event loop.

    Bodies are parsed and tokenized by one thread of their own, so that a long prompt delays no
    stream.
    """

    def __init__(
        self,
        served: ServedEngine,
        encoder: PromptEncoder,
        on_exchange: OnExchange | None,
        prepare: PrepareRequest | None = None,
        on_refusal: OnRefusal | None = None,
    ) -> None:
        self._served = served
        self._encoder = encoder
        self._reader = AnswerReader(served.tokenizer)
        self._on_exchange = on_exchange
        self._prepare = prepare
        self._on_refusal = on_refusal
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="textpolicy-prompts")
        self._mailbox: LoopMailbox | None = None

    async def chat(self, request: Request) -> Response:
        """Answer /v1/chat/completions."""

        def read(body: bytes) -> tuple[ChatRequest, GenerationRequest]:
            asked = read_chat_request(read_body(body))
            return asked, self._encoder.encode_chat(asked)

        chat, wanted = await self._read(request, read)
        stop, prompt = wanted.sampling.stop, wanted.prompts[0]
        texts = [self._reader.chat(prompt, stop, chat.tools) for _ in range(wanted.n)]
        task = self._start(
            request, "chatcmpl", chat.asked, wanted, texts, messages=chat.messages, tools=chat.tools
        )
        form = ChatForm(self._served.tokenizer, task.asked, task.request_id, task.created)
        return await self._answer(task, form)

    async def completions(self, request: Request) -> Response:
        """Answer /v1/completions."""

        def read(body: bytes) -> tuple[CompletionRequest, GenerationRequest]:
            asked = read_completion_request(read_body(body))
            return asked, self._encoder.encode_completion(asked)

        asked, wanted = await self._read(request, read)
        number = len(wanted.prompts) * wanted.n
        texts = [self._reader.completion(wanted.sampling.stop) for _ in range(number)]
        task = self._start(request, "cmpl", asked.asked, wanted, texts)
        form = CompletionForm(self._served.tokenizer, task.asked, task.request_id, task.created)
        return await self._answer(task, form)

    async def generate(self, request: Request) -> Response:
        """Answer vLLM's /inference/v1/generate: token ids in, token ids out."""

        def read(body: bytes) -> tuple[CompletionRequest, GenerationRequest]:
            asked = read_generate_request(read_body(body))
            return asked, self._encoder.encode_completion(asked)

        asked, wanted = await self._read(request, read)
        if asked.asked.stream:
            raise RefusalError(
                "stream is true; this endpoint answers as a whole. Leave the parameter out",
                param="stream",
                code="unsupported_parameter",
            )
        texts = [self._reader.completion(wanted.sampling.stop) for _ in range(wanted.n)]
        task = self._start(request, "generate", asked.asked, wanted, texts)
        generation = await self._finished(task)
        return self._json(generate_body(task.request_id, generation), generation)

    async def _read(
        self, request: Request, read: Callable[[bytes], tuple[_Asked, GenerationRequest]]
    ) -> tuple[_Asked, GenerationRequest]:
        body, owner = await receive_body(request), request.state.owner
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoding, self._prepared, owner, body, read)

    def _prepared(
        self,
        owner: Any,
        body: bytes,
        read: Callable[[bytes], tuple[_Asked, GenerationRequest]],
    ) -> tuple[_Asked, GenerationRequest]:
        """Return a request as the caller's function has changed it."""
        try:
            asked, wanted = read(body)
            if self._prepare is not None:
                chat = asked if isinstance(asked, ChatRequest) else None
                messages, tools = (chat.messages, chat.tools) if chat else ((), ())
                wanted = self._prepare(owner, messages, tools, wanted)
        except RefusalError as refusal:
            if self._on_refusal is not None:
                self._on_refusal(owner, refusal)
            raise
        return asked, wanted

    def _start(
        self,
        request: Request,
        kind: str,
        asked: Asked,
        wanted: GenerationRequest,
        texts: list[AnswerText],
        **conversation: Any,
    ) -> _Task:
        if self._mailbox is None:
            self._mailbox = LoopMailbox(asyncio.get_running_loop())
        return _Task(
            request=request,
            request_id=f"{kind}-{uuid.uuid4().hex}",
            created=int(time.time()),
            asked=asked,
            job=EngineJob(self._served, self._mailbox, wanted, stream=asked.stream),
            texts=texts,
            choices=[Choice() for _ in texts],
            **conversation,
        )

    async def _answer(self, task: _Task, form: "ChatForm | CompletionForm") -> Response:
        if not task.asked.stream:
            generation = await self._finished(task)
            return self._json(form.whole(generation, task.choices), generation)
        # The first token is waited for, so that an early refusal has its own status.
        generation = await task.job.wait(task.request.receive)
        return StreamingResponse(
            self._events(task, form),
            media_type="text/event-stream",
            headers=_headers(generation) | {"cache-control": "no-cache"},
        )

    async def _finished(self, task: _Task) -> Generation:
        generation = await task.job.wait(task.request.receive)
        for index, row in enumerate(generation.rows):
            task.choices[index].add(task.texts[index].take(row.tokens, ended=True))
        self._report(task)
        return generation

    async def _events(self, task: _Task, form: "ChatForm | CompletionForm") -> AsyncIterator[str]:
        """Yield the events of a stream."""
        sent = [0] * len(task.choices)
        try:
            for index in range(len(sent)):
                if first := form.begin(task.job.generation, index):
                    yield _event(first)
            async for generation in task.job.changes(task.request.receive):
                for index, row in enumerate(generation.rows):
                    start, end = sent[index], generation.lengths[index]
                    if end == start:
                        continue
                    sent[index] = end
                    ended = row.stop_reason is not None and end == len(row.tokens)
                    parts = task.texts[index].take(row.tokens[:end], ended=ended)
                    choice = task.choices[index]
                    for chunk in form.chunks(generation, index, parts, (start, end), choice):
                        yield _event(chunk)
            self._report(task)
            if task.asked.include_usage:
                yield _event(form.usage(task.job.generation))
            yield "data: [DONE]\n\n"
        except RefusalError as refusal:
            yield _event(refusal.body())
        finally:
            task.job.cancel()

    def _report(self, task: _Task) -> None:
        """Tell the caller's function of every answer of a finished request."""
        if self._on_exchange is None:
            return
        generation = task.job.generation
        assert generation.weights is not None
        for index, row in enumerate(generation.rows):
            choice = task.choices[index]
            exchange = Exchange(
                owner=task.request.state.owner,
                request_id=task.request_id,
                index=index,
                model=generation.weights.name,
                version=min(row.versions, default=generation.weights.version),
                versions=row.mixed_versions,
                messages=task.messages,
                tools=task.tools,
                prompt_tokens=row.context,
                tokens=row.tokens,
                logprobs=row.logprobs,
                text=choice.content,
                message=choice.message(),
                finish_reason=finish_reason(row, choice) or "cancelled",
                sampling=row.sampling,
                seed=generation.request.seed,
            )
            _, failure = attempt_step(partial(self._on_exchange, exchange))
            if failure:
                _log.error("on_exchange failed: %s", failure)

    def _json(self, body: Mapping[str, Any], generation: Generation) -> Response:
        return JSONResponse(body, headers=_headers(generation))


def read_body(body: bytes) -> Any:
    """Return the JSON of a body; raise `RefusalError` if it is no JSON."""
    try:
        return parse_json(body.decode())
    except ValueError as error:
        raise RefusalError(
            f"the body is not JSON: {str(error)[:200]}. Send a JSON object in UTF-8",
            code="invalid_json",
        ) from error


async def receive_body(request: Request) -> bytes:
    """Return the body of a request; raise if it is too long, too slow, or not said to be JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page in a browser may send anything else to this machine without asking first.
        raise RefusalError(
            f"the Content-Type is {kind!r:.60}; expected application/json",
            status=415,
            code="wrong_content_type",
        )
    parts: list[bytes] = []
    length = 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                length += len(part)
                if length <= MAX_BODY_BYTES:
                    parts.append(part)
                elif length > MAX_DISCARDED_BYTES:
                    break
    except TimeoutError as error:
        raise RefusalError(
            f"the body did not come within {_BODY_SECONDS:g} s", status=408, code="slow_body"
        ) from error
    if length > MAX_BODY_BYTES:
        raise too_long_body()
    return b"".join(parts)


def _headers(generation: Generation) -> dict[str, str]:
    assert generation.weights is not None
    return {VERSION_HEADER: str(generation.weights.version)}


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
