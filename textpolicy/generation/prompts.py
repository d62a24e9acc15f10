"""Prompts to token ids. The only place where a chat template is applied."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.errors import PromptError
from textpolicy.types import Message, Prompt

# Stands for a message's content while the template around it is found. Private-use characters, so
# that no template and no content has them.
_MARK = "\ue0a1\ue0a2"


def encode_prompt(tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """The ids that the model is fed, up to where its answer begins.

    A string is one user message. A tokenizer without a chat template takes plain strings only.
    """
    if not prompt:
        raise PromptError(f"the prompt is empty ({prompt!r}): there is nothing to answer")
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True))
        except (TemplateError, ValueError, KeyError) as error:
            raise PromptError(
                f"the model's chat template does not take {messages!r}: {error}. Expected messages "
                "with a role (system, user, assistant) and a content, in an order it knows"
            ) from error
    if not isinstance(prompt, str):
        raise PromptError("this tokenizer has no chat template: pass the prompt as one string")
    return list(tokenizer.encode(prompt))


def encode_reply(tokenizer: TokenizerWrapper, replies: Sequence[Message], last: int) -> list[int]:
    """The ids between an answer that ended with the token `last` and where the next one begins.

    They are what the chat template writes there, with the end of the answer unless `last` is it.
    Text of the replies stays text, even where it spells a special token.
    """
    if not tokenizer.has_chat_template:
        return _encode_text(tokenizer, "".join(reply["content"] for reply in replies))
    marks = [f"{_MARK}{number}{_MARK}" for number in range(len(replies) + 1)]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": marks[-1]},
        *(dict(reply) | {"content": mark} for reply, mark in zip(replies, marks, strict=False)),
    ]
    _, found, rest = _render(tokenizer, messages).partition(marks[-1])
    ids: list[int] = []
    literal = ""
    for reply, mark in zip(replies, marks, strict=False):
        before, marked, rest = rest.partition(mark)
        found = found and marked
        literal += before
        if _spells_special(tokenizer, reply["content"]):
            ids += [
                *_encode_template(tokenizer, literal),
                *_encode_text(tokenizer, reply["content"]),
            ]
            literal = ""
        else:
            literal += reply["content"]
    if not found:
        roles = [reply["role"] for reply in replies]
        raise PromptError(f"the model's chat template leaves out messages of the roles {roles}")
    ids += _encode_template(tokenizer, literal + rest)
    return ids[1:] if last == ids[0] and last in tokenizer.eos_token_ids else ids


def _render(tokenizer: TokenizerWrapper, messages: Sequence[Message]) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, ValueError, KeyError) as error:
        roles = [message["role"] for message in messages]
        raise PromptError(
            f"the model's chat template does not take a conversation of the roles {roles}: {error}"
        ) from error


def _spells_special(tokenizer: TokenizerWrapper, text: str) -> bool:
    return any(token in text for token in tokenizer.get_added_vocab())


def _encode_template(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _encode_text(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def decode_text(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> str:
    """The text that people and rewards see: special tokens are left out."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True)


def has_room(model: nn.Module, length: int, max_tokens: int) -> bool:
    """Whether an answer of `max_tokens` fits into the model's context after `length` tokens."""
    _, context = _limits(model)
    return context is None or length + max_tokens <= context


def check_prompt(model: nn.Module, tokens: Sequence[int], max_tokens: int) -> None:
    """Refuse ids that would read undefined memory, and prompts with no room for an answer."""
    vocabulary, context = _limits(model)
    if not tokens:
        raise PromptError("the prompt is empty: it has no tokens to condition on")
    outside = [token for token in tokens if not 0 <= token < vocabulary]
    if outside:
        raise PromptError(f"token ids {outside[:5]} are outside the vocabulary of {vocabulary}")
    if not has_room(model, len(tokens), max_tokens):
        raise PromptError(
            f"{len(tokens)} prompt tokens + max_tokens {max_tokens} exceed the model's context of "
            f"{context}: shorten the prompt or lower max_tokens"
        )


def _limits(model: nn.Module) -> tuple[int, int | None]:
    # mlx-lm 0.32 keeps both on `args`; models that nest a language model keep them one level down.
    args: Any = model.args
    options: dict[str, Any] = vars(args)
    if nested := options.get("text_config"):
        options = nested if isinstance(nested, dict) else vars(nested)
    context = options.get("max_position_embeddings") or options.get("n_positions")
    return options["vocab_size"], context
