"""Models that can think: the switch in their chat template, and thoughts in tokens and prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.chat_template import (
    argument_names,
    check_arguments,
    render_chat,
    words_of_arguments,
)
from textpolicy.control_tokens import ControlTokens
from textpolicy.errors import ConfigError
from textpolicy.rewards.thoughts import THINK_MARKS, split_thought
from textpolicy.types import Message
from textpolicy.untrusted.template_check import SWITCHES

Thinking = Literal["on", "off"]
# Variables of templates that choose how much a model thinks, and not whether.
_AMOUNTS = ("reasoning_effort", "thinking_budget", "thinking_effort", "reasoning_budget")
# Marks of thoughts, each one token, that mlx-lm 0.32 does not know.
_OTHER_MARKS = (
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
# Words in a message that some templates look for.
_WORD_FOR_OFF = "/no_think"
_PROBE: list[Message] = [{"role": "user", "content": "a"}]


def template_arguments(
    tokenizer: TokenizerWrapper,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    thinking: Thinking | None = None,
) -> dict[str, Any]:
    """Return the arguments of the chat template, with the switch for `thinking` among them.

    Raise `ConfigError` for arguments that the template does not read, and for a template that has
    no switch.
    """
    given = dict(chat_template_kwargs or {})
    argument_names(tokenizer, given)  # Raises for a template that does not come to an end.
    check_arguments(tokenizer, given)
    if thinking is None:
        return given
    switch = _switch(tokenizer)
    if switch is None:
        raise ConfigError(f"thinking is {thinking!r}, but {_no_switch(tokenizer)}")
    if switch in given:
        raise ConfigError(
            f"thinking is {thinking!r}, and chat_template_kwargs sets {switch}, which is the same "
            "switch. Leave out one of them"
        )
    on, off = (_prompt_end(tokenizer, given | {switch: way}) for way in (True, False))
    if on == off:
        raise ConfigError(
            f"thinking is {thinking!r}, but the model's chat template writes the same prompt for "
            f"{switch} true and false. Leave the option out"
        )
    return given | {switch: thinking == "on"}


def describe_thinking(
    tokenizer: TokenizerWrapper, chat_template_kwargs: Mapping[str, Any]
) -> str | None:
    """Return in a sentence whether a model thinks, or None if nothing says that it can."""
    switch = _switch(tokenizer)
    if switch is None:
        amounts = [name for name in _AMOUNTS if name in argument_names(tokenizer)]
        if amounts and amounts[0] in chat_template_kwargs:
            return f"thinking: {amounts[0]} is {chat_template_kwargs[amounts[0]]!r}"
        if amounts or tokenizer.has_thinking:
            return f"thinking: as the chat template does by itself; {_no_switch(tokenizer)}"
        return None
    now, on, off = (
        _prompt_end(tokenizer, {**chat_template_kwargs, **changed})
        for changed in ({}, {switch: True}, {switch: False})
    )
    if on == off:
        return f"thinking: {switch} changes nothing in the prompt of this model"
    state, other = ("on", "off") if now == on else ("off", "on")
    if switch in chat_template_kwargs:
        return f"thinking: {state} ({switch} is {str(chat_template_kwargs[switch]).lower()})"
    return f"thinking: {state}, the default of the chat template; --thinking {other} changes it"


class ThoughtReader:
    """Finds thoughts in the prompts and completions of one tokenizer and its template arguments."""

    def __init__(
        self, tokenizer: TokenizerWrapper, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._marks, mark_ids = thought_marks(tokenizer)
        control = ControlTokens.of(tokenizer, chat_template_kwargs)
        self._around_messages = set(control.ids.values()) - mark_ids
        special = {n for n, one in tokenizer.added_tokens_decoder.items() if one.special}
        # The text of a completion has no special tokens, so that special marks are missing in it.
        self._unseen = special - mark_ids if special & mark_ids else None

    def begins_inside(self, prompt_tokens: Sequence[int]) -> bool:
        """Return whether the prompt has opened a thought, in which the completion then begins.

        Only what follows the last control token counts, which the template has written: a user who
        writes <think> opens nothing.
        """
        after = 0
        for token in reversed(prompt_tokens):
            if token in self._around_messages:
                break
            after += 1
        if after in (0, len(prompt_tokens)):
            return False
        end = self._tokenizer.decode(list(prompt_tokens[-after:]), skip_special_tokens=False)
        opening, closing = self._marks
        return end.rfind(opening) > end.rfind(closing)

    def split(self, tokens: Sequence[int], text: str, *, in_thought: bool) -> tuple[str, str]:
        """Return the thought and the visible answer of a completion, whose text is `text`."""
        if self._unseen is not None:
            kept = [token for token in tokens if token not in self._unseen]
            text = self._tokenizer.decode(kept, skip_special_tokens=False)
            # Some models mark the answer as well.
            for mark in self._tokenizer.structural_markers:
                text = text.replace(mark, "")
        return split_thought(text, in_thought=in_thought, marks=self._marks)


def thought_marks(tokenizer: TokenizerWrapper) -> tuple[tuple[str, str], set[int]]:
    """Return the marks of thoughts, and the tokens that they consist of, if they are tokens."""
    opening, closing = tokenizer.think_start, tokenizer.think_end
    if opening and closing:
        ids = (*(tokenizer.think_start_tokens or ()), *(tokenizer.think_end_tokens or ()))
        return (opening, closing), set(ids)
    vocabulary = tokenizer.get_vocab()
    for marks in _OTHER_MARKS:
        if all(mark in vocabulary for mark in marks):
            return marks, {vocabulary[mark] for mark in marks}
    return THINK_MARKS, set()


def _switch(tokenizer: TokenizerWrapper) -> str | None:
    known = argument_names(tokenizer)
    return next((name for name in SWITCHES if name in known), None)


def _no_switch(tokenizer: TokenizerWrapper) -> str:
    if not tokenizer.has_chat_template:
        return "this model's tokenizer has no chat template. Leave the option out"
    found = [name for name in _AMOUNTS if name in argument_names(tokenizer)]
    value = "512" if found and "budget" in found[0] else "low"
    if found:
        advice = f"{found[0]} says how much the model thinks: --template-args {found[0]}={value}"
    elif _WORD_FOR_OFF in str(tokenizer.chat_template):
        advice = f"It looks for {_WORD_FOR_OFF} in a message: --system {_WORD_FOR_OFF}"
    else:
        advice = (
            "Leave the option out if the model does not think. For a short thought, ask for one in "
            "the system message, or choose another model"
        )
    return (
        "the model's chat template has no switch for it, such as enable_thinking or thinking. "
        f"{words_of_arguments(tokenizer)}. {advice}"
    )


def _prompt_end(tokenizer: TokenizerWrapper, given: Mapping[str, Any]) -> str:
    return render_chat(tokenizer, _PROBE, add_generation_prompt=True, chat_template_kwargs=given)
