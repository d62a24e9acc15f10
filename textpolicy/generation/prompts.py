"""Prompts and replies as token ids, sampled tokens as text, and checks of a prompt's length."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.chat_template import render_chat
from textpolicy.control_tokens import PlainContent, encode_text
from textpolicy.errors import PromptError
from textpolicy.types import Message, Prompt

# Takes the place of a message's content while the text around the content is found. These are
# private-use characters, which occur in no template.
_PLACEHOLDER = "\ue0a1\ue0a2"


def encode_prompt(
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    *,
    allow_special_tokens: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids that the model reads before its answer.

    A string is one user message. A tokenizer without a chat template accepts only strings. A
    control token that the prompt or an argument of the template spells is plain text, unless
    `allow_special_tokens` is given.
    """
    if not prompt:
        raise PromptError(f"the prompt is empty ({prompt!r}); pass a text or at least one message")
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        content = PlainContent(
            tokenizer,
            messages,
            allow_special_tokens=allow_special_tokens,
            chat_template_kwargs=chat_template_kwargs,
        )
        text = render_chat(
            tokenizer,
            content.hide(messages),
            add_generation_prompt=True,
            chat_template_kwargs=content.arguments,
        )
        return content.encode(text)
    if not isinstance(prompt, str):
        raise PromptError(
            "the prompt is a list of messages, but this model's tokenizer has no chat template; "
            "pass the prompt as one string"
        )
    return encode_text(tokenizer, prompt, allow_special_tokens=allow_special_tokens)


def encode_reply(
    tokenizer: TokenizerWrapper,
    replies: Sequence[Message],
    last_token: int,
    *,
    allow_special_tokens: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids between an answer that ended with `last_token` and the next answer.

    The chat template writes these tokens. They begin with the stop token of the answer, unless
    `last_token` is that stop token. A control token that a reply spells is plain text, unless
    `allow_special_tokens` is given, so that a reply cannot end its own message.
    """
    contents = [reply["content"] for reply in replies]
    if not tokenizer.has_chat_template:
        return encode_text(
            tokenizer,
            "".join(contents),
            add_special_tokens=False,
            allow_special_tokens=allow_special_tokens,
        )
    plain = PlainContent(
        tokenizer,
        list(replies),
        allow_special_tokens=allow_special_tokens,
        chat_template_kwargs=chat_template_kwargs,
    )
    conversation = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _PLACEHOLDER},
        *(plain.hide(dict(reply) | {"content": _PLACEHOLDER}) for reply in replies),
    ]
    text = render_chat(
        tokenizer,
        conversation,
        add_generation_prompt=True,
        chat_template_kwargs=plain.arguments,
    )
    _, *between = text.split(_PLACEHOLDER)
    if len(between) != 1 + len(replies):
        roles = [reply["role"] for reply in replies]
        raise PromptError(
            f"the model's chat template leaves out messages of the roles {roles}; use roles that "
            "the template writes, such as user"
        )
    parts = [part + plain.hide(content) for part, content in zip(between, contents, strict=False)]
    ids = plain.encode("".join([*parts, between[-1]]))
    return ids[1:] if last_token == ids[0] and last_token in tokenizer.eos_token_ids else ids


def decode_text(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> str:
    """Return the text that people and reward functions see, without special tokens."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True)


def context_length(model: nn.Module) -> int | None:
    """Return the number of tokens that the model can read, or None if there is no limit."""
    return _limits(model)[1]


def has_room(model: nn.Module, length: int, max_tokens: int) -> bool:
    """Return whether `max_tokens` more tokens fit into the model's context after `length`."""
    context = context_length(model)
    return context is None or length + max_tokens <= context


def check_prompt(model: nn.Module, tokens: Sequence[int], max_tokens: int) -> None:
    """Raise `PromptError` if the prompt is empty, too long, or has ids outside the vocabulary.

    An id outside the vocabulary would read undefined memory.
    """
    vocabulary, context = _limits(model)
    if not tokens:
        raise PromptError("the prompt is empty: it has no tokens; pass at least one")
    outside = [token for token in tokens if not 0 <= token < vocabulary]
    if outside:
        raise PromptError(
            f"the prompt's token ids {outside[:5]} are outside the vocabulary of {vocabulary}; "
            "encode the prompt with the tokenizer of this model"
        )
    if not has_room(model, len(tokens), max_tokens):
        raise PromptError(
            f"{len(tokens)} prompt tokens and max_tokens {max_tokens} exceed the model's context "
            f"of {context} tokens; shorten the prompt or lower max_tokens"
        )


def _limits(model: nn.Module) -> tuple[int, int | None]:
    """Return the size of the vocabulary, and the longest context or None if there is no limit."""
    # mlx-lm 0.32 keeps both on `args`; a model with a nested language model keeps them in there.
    args: Any = model.args
    options: dict[str, Any] = vars(args)
    if nested := options.get("text_config"):
        options = nested if isinstance(nested, dict) else vars(nested)
    context = options.get("max_position_embeddings") or options.get("n_positions")
    return options["vocab_size"], context
