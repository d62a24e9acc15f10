"""What a run says about its prompts at its start: the first one, and what the model cannot read."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.thinking import describe_thinking
from textpolicy.generation.unread_characters import UnreadCharacters
from textpolicy.types import Prompt

_MAX_SHOWN = 1500
"""Characters of the beginning and of the end of a prompt that are shown."""


def describe_prompt(
    tokenizer: TokenizerWrapper,
    prompt_tokens: Sequence[int],
    chat_template_kwargs: Mapping[str, Any],
    others: Iterable[Prompt] = (),
) -> str:
    """Return the prompt as the model reads it, with its control tokens, and the thinking switch.

    A line follows if the model cannot read some characters of the other prompts.
    """
    text = tokenizer.decode(list(prompt_tokens), skip_special_tokens=False)
    if (more := len(text) - 2 * _MAX_SHOWN) > 0:
        text = f"{text[:_MAX_SHOWN]}\n… ({more:,} more characters) …\n{text[-_MAX_SHOWN:]}"
    lines = [f"the first prompt, as the model reads it ({len(prompt_tokens):,} tokens):", text]
    if thinking := describe_thinking(tokenizer, chat_template_kwargs):
        lines.append(thinking)
    if unread := UnreadCharacters(tokenizer).describe(others):
        lines.append(unread)
    return "\n".join(lines)
