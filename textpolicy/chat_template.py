"""The only place where a chat template is applied: sampling and supervised training share it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.errors import ConfigError, PromptError
from textpolicy.types import Message
from textpolicy.untrusted.template_check import SWITCHES, template_variables

# What a template with mistakes raises: it computes with the messages, as a program does.
_WRONG_TEMPLATE = (
    *(TemplateError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RecursionError, MemoryError, SyntaxError),
)
# What the conversation and the tokenizer fill, and what changes how transformers applies a
# template: another template, for example.
_RESERVED = frozenset(
    {
        *("messages", "conversation", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "self", "kwargs"),
        *("raise_exception", "strftime_now", "args"),
    }
)


def render_chat(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Return the text that the tokenizer's chat template writes for `messages`.

    With `add_generation_prompt`, the text ends where the model's next answer begins. The template
    reads `chat_template_kwargs` as variables; a variable that is not given has its own default.
    """
    try:
        write, _ = _writer(tokenizer)
        text = write(
            list(messages),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **(chat_template_kwargs or {}),
        )
        text.encode()  # Half a surrogate pair cannot be tokenized.
        return text
    except _WRONG_TEMPLATE as error:
        roles = [message.get("role") for message in messages]
        raise PromptError(
            f"the model's chat template rejects a conversation with the roles {roles}: "
            f"{str(error)[:300]}. Expected messages that have a role (system, user or assistant) "
            "and a content, in an order that the template accepts"
        ) from error


def argument_names(
    tokenizer: TokenizerWrapper, chat_template_kwargs: Mapping[str, Any] | None = None
) -> frozenset[str]:
    """Return the names of the variables that the chat template lets a caller choose.

    Raise `ModelError` if the template does not come to an end with these arguments.
    """
    if not tokenizer.has_chat_template:
        return frozenset()
    write, is_jinja = _writer(tokenizer)
    if is_jinja:
        read = template_variables(tokenizer.get_chat_template(), chat_template_kwargs)
    else:
        read = frozenset(inspect.signature(write).parameters)
    return frozenset(name for name in read - _RESERVED if not name.endswith("_token"))


def check_arguments(
    tokenizer: TokenizerWrapper, chat_template_kwargs: Mapping[str, Any] | None
) -> None:
    """Raise `ConfigError` for arguments that the chat template does not read."""
    if not chat_template_kwargs:
        return
    if not tokenizer.has_chat_template:
        raise ConfigError(
            f"chat_template_kwargs is {dict(chat_template_kwargs)!r:.100}, but this model's "
            "tokenizer has no chat template. Leave the arguments out"
        )
    known = argument_names(tokenizer, chat_template_kwargs)
    if unknown := [name for name in chat_template_kwargs if name not in known]:
        raise ConfigError(
            f"chat_template_kwargs names {', '.join(map(repr, unknown))}, which the model's chat "
            f"template does not read. {words_of_arguments(tokenizer)}. Remove the "
            "unknown names from chat_template_kwargs (--template-args)"
        )
    for name in SWITCHES:
        if not isinstance(value := chat_template_kwargs.get(name, True), bool):
            raise ConfigError(
                f"chat_template_kwargs has {name} = {value!r}; expected true or false, because a "
                "template takes any text for true"
            )


def words_of_arguments(tokenizer: TokenizerWrapper) -> str:
    """Return in words which arguments the chat template reads."""
    names = ", ".join(sorted(argument_names(tokenizer)))
    return f"The template reads: {names}" if names else "The template reads no arguments"


def _writer(tokenizer: TokenizerWrapper) -> tuple[Callable[..., str], bool]:
    """Return the function that writes conversations, and whether it applies a Jinja template.

    mlx-lm brings functions in Python for some models. Its own method is not used, because mlx-lm
    0.32 sets enable_thinking in every call, to true for every model with tokens for thoughts.
    """
    program = tokenizer._chat_template  # pyright: ignore[reportPrivateUsage]
    if program is not None:
        return program, False
    inner: Any = tokenizer._tokenizer  # pyright: ignore[reportPrivateUsage]
    return partial(inner.apply_chat_template, return_dict=False), bool(inner.chat_template)
