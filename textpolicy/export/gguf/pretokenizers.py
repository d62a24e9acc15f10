"""The pre-tokenizers that llama.cpp has a name for, by their definitions in tokenizer.json.

A pre-tokenizer cuts a text into the words that BPE merges within. llama.cpp holds each one as code
under a name, so a definition that is not in this table cannot be exported. The table has only those
that cut every text in the same way: llama.cpp's code for "tekken" (Mistral Nemo) and "gpt-4o" cuts
before combining marks, where these tokenizers do not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}"
_QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_GPT2 = [_BYTES | {"use_regex": True}]
_DIGITS = [{"type": "Digits", "individual_digits": True}, *_GPT2]


def _split(regex: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return [split, _BYTES | {"use_regex": False}]


# Steps, whether a word that is a token is kept whole (`ignore_merges`), and llama.cpp's name.
_TABLE: Sequence[tuple[list[dict[str, Any]], bool, str]] = (
    (_GPT2, False, "gpt-2"),
    (_DIGITS, False, "smollm"),
    (_split(_QWEN2), False, "qwen2"),
    (_split(_QWEN35), False, "qwen35"),
    (_split(_LLAMA3), True, "llama-bpe"),
    (_split(_LLAMA3), False, "smaug-bpe"),
)
PRE_TOKENIZERS = tuple(name for _, _, name in _TABLE)


def pre_tokenizer_name(definition: Mapping[str, Any] | None, *, ignore_merges: bool) -> str | None:
    """Return llama.cpp's name of a pre-tokenizer of a tokenizer.json, or None without a name."""
    steps = [_essence(step) for step in _steps(definition)]
    return next(
        (name for known, whole, name in _TABLE if known == steps and whole == ignore_merges), None
    )


def _steps(definition: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if definition is None:
        return []
    return definition["pretokenizers"] if definition["type"] == "Sequence" else [definition]


def _essence(step: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step without the options that change no token."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}
