"""Requests as token ids: the chat template is applied, and every limit is checked."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.chat_template import argument_names
from textpolicy.control_tokens import encode_text
from textpolicy.errors import PromptError
from textpolicy.generation.prompts import check_prompt, context_length, encode_prompt, encode_reply
from textpolicy.generation.unread_characters import UnreadCharacters
from textpolicy.serving.generation_request import GenerationRequest
from textpolicy.serving.refusal import RefusalError
from textpolicy.serving.requests import Asked, ChatRequest, CompletionRequest, RawPrompt
from textpolicy.types import Message, Prompt
from textpolicy.untrusted.template_check import SWITCHES

DEFAULT_MAX_TOKENS = 1024
"""The limit of an answer whose request names none, if the context has room for it."""
_UNLIMITED_CONTEXT = 1 << 20


class PromptEncoder:
    """Makes token ids of requests, in one thread of its own: its tokenizer is a copy.

    `chat_template_kwargs` are the arguments of the chat template that requests may change. `note`
    is told once if the model cannot read some characters.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        *,
        max_model_len: int | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        most_tokens: int | None = None,
        allow_special_tokens: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        own = context_length(model) or _UNLIMITED_CONTEXT
        self.max_model_len = min(own, max_model_len or own)
        self._model = model
        # Two threads must not use one tokenizer: encoding may change its settings.
        self._tokenizer = deepcopy(tokenizer)
        self._max_tokens = max_tokens
        self._most_tokens = most_tokens or self.max_model_len
        self._allow_special_tokens = allow_special_tokens
        self._arguments = dict(chat_template_kwargs or {})
        self._note = note
        self._unread = UnreadCharacters(self._tokenizer)

    def encode_chat(self, request: ChatRequest) -> GenerationRequest:
        """Return a chat request for the engine."""
        given = dict(request.chat_template_kwargs)
        self._check_arguments(given, request.tools)
        tools = {"tools": list(request.tools)} if request.tools else {}
        try:
            tokens = encode_prompt(
                self._tokenizer,
                request.messages,
                allow_special_tokens=self._allow_special_tokens,
                chat_template_kwargs=self._arguments | given | tools,
            )
        except PromptError as error:
            raise RefusalError(str(error), param="messages") from error
        self._tell_unread([request.messages])
        return self._for_engine(request.asked, [tokens], "messages")

    def encode_completion(self, request: CompletionRequest) -> GenerationRequest:
        """Return a completion request for the engine."""
        try:
            prompts = [self._tokens_of(prompt) for prompt in request.prompts]
        except PromptError as error:
            raise RefusalError(str(error), param="prompt") from error
        self._tell_unread([prompt for prompt in request.prompts if isinstance(prompt, str)])
        return self._for_engine(request.asked, prompts, "prompt")

    def encode_reply(self, replies: Sequence[Message], last_token: int) -> list[int] | None:
        """Return the tokens from an answer's last token to the next answer, or None.

        None means that the chat template cannot write such replies after an answer.
        """
        try:
            return encode_reply(
                self._tokenizer,
                replies,
                last_token,
                allow_special_tokens=self._allow_special_tokens,
                chat_template_kwargs=self._arguments,
            )
        except PromptError:
            return None

    def _tell_unread(self, prompts: Sequence[Prompt]) -> None:
        if self._note:
            self._unread.tell_once(prompts, self._note)

    def _tokens_of(self, prompt: RawPrompt) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        return encode_text(self._tokenizer, prompt, allow_special_tokens=self._allow_special_tokens)

    def _for_engine(
        self, asked: Asked, prompts: Sequence[list[int]], param: str
    ) -> GenerationRequest:
        max_tokens = self.limit(asked.max_tokens, max(map(len, prompts)), param)
        for tokens in prompts:
            try:
                check_prompt(self._model, tokens, max_tokens)
            except PromptError as error:
                raise RefusalError(str(error), param=param) from error
        return GenerationRequest(
            model=asked.model,
            prompts=prompts,
            sampling=replace(asked.sampling, max_tokens=max_tokens),
            seed=asked.seed,
            n=asked.n,
            stop_tokens=asked.stop_tokens,
            top_logprobs=asked.logprobs,
        )

    def limit(self, asked: int | None, longest: int, param: str) -> int:
        """Return the limit of an answer; refuse a prompt that leaves no room for the answer.

        A limit above `most_tokens` is lowered.
        """
        asked = None if asked is None else min(asked, self._most_tokens)
        room = self.max_model_len - longest
        if room < (asked or 1):
            raise RefusalError(
                f"the prompt has {longest} tokens and the answer may have {asked or 1}, which "
                f"exceeds this model's context of {self.max_model_len} tokens. Shorten the prompt "
                "or lower max_tokens",
                param=param,
                code="context_length_exceeded",
            )
        return asked or min(room, self._max_tokens)

    def _check_arguments(self, given: Mapping[str, Any], tools: Sequence[Any]) -> None:
        """Refuse arguments and tools that the chat template does not read."""
        known = argument_names(self._tokenizer)
        if tools and "tools" not in known:
            raise RefusalError(
                "this model's chat template takes no tools. Describe the tools in a message, or "
                "choose a model that was trained to call tools",
                param="tools",
                code="unsupported_parameter",
            )
        for name, value in given.items():
            if name not in known or name == "tools":
                raise RefusalError(
                    f"the model's chat template does not read {name!r:.80}. It reads: "
                    f"{', '.join(sorted(known)) or 'no arguments'}",
                    param=f"chat_template_kwargs.{name[:80]}",
                    code="unsupported_parameter",
                )
            if name in SWITCHES and not isinstance(value, bool):
                raise RefusalError(
                    f"{name} is {value!r:.60}; expected true or false",
                    param=f"chat_template_kwargs.{name}",
                )
