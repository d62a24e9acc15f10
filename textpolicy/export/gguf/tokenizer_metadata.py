"""A tokenizer as the metadata of a GGUF file. Only byte-level BPE is supported."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.errors import ModelError
from textpolicy.export.gguf.gguf_package import Metadata
from textpolicy.export.gguf.pretokenizers import PRE_TOKENIZERS, pre_tokenizer_name
from textpolicy.untrusted.parsing import parse_json

# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Options of a BPE model that llama.cpp does not have, with the value that it computes by.
_PLAIN_BPE = {
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
}
_ADVICE = "Export the model in the format mlx or hf instead"


def tokenizer_metadata(tokenizer: TokenizerWrapper, vocabulary_size: int) -> Metadata:
    """Return the metadata by which llama.cpp makes the same tokens, for all ids of the model.

    Raise ModelError for a tokenizer that llama.cpp has no name for, or that it would treat
    differently. llama.cpp does not normalize text, and NFC is the only normalizer that is allowed:
    text that is in NFC, as nearly all text is, has the same tokens.
    """
    definition = _definition(tokenizer)
    _check(definition)
    model = definition["model"]
    ignore_merges = bool(model.get("ignore_merges"))
    name = pre_tokenizer_name(definition["pre_tokenizer"], ignore_merges=ignore_merges)
    if name is None:
        raise ModelError(
            "llama.cpp has no name for the pre-tokenizer of this tokenizer (ignore_merges is "
            f"{ignore_merges}): {str(definition['pre_tokenizer'])[:300]}. Known are "
            f"{', '.join(PRE_TOKENIZERS)}. {_ADVICE}"
        )
    tokens, types = _tokens(definition, vocabulary_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        **_special_tokens(tokenizer),
        **_added_ends(tokenizer),
    }
    if template := _chat_template(tokenizer):
        if "bos_token" in template and "tokenizer.ggml.bos_token_id" not in metadata:
            raise ModelError(
                "the chat template writes bos_token, which the tokenizer does not have; llama.cpp "
                "would write another token there. Name it in tokenizer_config.json, or take "
                "bos_token out of the chat template"
            )
        metadata["tokenizer.chat_template"] = template
    return metadata


def _definition(tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """Return the content of tokenizer.json as the tokenizer has it now."""
    inner = cast(Any, tokenizer)
    if not inner.is_fast:
        raise ModelError(
            f"the tokenizer is a {type(inner).__name__} without a tokenizer.json, and only "
            f"byte-level BPE with a tokenizer.json can be written to GGUF. {_ADVICE}"
        )
    return parse_json(inner.backend_tokenizer.to_str())


def _check(definition: Mapping[str, Any]) -> None:
    """Raise ModelError with everything that llama.cpp would do differently."""
    model, normalizer = definition["model"], definition["normalizer"]
    problems: list[str] = []
    if model["type"] != "BPE" or not _is_byte_level(definition):
        problems.append(f"its model is {model['type']}; only byte-level BPE can be written")
    problems += [
        f"its option {name} is {model[name]!r}"
        for name, plain in _PLAIN_BPE.items()
        if model.get(name, plain[0]) not in plain
    ]
    if normalizer is not None and normalizer != {"type": "NFC"}:
        problems.append(f"it normalizes text: {str(normalizer)[:200]}")
    problems += [
        f"its token {token['content']!r} has the option {option}"
        for token in definition["added_tokens"]
        for option in ("lstrip", "rstrip", "single_word")
        if token[option]
    ]
    if problems:
        raise ModelError(
            "llama.cpp would not make the same tokens as this tokenizer:\n  "
            + "\n  ".join(problems[:8])
            + f"\n{_ADVICE}"
        )


def _is_byte_level(definition: Mapping[str, Any]) -> bool:
    return (definition.get("decoder") or {}).get("type") == "ByteLevel"


def _tokens(definition: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of every id of the model."""
    vocabulary: Mapping[str, int] = definition["model"]["vocab"]
    added = definition["added_tokens"]
    texts = {number: text for text, number in vocabulary.items()}
    kinds = dict.fromkeys(texts, _NORMAL)
    for token in added:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    if (largest := max(texts)) >= size:
        raise ModelError(
            f"the tokenizer has the token {texts[largest]!r} with the id {largest}, and the model "
            f"has {size} tokens. Use the tokenizer of the model"
        )
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(size)]
    if len(set(tokens)) < size:
        raise ModelError(f"two tokens of the tokenizer have the same text. {_ADVICE}")
    return tokens, [kinds.get(number, _UNUSED) for number in range(size)]


def _special_tokens(tokenizer: TokenizerWrapper) -> dict[str, int]:
    """Return the ids of the tokens that llama.cpp begins, ends and pads a text with."""
    inner = cast(Any, tokenizer)
    if (end := inner.eos_token_id) is None:
        raise ModelError(
            "the tokenizer has no eos_token, and llama.cpp would take another token for it. Name "
            "it in tokenizer_config.json"
        )
    # llama.cpp knows three kinds of tokens that end an answer.
    others = sorted(set(inner.eos_token_ids) - {end})
    if len(others) > 2:
        raise ModelError(
            f"the model stops at {len(others) + 1} tokens, and a GGUF file names at most 3: "
            f"{[end, *others]}. {_ADVICE}"
        )
    ids = {
        "bos": inner.bos_token_id,
        "eos": end,
        "eot": others[0] if others else None,
        "eom": others[1] if others[1:] else None,
        "unknown": inner.unk_token_id,
        "padding": inner.pad_token_id,
    }
    return {f"tokenizer.ggml.{name}_token_id": n for name, n in ids.items() if n is not None}


def _added_ends(tokenizer: TokenizerWrapper) -> dict[str, bool]:
    """Return whether the tokenizer puts its bos before a text, and its eos behind."""
    inner = cast(Any, tokenizer)
    bare = list(inner.encode("a", add_special_tokens=False))
    full = list(inner.encode("a", add_special_tokens=True))
    begin, end = [inner.bos_token_id], [inner.eos_token_id]
    for first, last in ((False, False), (True, False), (False, True), (True, True)):
        if full == [*(begin if first else []), *bare, *(end if last else [])]:
            return {"tokenizer.ggml.add_bos_token": first, "tokenizer.ggml.add_eos_token": last}
    raise ModelError(
        f"the tokenizer writes {full} for {bare}, which is more than its bos and eos around the "
        f"text. {_ADVICE}"
    )


def _chat_template(tokenizer: TokenizerWrapper) -> str | None:
    template: str | Mapping[str, str] | Sequence[Any] | None = cast(Any, tokenizer).chat_template
    return template.get("default") if isinstance(template, Mapping) else cast(Any, template)
