"""The only place where a chat template is applied: sampling and supervised training share it."""

from collections.abc import Sequence

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.errors import PromptError
from textpolicy.types import Message

# What a template with mistakes raises: it computes with the messages, as a program does.
_WRONG_TEMPLATE = (
    *(TemplateError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RecursionError, MemoryError, SyntaxError),
)


def render_chat(
    tokenizer: TokenizerWrapper, messages: Sequence[Message], *, add_generation_prompt: bool
) -> str:
    """Return the text that the tokenizer's chat template writes for `messages`.

    With `add_generation_prompt`, the text ends where the model's next answer begins.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
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


def encode_rendered(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Return the token ids of text that a chat template wrote.

    No special tokens are added, because the template has already written all of them.
    """
    return list(tokenizer.encode(text, add_special_tokens=False))
