"""The Modelfile that Ollama builds a model from, beside the merged GGUF file.

Ollama takes the chat template inside a GGUF file only if it is nearly one of those that it knows.
Otherwise it sends prompts without any template. So the Modelfile has one wherever the model's
template can be written in Ollama's language with certainty: each message is a text before, its
content and a text after, which depend on its role alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.chat_template import render_chat
from textpolicy.errors import PromptError
from textpolicy.export.asking import Asking
from textpolicy.types import Message

_Render = Callable[[Sequence[Message], bool], str]
# Private-use characters, which occur in no template.
_SYSTEM, _USER, _ANSWER, _NEXT = ("\ue0a1s", "\ue0a1u", "\ue0a1a", "\ue0a1n")
# Contents that templates are known to change: by cutting spaces, or thoughts.
_CONTENTS = ("a", " two\n\nlines ", "1 < 2 & 'x' \"y\" {z}")


@dataclass(frozen=True, kw_only=True)
class ChatTexts:
    """A chat template as texts before and after the content of a message, by its role.

    `answer` is where the model's answer begins. `default_system` is the system message that the
    template writes for a conversation without one.
    """

    around: Mapping[str, tuple[str, str]]
    answer: str
    default_system: str

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt for a conversation, as Ollama's template makes it."""
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        parts = [(*self.around[message["role"]], message["content"]) for message in messages]
        return "".join(f"{before}{text}{after}" for before, after, text in parts) + self.answer

    def go_template(self) -> str:
        """Return the template in the language of Go, which Ollama reads."""
        branches = [
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for role, (before, after) in self.around.items()
        ]
        chosen = "{{ else ".join(branches)
        return f"{{{{- range .Messages }}}}{{{{ {chosen}{{{{ end }}}}{{{{ end }}}}{self.answer}"


def modelfile(tokenizer: TokenizerWrapper, asking: Asking, notes: list[str]) -> str:
    """Return the content of a Modelfile. What it cannot say is added to `notes`."""
    lines = ["FROM ./model.gguf"]
    texts = None
    if not tokenizer.has_chat_template:
        lines += ['TEMPLATE "{{ .Prompt }}"']
    elif (texts := chat_texts(tokenizer, asking.arguments)) is not None:
        lines += [f"TEMPLATE {_quoted(texts.go_template())}"]
    else:
        notes.append(
            "The Modelfile has no TEMPLATE, because the chat template of this model cannot be "
            "written in Ollama's language with certainty. Ollama uses a template that it knows, or "
            "none: compare `ollama show --template NAME` with chat_template.jinja of the base."
        )
    system = asking.system or (texts.default_system if texts else "")
    if system and _is_writable(system):
        lines += [f"SYSTEM {_quoted(system)}"]
    elif system:
        notes.append(
            "The Modelfile has no SYSTEM, because Ollama's Modelfile cannot hold the characters of "
            "the system message. Pass the message with each request."
        )
    stops = [tokenizer.decode([token]) for token in sorted(tokenizer.eos_token_ids)]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops if stop and _is_writable(stop)]
    # Ollama's default would change the probabilities that were trained.
    lines += ["PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n"


def chat_texts(
    tokenizer: TokenizerWrapper, arguments: Mapping[str, Any] | None = None
) -> ChatTexts | None:
    """Return the texts that the chat template consists of, or None if it is more than texts."""

    def render(messages: Sequence[Message], begin_answer: bool) -> str:
        return render_chat(
            tokenizer,
            messages,
            add_generation_prompt=begin_answer,
            chat_template_kwargs=arguments,
        )

    try:
        texts = _find_texts(render)
        if texts is None or not _is_right(texts, render):
            return None
    except PromptError:
        return None
    written = [text for pair in texts.around.values() for text in pair] + [texts.answer]
    # llama.cpp may write the first token of a text too.
    bos = tokenizer.bos_token
    if any("{{" in text or (bos and bos in text) or not _is_writable(text) for text in written):
        return None
    return texts


def _find_texts(render: _Render) -> ChatTexts | None:
    system: Message = {"role": "system", "content": _SYSTEM}
    user: Message = {"role": "user", "content": _USER}
    answer: Message = {"role": "assistant", "content": _ANSWER}
    more: Message = {"role": "user", "content": _NEXT}
    whole = render([system, user], False)
    conversation = render([system, user, answer, more], False)
    alone = render([user], False)
    begun = render([system, user], True)
    marks = (whole.count(_SYSTEM), whole.count(_USER), conversation.count(_ANSWER))
    counts = (*marks, alone.count(_USER), conversation.count(_NEXT))
    if set(counts) != {1} or not begun.startswith(whole) or not conversation.startswith(whole):
        return None
    before_system, rest = whole.split(_SYSTEM)
    between, after_user = rest.split(_USER)
    before_answer, rest = conversation.removeprefix(whole).split(_ANSWER)
    between_turns, _ = rest.split(_NEXT)
    first = alone.split(_USER)[0]
    before_user, default = first, ""
    if not between.endswith(first):
        # The template writes a system message of its own.
        answered = render([system, user, answer], False)
        after_answer = answered.rpartition(_ANSWER)[2]
        before_user = between_turns.removeprefix(after_answer)
        default = first.removeprefix(before_system).removesuffix(between)
    return ChatTexts(
        around={
            "system": (before_system, between.removesuffix(before_user)),
            "user": (before_user, after_user),
            "assistant": (before_answer, between_turns.removesuffix(before_user)),
        },
        answer=begun.removeprefix(whole),
        default_system=default,
    )


def _is_right(texts: ChatTexts, render: _Render) -> bool:
    """Return whether the texts make the same prompts as the template, for many conversations."""
    for content in _CONTENTS:
        turns: list[Message] = []
        for role in ("user", "assistant", "user", "assistant", "user"):
            turns.append({"role": role, "content": content})
            if role == "assistant":
                continue
            for first in ((), ({"role": "system", "content": content},)):
                messages = [*first, *turns]
                if texts.render(messages) != render(messages, True):
                    return False
    return True


def _is_writable(text: str) -> bool:
    """Return whether a Modelfile can hold a text: its reader drops other characters."""
    plain = text.replace("\n", "").replace("\t", "")
    return '"""' not in text and not text.endswith('"') and (not plain or plain.isprintable())


def _quoted(text: str) -> str:
    return f'"""{text}"""'
