"""`Endpoint`: a server that answers a judge's questions over HTTP, with retries."""

import json
import os
import secrets
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from typing import Any

from textpolicy.activity import Activity, doing
from textpolicy.errors import ConfigError
from textpolicy.untrusted.parsing import parse_json

_MAX_ANSWER_BYTES = 1 << 22
_RETRIED_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}
_MAX_WAIT_SECONDS = 30.0
_TOO_SLOW = "If the judge is slow, raise timeout of its Endpoint and lower concurrency"
# Without a handler for redirections: the key would be sent to wherever a redirection leads.
_HANDLERS = (
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
)


@dataclass(frozen=True, slots=True)
class JudgeReply:
    """The answer to one question and its cost; `error` says why if there is no answer."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server with OpenAI's /chat/completions below `url`, such as "http://127.0.0.1:8080/v1".

    Each question reads the key from the environment variable `key_from`; the key is stored nowhere.
    No connection, no answer within `timeout` seconds, status 429 or 5xx, and an answer that is not
    a chat completion are retried up to `retries` times, after `wait` seconds that double each time.
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
            raise ConfigError(f"the judge's url is {self.url!r}; expected http(s)://...")

    @property
    def name(self) -> str:
        return f"{self.url} {self.model} {self.temperature} {self.max_tokens}"

    def __call__(self, questions: Sequence[str]) -> list[JudgeReply]:
        """Return the replies to the questions, in order."""
        asking = f"asking the judge at {self.url}"
        with (
            doing(asking, len(questions)) as activity,
            ThreadPoolExecutor(self.concurrency) as threads,
        ):
            replies: list[JudgeReply] = []
            for reply in threads.map(partial(self._ask, activity), questions):
                replies.append(reply)
                activity.advance()
            return replies

    def _ask(self, activity: Activity, question: str) -> JudgeReply:
        attempt = 0
        while True:
            try:
                return self._ask_once(question, attempt)
            except _TemporaryError as error:
                if attempt == self.retries:
                    tried = f"{attempt + 1} times" if attempt else "once"
                    return JudgeReply(retries=attempt, error=f"{error} (tried {tried})")
                if error.is_timeout:
                    activity.text = (
                        f"asking the judge at {self.url} again, which has not answered within "
                        f"{self.timeout:g} s"
                    )
                    warnings.warn(
                        f"the judge at {self.url} has not answered within {self.timeout:g} s, and "
                        f"is asked again from the beginning. {_TOO_SLOW}",
                        stacklevel=2,
                    )
                # A random wait, so that questions that failed together are not retried together.
                pause = self.wait * 2**attempt * (0.5 + secrets.randbelow(1000) / 1000)
                time.sleep(min(_MAX_WAIT_SECONDS, max(pause, error.wait)))
            attempt += 1

    def _ask_once(self, question: str, attempt: int) -> JudgeReply:
        deadline = time.monotonic() + self.timeout
        opener = urllib.request.OpenerDirector()
        for handler in _HANDLERS:
            opener.add_handler(handler())
        try:
            with opener.open(self._request(question), timeout=self.timeout) as response:
                return _parse_reply(_read_body(response, deadline), attempt)
        except urllib.error.HTTPError as error:
            raise _status_error(error, self.url) from error
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                late = f"{self.url} did not answer within {self.timeout:g} s. {_TOO_SLOW}"
                raise _TemporaryError(late, is_timeout=True) from error
            raise _TemporaryError(f"{self.url} did not answer: {error}") from error

    def _request(self, question: str) -> urllib.request.Request:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_from):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        return urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)


class _TemporaryError(Exception):
    """A failure after which a retry may succeed, in `wait` seconds if the server asked for them."""

    def __init__(self, message: str, wait: float = 0.0, *, is_timeout: bool = False) -> None:
        super().__init__(message)
        self.wait = wait
        self.is_timeout = is_timeout


def _status_error(error: urllib.error.HTTPError, url: str) -> Exception:
    with error:
        body = error.read(500).decode(errors="replace").strip()
    message = f"{url} answered with status {error.code}: {body}"
    if error.code not in _RETRIED_STATUSES:
        return ConfigError(f"{message}; check the url, the model's name and the key")
    wait = error.headers.get("Retry-After", "")
    return _TemporaryError(message, float(wait) if wait.isdecimal() else 0.0)


def _read_body(response: Any, deadline: float) -> bytes:
    """Return the body; raise if the body is too long or arrives too late.

    The socket's timeout does not bound the time, because it starts again with each read.
    """
    body = b""
    while chunk := response.read1(1 << 16):
        body += chunk
        if len(body) > _MAX_ANSWER_BYTES:
            raise _TemporaryError(f"the answer is longer than {_MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer took too long")
    return body


def _parse_reply(body: bytes, attempt: int) -> JudgeReply:
    try:
        answer: Any = parse_json(body)
        text: Any = answer["choices"][0]["message"]["content"]
        usage: Any = answer.get("usage") or {}
        if not isinstance(text, str):
            raise TypeError(f"content is {text!r}")
        prompt_tokens = int(usage.get("prompt_tokens", 0))
        return JudgeReply(text, prompt_tokens, int(usage.get("completion_tokens", 0)), attempt)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        shown = body[:80].decode(errors="replace")
        raise _TemporaryError(f"the answer is no chat completion ({error}): {shown!r}") from error
