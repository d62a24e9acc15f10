"""When a completion ends: at a stop token, or as soon as its text has one of the stop strings."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.prompts import decode_text
from textpolicy.types import StopReason

# Text at the edge of a window may differ: half a character, a space that a tokenizer leaves out.
_EDGE_TOKENS = 8
_CHARACTER_BYTES = 4
_UNKNOWN = "\ufffd"
_TEXTS: WeakKeyDictionary[TokenizerWrapper, dict[int, str | None]] = WeakKeyDictionary()
"""By tokenizers, the texts of single tokens. Each request has its own rule, so texts outlive it."""


class StopAtStrings:
    """A `StopRule` for stop tokens and stop strings, whose time does not grow with the text.

    Text is decoded only after a token in which a string may end. Only the last tokens are decoded:
    as many as could hold the longest string, because a token that has any text has at least one
    byte. A string that they hold is confirmed in the whole text.
    """

    def __init__(self, tokenizer: TokenizerWrapper, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = strings
        self._ends = frozenset(tokenizer.eos_token_ids)
        self._silent = frozenset(tokenizer.all_special_ids)
        longest = max((len(string.encode()) for string in strings), default=0)
        self._window = longest + _EDGE_TOKENS
        self._may_end: dict[int, bool] = {}
        self._texts = _TEXTS.setdefault(tokenizer, {})
        # With this option, a token may remove a space from the text before it.
        self._cleans_up = getattr(tokenizer, "clean_up_tokenization_spaces", False)

    def __call__(self, tokens: list[int]) -> StopReason | None:
        if tokens[-1] in self._ends:
            return StopReason.STOP_TOKEN
        if not self._strings or not self._may_end_string(tokens[-1]):
            return None
        if self._may_hold_string(tokens) and self._find(self._text(tokens)):
            return StopReason.STOP_STRING
        return None

    def _may_end_string(self, token: int) -> bool:
        """Return whether a string may end in the text of this token, whatever is before it."""
        known = self._may_end.get(token)
        if known is None:
            text = None if self._cleans_up else self._text_of(token)
            known = text is None or any(_may_end_in(text, string) for string in self._strings)
            self._may_end[token] = known
        return known

    def _text_of(self, token: int) -> str | None:
        """Return a token's text, or None if that depends on the tokens beside it."""
        if token not in self._texts:
            alone, twice = self._text([token]), self._text([token, token])
            depends = _UNKNOWN in alone or 2 * _without_spaces(alone) != _without_spaces(twice)
            self._texts[token] = None if depends else alone
        return self._texts[token]

    def _may_hold_string(self, tokens: list[int]) -> bool:
        """Return whether the last tokens hold a string, as far as they can tell."""
        if len(tokens) <= self._window:
            return True
        for more in range(_CHARACTER_BYTES):
            text = self._text(self._last(tokens, self._window + more))
            if self._find(text):
                return True
            # The window may begin inside a character. Some tokenizers then show none of the
            # characters after it, so the window has to begin one token earlier.
            if _UNKNOWN not in text:
                return False
        return False

    def _last(self, tokens: list[int], number: int) -> list[int]:
        """Return the last tokens that have text. Special tokens have none."""
        last = tokens[-number:]
        if self._silent.isdisjoint(last):
            return last
        return [token for token in tokens if token not in self._silent][-number:]

    def _text(self, tokens: Sequence[int]) -> str:
        return decode_text(self._tokenizer, tokens)

    def _find(self, text: str) -> bool:
        return any(string in text for string in self._strings)


def _without_spaces(text: str) -> str:
    return text.replace(" ", "")


def _may_end_in(text: str, string: str) -> bool:
    """Return whether a string may end in this text of a token.

    Spaces do not count: tokenizers leave some out beside other tokens, and add some.
    """
    ends_in_space = string.endswith(" ")
    text, string = _without_spaces(text), _without_spaces(string)
    if ends_in_space or not string or not text:
        return True
    # Of a long string, only an end as long as the text can lie in it.
    ends = range(max(1, len(string) - len(text)), len(string))
    return string in text or any(text.startswith(string[at:]) for at in ends)
