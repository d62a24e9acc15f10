"""A server that answers questions over HTTP, and every way in which it may not."""

import json
import os
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    ProxyHandler,
)

from textpolicy.errors import ConfigError

ANSWER_BYTES = 1 << 22
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
_LONGEST_WAIT = 30.0


@dataclass(frozen=True, slots=True)
class JudgeReply:
    """What a judge said to one question and what that took; `error` instead if it said nothing."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server with OpenAI's /chat/completions below `url`, such as "http://127.0.0.1:8080/v1".

    The key is read from the environment variable `key_from` when a question is asked, and is kept
    nowhere. What fails for reasons that may pass (no connection, no answer within `timeout`
    seconds, status 429 or 5xx, an answer that is none) is tried `retries` times more, after a wait
    that doubles from `wait` seconds.
    """

    url: str
    model: str
    key_from: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 4
    wait: float = 0.5
    concurrency: int = 8
    max_tokens: int = 512
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"the judge's url is {self.url!r}; expected http://... or https://..."
            )

    @property
    def name(self) -> str:
        return f"{self.url} {self.model} {self.temperature} {self.max_tokens}"

    def __call__(self, questions: Sequence[str]) -> list[JudgeReply]:
        with ThreadPoolExecutor(self.concurrency) as threads:
            return list(threads.map(self._ask, questions))

    def _ask(self, question: str) -> JudgeReply:
        for attempt in range(self.retries + 1):
            try:
                return self._ask_once(question, attempt)
            except _Passing as error:
                if attempt == self.retries:
                    tried = f"{attempt + 1} times" if attempt else "once"
                    return JudgeReply(retries=attempt, error=f"{error} (tried {tried})")
                # Uneven, so that questions that failed together do not come back together.
                pause = self.wait * 2**attempt * (0.5 + secrets.randbelow(1000) / 1000)
                time.sleep(min(_LONGEST_WAIT, max(pause, error.wait)))
        raise AssertionError("the last attempt returns")

    def _ask_once(self, question: str, attempt: int) -> JudgeReply:
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            data=json.dumps(self._body(question)).encode(),
            headers=self._headers(),
        )
        deadline = time.monotonic() + self.timeout
        try:
            with _opener().open(request, timeout=self.timeout) as response:
                return _read_reply(_read_until(response, deadline), attempt)
        except urllib.error.HTTPError as error:
            raise _status_error(error, self.url) from error
        except (OSError, HTTPException) as error:
            raise _Passing(f"{self.url} did not answer: {error}") from error

    def _body(self, question: str) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_from)
        authorization = {"Authorization": f"Bearer {key}"} if key else {}
        return {"Content-Type": "application/json", **authorization}


def _opener() -> urllib.request.OpenerDirector:
    """Follows no redirections: the key would go along to wherever they lead."""
    opener = urllib.request.OpenerDirector()
    for handler in (ProxyHandler, HTTPHandler, HTTPSHandler, HTTPDefaultErrorHandler):
        opener.add_handler(handler())
    opener.add_handler(HTTPErrorProcessor())
    return opener


class _Passing(Exception):
    """A failure that may pass; `wait` is how many seconds the server asked for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


def _status_error(error: urllib.error.HTTPError, url: str) -> Exception:
    with error:
        said = error.read(500).decode(errors="replace").strip()
    message = f"{url} answered with status {error.code}: {said}"
    if error.code not in _RETRIED:
        return ConfigError(f"{message}; check the url, the model's name and the key")
    wait = error.headers.get("Retry-After", "")
    return _Passing(message, float(wait) if wait.isdecimal() else 0.0)


def _read_until(response: Any, deadline: float) -> bytes:
    """The body, unless it takes longer: the socket's timeout alone starts anew with each byte."""
    body = b""
    while chunk := response.read1(1 << 16):
        body += chunk
        if len(body) > ANSWER_BYTES:
            raise _Passing(f"the answer is longer than {ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer went on too long")
    return body


def _read_reply(body: bytes, attempt: int) -> JudgeReply:
    try:
        answer: Any = json.loads(body)
        text: Any = answer["choices"][0]["message"]["content"]
        usage: Any = answer.get("usage") or {}
        if not isinstance(text, str):
            raise TypeError(f"content is {text!r}")
        return JudgeReply(
            text,
            int(usage.get("prompt_tokens", 0)),
            int(usage.get("completion_tokens", 0)),
            retries=attempt,
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        shown = body[:80].decode(errors="replace")
        raise _Passing(f"the answer is no chat completion ({error}): {shown!r}") from error
