"""Whether llama.cpp makes the same tokens of difficult texts as the tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast
from unicodedata import normalize

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.errors import ModelError
from textpolicy.export.gguf.llama_cpp import tokens_by_llama_cpp

# Accents, digits, several spaces and line breaks, contractions, CJK, emoji, control tokens.
DIFFICULT_TEXTS = (
    "Crème brûlée, naïve; it's 1,234,567 miles \N{EN DASH} isn't it? I'LL say",
    "  two spaces\n\n\n\tthree lines \r\n end   ",
    "日本語のテキスト、中文 and 한국어 ١٢٣ ²³",
    "🙂👍🏽 e\N{COMBINING ACUTE ACCENT} <|im_start|>user\nHi<|im_end|>\n<|endoftext|>x",
    "def f(x):\n    return x**2 # (a+b)!=c\n\n",
    "'s 't a's A'S x'Re\N{NO-BREAK SPACE}y\N{LINE SEPARATOR}z",
)


# llama.cpp does not normalise text.
CHECKED_TEXTS = [normalize("NFC", text) for text in DIFFICULT_TEXTS]


def compare_tokens_with_llama_cpp(path: Path, tokenizer: TokenizerWrapper) -> None:
    """Raise ModelError if llama.cpp, which must be installed, makes other tokens of some text."""
    require_equal_tokens(tokenizer, tokens_by_llama_cpp(path, CHECKED_TEXTS))


def require_equal_tokens(tokenizer: TokenizerWrapper, tokens: Sequence[list[int]]) -> None:
    """Raise ModelError if llama.cpp has made other tokens of `CHECKED_TEXTS`."""
    for text, found in zip(CHECKED_TEXTS, tokens, strict=True):
        expected = list(cast(list[int], tokenizer.encode(text)))
        if found != expected:
            raise ModelError(
                f"llama.cpp makes other tokens than the tokenizer of the text {text!r}: {found} "
                f"instead of {expected}. Export the model in the format mlx or hf instead"
            )
