"""`Exchange`: one answer with its prompt, token by token, as a training run needs it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textpolicy.serving.generation_request import GenerationRequest
from textpolicy.serving.refusal import RefusalError
from textpolicy.types import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """One finished answer.

    `owner` is what the server's caller said about the key of the request. `messages` and `tools`
    are those of a chat request, and empty for prompts in text or token ids. `tokens` are the ids
    that were sampled, with the stop token, and `logprobs` are their log-probabilities under the
    distribution that they were sampled from. `versions` are the adapter versions of the tokens if
    there are several, and `version` is the oldest. `message` is the answer as a message with its
    calls. `finish_reason` is "stop", "length", "tool_calls", or "cancelled" if the client went
    away. `index` counts the answers of one request, `request_id`.
    """

    owner: Any
    request_id: str
    index: int
    model: str
    version: int
    versions: list[int]
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    prompt_tokens: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str
    message: Mapping[str, Any]
    finish_reason: str
    sampling: Sampling
    seed: int


PrepareRequest = Callable[
    [Any, Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]], GenerationRequest],
    GenerationRequest,
]
"""Called in the thread of the prompts with the owner, the messages and the tools of a request, and
what would be sampled. Returns what is sampled instead, or raises `RefusalError`."""
OnRefusal = Callable[[Any, RefusalError], None]
"""Called in the thread of the prompts with the owner of a request that is refused, and why."""
OnExchange = Callable[[Exchange], None]
"""Called in the server's thread before the client gets the end of the answer. It must be quick."""
