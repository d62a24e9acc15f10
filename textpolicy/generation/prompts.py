"""Prompts to token ids. The only place where a chat template is applied."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.errors import PromptError
from textpolicy.types import Prompt


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


def decode_text(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> str:
    """The text that people and rewards see: special tokens are left out."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True)


def check_prompt(model: nn.Module, tokens: Sequence[int], max_tokens: int) -> None:
    """Refuse ids that would read undefined memory, and prompts with no room for an answer."""
    vocabulary, context = _limits(model)
    if not tokens:
        raise PromptError("the prompt is empty: it has no tokens to condition on")
    outside = [token for token in tokens if not 0 <= token < vocabulary]
    if outside:
        raise PromptError(f"token ids {outside[:5]} are outside the vocabulary of {vocabulary}")
    if context is not None and len(tokens) + max_tokens > context:
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
