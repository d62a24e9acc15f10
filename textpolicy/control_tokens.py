"""Control tokens, such as <|im_end|>, and encoding text that spells them without making any.

A tokenizer makes the control token of every text that spells it, whoever wrote the text. So a
message could end itself and speak in another role. Here each spelling inside a message is replaced
by one rare letter before the chat template is applied. A copy of the tokenizer, whose control
tokens are spelled with other rare letters, then encodes the text: it does not know the old
spellings, so they are plain text, and all around them has the tokens that it always has.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer

from textpolicy.chat_template import render_chat
from textpolicy.errors import PromptError
from textpolicy.types import Message
from textpolicy.untrusted.parsing import parse_json

_T = TypeVar("_T")
# Tangut: letters that no normalizer changes, and that almost no text has.
_RARE_LETTERS = range(0x17000, 0x187F8)
_PROBE: list[Message] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


class ControlTokens:
    """The control tokens of a tokenizer.

    They are its special tokens, its stop tokens, and the tokens that its chat template writes
    around messages, but not the marks of thoughts and of tool calls, which belong to the text of an
    answer.
    """

    def __init__(
        self, tokenizer: TokenizerWrapper, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        written = _written_by_template(tokenizer, chat_template_kwargs)
        special = {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        stops = tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
        names = {*special, *tokenizer.all_special_tokens, *stops, *written}
        spellings = sorted(filter(None, names), key=lambda s: (-len(s), s))
        ids = cast(list[int], tokenizer.convert_tokens_to_ids(spellings))
        self.ids = dict(zip(spellings, ids, strict=True))
        # An unknown character becomes the unknown token without spelling it.
        self.counted = set(ids) - {tokenizer.unk_token_id}
        self.pattern = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        self.beginnings = tuple({s[:n] for s in spellings for n in range(1, len(s))})
        self.endings = tuple({s[n:] for s in spellings for n in range(1, len(s))})
        self._respelled: dict[str, tuple[Tokenizer, Mapping[int, int]]] = {}

    @classmethod
    def of(
        cls, tokenizer: TokenizerWrapper, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> "ControlTokens":
        """Return the control tokens of a tokenizer, which are found once for given arguments."""
        found = _FOUND.setdefault(tokenizer, {})
        plain = _without_texts(chat_template_kwargs)
        key = json.dumps(plain, sort_keys=True)
        if key not in found:
            # A server is sent any arguments.
            if len(found) >= _MAX_KEPT:
                found.clear()
            found[key] = cls(tokenizer, plain)
        return found[key]

    def spelled_in(self, value: Any) -> str | None:
        """Return a control token that a text in the value spells, or None."""
        found = next(filter(None, map(self.pattern.search, _texts(value))), None)
        return found[0] if found else None

    def count_spelled(self, text: str) -> int:
        """Return how many control tokens a text spells."""
        return len(self.pattern.findall(text))

    def respelled_tokenizer(
        self, tokenizer: TokenizerWrapper, letters: str
    ) -> tuple[Tokenizer, Mapping[int, int]]:
        """Return a copy whose control tokens are these letters, and our ids by its ids."""
        if letters not in self._respelled:
            new = dict(zip(self.ids, letters, strict=True))
            copy = _respell(tokenizer.backend_tokenizer, new)
            ids = {cast(int, copy.token_to_id(new[old])): own for old, own in self.ids.items()}
            self._respelled = {letters: (copy, ids)}
        return self._respelled[letters]


_MAX_KEPT = 64
_FOUND: WeakKeyDictionary[TokenizerWrapper, dict[str, ControlTokens]] = WeakKeyDictionary()


class PlainContent:
    """Hides the control tokens that contents spell, and encodes text with hidden ones.

    `contents` is everything that will be hidden: messages or texts. `chat_template_kwargs` are
    hidden as well, in `self.arguments`. With `allow_special_tokens` nothing is hidden, and contents
    may spell control tokens.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        contents: Any,
        *,
        allow_special_tokens: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._control = ControlTokens.of(tokenizer, chat_template_kwargs)
        self._allowed = allow_special_tokens
        if not allow_special_tokens:
            letters = _rare_letters(
                2 * len(self._control.ids) + 1,
                set().union(*_texts([contents, chat_template_kwargs])),
            )
            count = len(self._control.ids)
            self._hidden = dict(zip(self._control.ids, letters, strict=False))
            self._real = letters[count : 2 * count]
            # Keeps a content from completing a control token together with text beside it.
            self._wall = letters[-1]
        self.arguments = self.hide(dict(chat_template_kwargs or {}))

    def hide(self, value: _T) -> _T:
        """Return the value with hidden control tokens in all its texts, which may be nested."""
        if self._allowed:
            return value
        if isinstance(value, str):
            return cast(_T, self._hide_in(value))
        if isinstance(value, Mapping):
            return cast(_T, {self._hide_key(name): self.hide(part) for name, part in value.items()})
        if isinstance(value, list | tuple):
            return cast(_T, [self.hide(part) for part in value])
        return value

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text in which contents are hidden.

        Only the text around the contents makes control tokens.
        """
        shown, control = self._show(text), self._control
        ids = list(self._tokenizer.encode(shown, add_special_tokens=add_special_tokens))
        if self._allowed:
            return ids
        around = control.count_spelled(text)
        spelled = around + self._added(add_special_tokens)
        if control.count_spelled(shown) == around and self._count(ids) <= spelled:
            return ids
        ids = self._encode_respelled(text, add_special_tokens)
        if self._count(ids) != spelled:
            name = control.spelled_in(shown) or "a control token"
            raise PromptError(
                f"the text spells {name!r}, and this model's tokenizer cannot read it as plain "
                "text. Remove it from the text, or allow it (--allow-special-tokens)"
            )
        return ids

    def _hide_in(self, text: str) -> str:
        control = self._control
        text = control.pattern.sub(lambda found: self._hidden[found[0]], text)
        core = text.strip()
        start = len(text) - len(text.lstrip())
        first = self._wall if core.startswith(control.endings) else ""
        last = self._wall if core.endswith(control.beginnings) else ""
        return f"{text[:start]}{first}{core}{last}{text[start + len(core) :]}"

    def _hide_key(self, name: Any) -> Any:
        """Return the name of a part, which only JSON in a prompt would show."""
        return self._hide_in(name) if self._control.spelled_in(name) else name

    def _show(self, text: str) -> str:
        if self._allowed:
            return text
        table = {letter: name for name, letter in self._hidden.items()} | {self._wall: ""}
        return text.translate(str.maketrans(table))

    def _encode_respelled(self, text: str, add_special_tokens: bool) -> list[int]:
        control, tokenizer = self._control, self._tokenizer
        new = dict(zip(control.ids, self._real, strict=True))
        text = self._show(control.pattern.sub(lambda found: new[found[0]], text))
        if tokenizer.is_fast:
            copy, ids = control.respelled_tokenizer(tokenizer, self._real)
            found = copy.encode(text, add_special_tokens=add_special_tokens).ids
            return [ids.get(token, token) for token in found]
        # Another kind of tokenizer cannot be copied: each part is encoded by itself.
        old = dict(zip(self._real, control.ids.values(), strict=True))
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        parts = [part for part in re.split(f"([{self._real}])", text) if part]
        tokens = [[old[p]] if p in old else tokenizer.encode(p, **plain) for p in parts]
        before = list(tokenizer.encode("")) if add_special_tokens else []
        return [*before, *(token for some in tokens for token in some)]

    def _count(self, ids: Sequence[int]) -> int:
        return sum(token in self._control.counted for token in ids)

    def _added(self, add_special_tokens: bool) -> int:
        """Return how many control tokens the tokenizer itself adds to a text."""
        return self._count(self._tokenizer.encode("")) if add_special_tokens else 0


def encode_text(
    tokenizer: TokenizerWrapper,
    text: str,
    *,
    add_special_tokens: bool = True,
    allow_special_tokens: bool = False,
) -> list[int]:
    """Return the token ids of a text that no chat template wrote."""
    content = PlainContent(tokenizer, text, allow_special_tokens=allow_special_tokens)
    return content.encode(content.hide(text), add_special_tokens=add_special_tokens)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for part in pair for text in _texts(part))
    elif isinstance(value, list | tuple):
        yield from (text for part in value for text in _texts(part))


def _rare_letters(count: int, used: set[str]) -> str:
    for start in range(_RARE_LETTERS.start, _RARE_LETTERS.stop - count, count):
        letters = "".join(map(chr, range(start, start + count)))
        if used.isdisjoint(letters):
            return letters
    raise PromptError(
        "the text has so many rare letters (Tangut) that control tokens cannot be told from them; "
        "remove these letters from the text"
    )


def _respell(tokenizer: Tokenizer, new: Mapping[str, str]) -> Tokenizer:
    """Return a copy of a tokenizer that spells some of its tokens in a new way."""
    data = parse_json(tokenizer.to_str(), constants=True)
    data["truncation"] = data["padding"] = None
    for token in data["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    model = data["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [[new.get(name, name), score] for name, score in model["vocab"]]
    else:
        model["vocab"] = {new.get(name, name): number for name, number in model["vocab"].items()}
    if isinstance(unknown := model.get("unk_token"), str):
        model["unk_token"] = new.get(unknown, unknown)
    return Tokenizer.from_str(json.dumps(data))


def _without_texts(chat_template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments without those that hold texts, which are contents."""
    given = dict(chat_template_kwargs or {})
    return {name: part for name, part in given.items() if not any(_texts(part))}


def _written_by_template(
    tokenizer: TokenizerWrapper, chat_template_kwargs: Mapping[str, Any] | None
) -> set[str]:
    """Return the added tokens that the chat template writes around harmless messages."""
    if not tokenizer.has_chat_template:
        return set()
    arguments = _without_texts(chat_template_kwargs)
    try:
        text = render_chat(
            tokenizer, _PROBE, add_generation_prompt=True, chat_template_kwargs=arguments
        )
    except PromptError:
        return set()  # The template wants other roles, and the caller will hear of it.
    marks = {tokenizer.think_start, tokenizer.think_end}
    marks |= {tokenizer.tool_call_start, tokenizer.tool_call_end}
    return {name for name in tokenizer.get_added_vocab() if name in text} - marks
