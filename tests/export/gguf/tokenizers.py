"""Byte-level tokenizers with each pre-tokenizer that llama.cpp has a name for, and odd texts."""

import json
import random
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from textpolicy.export.gguf import pretokenizers

# As Qwen's, a plain token that is added, and as DeepSeek's, a control token of wide letters.
PLAIN, WIDE = "<tool_call>", "<\uff5cUser\uff5c>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Letters of all kinds, digits, marks, spaces and line breaks of all kinds, controls, emoji.
_LETTERS = (
    "aAbBsStTdDmM'\u2019  \n\r\t.,!?/-_()<>#1239\u0663\u00b2\u00bd\u00c9\u00e9\u00fc\u00df\u00f1"
    "\u65e5\u672c\u4e2d\u6587\uae00\u03b1\u03a9\u0416\u0436\u01c5\u02b0\u00aa\u0915\u094d\u0937\u093f"
    "\u0301\u200d\u00a0\u2028\u3000\x85\x00\x7f\U0001f642\U0001f44d"
)
_WORDS = ["it's", "I'LL", "don't", "1234567", "hello", "World", "  ", "\n\n", "x=1", "...", "'S"]


def odd_texts(count: int) -> list[str]:
    """Return texts of odd letters and words, the same in every run."""
    dice = random.Random(0)
    parts = [_LETTERS] * 3 + [_WORDS]
    return ["".join(dice.choices(dice.choice(parts), k=dice.randint(1, 24))) for _ in range(count)]


def tokenizer_with(
    name: str, *, begin: str | None = None, normalizer: Any = None
) -> TokenizerWrapper:
    """Return a tokenizer with the pre-tokenizer of a name, which writes `begin` before a text."""
    steps, whole = next((s, w) for s, w, known in pretokenizers._TABLE if known == name)
    definition = json.loads(Tokenizer(models.BPE(ignore_merges=whole)).to_str())
    definition["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            step | ({"trim_offsets": True} if step["type"] == "ByteLevel" else {}) for step in steps
        ],
    }
    backend = Tokenizer.from_str(json.dumps(definition))
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        odd_texts(2000),
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False),
    )
    backend.add_special_tokens([*SPECIAL, WIDE])
    backend.add_tokens([AddedToken(PLAIN, special=False)])
    if normalizer:
        backend.normalizer = normalizer
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    return TokenizerWrapper(
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=SPECIAL[0],
            eos_token=SPECIAL[2],
            clean_up_tokenization_spaces=False,
        )
    )
