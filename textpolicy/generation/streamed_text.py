"""The text of a row piece by piece, while the row is decoded."""

from collections.abc import Callable, Sequence
from functools import partial

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.prompts import decode_text

_UNKNOWN = "\ufffd"
# A character has at most four bytes, so so many tokens without a whole character are no text.
_MAX_WAITING_TOKENS = 8


class StreamedText:
    """Decodes the tokens of a row as they come, in a time that does not grow with the text.

    A character that is not complete yet waits for its next tokens. `decode` replaces
    `decode_text` as what makes text of tokens.
    """

    def __init__(
        self, tokenizer: TokenizerWrapper, decode: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        self._decode = decode or partial(decode_text, tokenizer)
        # Tokens from `start` to `read` were in earlier pieces. They are decoded again with the
        # next tokens, because a tokenizer may leave out the first space of a text.
        self._start = 0
        self._read = 0

    def next_piece(self, tokens: Sequence[int], *, ended: bool) -> str:
        """Return the text that the row has more than before; with `ended`, no token follows."""
        before = self._decode(tokens[self._start : self._read])
        now = self._decode(tokens[self._start :])
        waits = now.endswith(_UNKNOWN) and len(tokens) - self._read < _MAX_WAITING_TOKENS
        if len(now) <= len(before) or (waits and not ended):
            return ""
        self._start, self._read = self._read, len(tokens)
        return now[len(before) :]
