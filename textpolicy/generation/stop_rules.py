"""When a completion ends: at a stop token, or as soon as its text has one of the stop strings."""

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.prompts import decode_text
from textpolicy.types import StopReason

# Text at the edge of a window may differ: half a character, a space that a tokenizer leaves out.
_EDGE_TOKENS = 8


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
        if self._strings and self._holds_string(self._last(tokens)) and self._holds_string(tokens):
            return StopReason.STOP_STRING
        return None

    def _last(self, tokens: list[int]) -> list[int]:
        """Return the last tokens that have text, enough of them for the longest string."""
        last = [token for token in tokens[-self._window :] if token not in self._silent]
        if len(last) == self._window or len(tokens) <= self._window:
            return last
        # Special tokens have no text, so the window reaches as far back as it needs others.
        return [token for token in tokens if token not in self._silent][-self._window :]

    def _holds_string(self, tokens: Sequence[int]) -> bool:
        text = decode_text(self._tokenizer, tokens)
        return any(string in text for string in self._strings)
