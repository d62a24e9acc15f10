"""When a completion ends: at a stop token, or as soon as its text has one of the stop strings."""

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.prompts import decode_text
from textpolicy.types import StopReason

# Text at the edge of a window may differ: half a character, a space that a tokenizer leaves out.
_EDGE_TOKENS = 8
_CHARACTER_BYTES = 4
_UNKNOWN = "\ufffd"


class StopAtStrings:
    """A `StopRule` for stop tokens and stop strings, whose time does not grow with the text.

    Only the last tokens are decoded: as many as could hold the longest string, because a token that
    has any text has at least one byte. A string that they hold is confirmed in the whole text.
    """

    def __init__(self, tokenizer: TokenizerWrapper, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = strings
        self._ends = frozenset(tokenizer.eos_token_ids)
        self._silent = frozenset(tokenizer.all_special_ids)
        longest = max((len(string.encode()) for string in strings), default=0)
        self._window = longest + _EDGE_TOKENS

    def __call__(self, tokens: list[int]) -> StopReason | None:
        if tokens[-1] in self._ends:
            return StopReason.STOP_TOKEN
        if self._strings and self._may_hold_string(tokens) and self._find(self._text(tokens)):
            return StopReason.STOP_STRING
        return None

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
