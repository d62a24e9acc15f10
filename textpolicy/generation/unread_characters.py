"""Characters of prompts that a model cannot read, because its tokenizer has no tokens for them."""

from collections.abc import Callable, Iterable
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.model_files import tiny_model
from textpolicy.types import Prompt

# Two Tangut letters. A tokenizer that encodes both alike has one form for all unknown characters.
_RARE_LETTERS = ("\U00017000", "\U00017001")
_MOST_SHOWN = 10


class UnreadCharacters:
    """Finds the characters of prompts that a model cannot read.

    Tokenizers with a token for every byte read all characters. The embedded model has such a
    tokenizer, but it was made of texts in ASCII, so other characters count as unread.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._embedded = Path(tokenizer.name_or_path) == tiny_model()
        first, second = map(self._encode, _RARE_LETTERS)
        self._unknown = first if first == second else None
        self._read: set[str] = set()
        self._told = False

    def describe(self, prompts: Iterable[Prompt]) -> str | None:
        """Return a line that says which characters the model cannot read, or None."""
        found = self._find(prompts)
        if not found:
            return None
        shown = " ".join(found[:_MOST_SHOWN])
        if (more := len(found) - _MOST_SHOWN) > 0:
            shown += f" and {more} more"
        characters = f"{len(found)} different character{'s' * (len(found) > 1)} of the prompts"
        if self._embedded:
            return (
                f"the embedded model has learned no characters beyond ASCII, and these are "
                f"{characters}: {shown}. Its answers to them mean nothing before it is trained on "
                "them"
            )
        instead = self._tokenizer.decode(self._unknown).strip() or "nothing"
        return (
            f"the tokenizer of this model has no token for {characters}: {shown}. The model reads "
            f"{instead} in their place"
        )

    def tell_once(self, prompts: Iterable[Prompt], say: Callable[[str], None]) -> None:
        """Say which characters the model cannot read, the first time that there are some."""
        if not self._told and (line := self.describe(prompts)):
            self._told = True
            say(line)

    def _find(self, prompts: Iterable[Prompt]) -> list[str]:
        """Return the different characters that the model cannot read, in the order of their codes.

        Only the embedded model and a tokenizer with unknown characters need to see the texts.
        """
        if self._embedded:
            return sorted(
                {c for text in _texts(prompts) if not text.isascii() for c in text if c > "\x7f"}
            )
        if self._unknown is None:
            return []
        new = set[str]().union(*_texts(prompts)) - self._read
        lost = {c for c in new if not c.isspace() and self._encode(c) == self._unknown}
        self._read |= new - lost
        return sorted(lost)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def _texts(prompts: Iterable[Prompt]) -> Iterable[str]:
    for prompt in prompts:
        if isinstance(prompt, str):
            yield prompt
        else:
            # A message that calls a tool may have no text.
            yield from (m["content"] for m in prompt if isinstance(m.get("content"), str))
