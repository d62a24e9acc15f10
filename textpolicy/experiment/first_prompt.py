"""What a run says about its prompts at its start: the first one, and whether the model thinks."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.thinking import describe_thinking

_MAX_SHOWN = 1500
"""Characters of the beginning and of the end of a prompt that are shown."""


def describe_prompt(
    tokenizer: TokenizerWrapper,
    prompt_tokens: Sequence[int],
    chat_template_kwargs: Mapping[str, Any],
) -> str:
    """Return the prompt as the model reads it, with its control tokens, and the thinking switch."""
    text = tokenizer.decode(list(prompt_tokens), skip_special_tokens=False)
    if (more := len(text) - 2 * _MAX_SHOWN) > 0:
        text = f"{text[:_MAX_SHOWN]}\n… ({more:,} more characters) …\n{text[-_MAX_SHOWN:]}"
    lines = [f"the first prompt, as the model reads it ({len(prompt_tokens):,} tokens):", text]
    if thinking := describe_thinking(tokenizer, chat_template_kwargs):
        lines.append(thinking)
    return "\n".join(lines)
