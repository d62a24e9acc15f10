"""`Exchange`: one answer with its prompt, token by token, as a training run needs it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textpolicy.types import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """One finished answer.

    `owner` is what the server's caller said about the key of the request. `messages` and `tools`
    are those of a chat request, and empty for prompts in text or token ids. `tokens` are the ids
    that were sampled, with the stop token, and `logprobs` are their log-probabilities under the
    distribution that they were sampled from. `finish_reason` is "stop", "length", "tool_calls", or
    "cancelled" if the client went away. `index` counts the answers of one request, `request_id`.
    """

    owner: Any
    request_id: str
    index: int
    model: str
    version: int
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    prompt_tokens: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str
    sampling: Sampling
    seed: int


OnExchange = Callable[[Exchange], None]
"""Called in the server's thread before the client gets the end of the answer. It must be quick."""
