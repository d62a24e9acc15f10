"""A notice says which characters a model cannot read, and says nothing of any other character."""

import time

import pytest

from tests.tokenizers import KINDS, make_tokenizer

READS_ALL = ["chatml", "llama3", "stripping", "unmarked", "byte fallback"]
# Letters with and without their own accents, ligatures, full width, an emoji with a joiner.
HARD = "ö o\u0308 ﬁ \uff21 1\u00a02 日本 👩\u200d💻 ▁ \u3000\ufeff\x00 ½"


@pytest.fixture(scope="module")
def unread():
    from textpolicy.generation.unread_characters import UnreadCharacters

    return UnreadCharacters


@pytest.mark.parametrize("kind", READS_ALL)
def test_a_tokenizer_with_a_token_for_each_byte_reads_every_character(unread, kind):
    assert unread(make_tokenizer(kind)).describe([HARD, *map(chr, range(0x20, 0x250))]) is None


@pytest.mark.parametrize(
    ("kind", "text", "shown"),
    [
        # NFKC makes known letters of the ligature and of the letter of full width.
        (
            "unigram",
            "user ﬁ \uff41 日本",
            "2 different characters of the prompts: 日 本. The model reads <unk>",
        ),
        # BERT drops accents and writes small letters.
        (
            "wordpiece",
            "HELLO ö o\u0308 é 日",
            "1 different character of the prompts: 日. The model reads [UNK]",
        ),
    ],
)
def test_only_characters_that_become_the_unknown_token_are_named(unread, kind, text, shown):
    prompts = ["user", [{"role": "user", "content": text}, {"role": "assistant", "content": None}]]
    assert shown in unread(make_tokenizer(kind)).describe(prompts)


def test_a_tokenizer_that_leaves_unknown_characters_out_is_named_too(unread):
    assert unread(dropping_tokenizer()).describe(["ab 日 ab"]) == (
        "the tokenizer of this model has no token for 1 different character of the prompts: 日. "
        "The model reads nothing in their place"
    )


def dropping_tokenizer():
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def test_many_characters_are_counted_and_shown_in_part(unread):
    text = "".join(map(chr, range(0x4E00, 0x4E20)))
    line = unread(make_tokenizer("unigram")).describe([text])
    shown = " ".join(text[:10])
    assert f"for 32 different characters of the prompts: {shown} and 22 more. The" in line


def test_the_embedded_model_names_what_it_never_learned(unread, load_tiny):
    _, tokenizer = load_tiny()
    notice = unread(tokenizer)
    assert notice.describe(["sort 31", "Hello, ~{}"]) is None
    line = notice.describe(["Größe 日本"])
    assert "4 different characters of the prompts: ß ö 日 本. Its answers" in line
    said = []
    for prompt in ("sort 31", "Größe", "日本"):
        notice.tell_once([prompt], said.append)
    assert len(said) == 1 and "ß ö" in said[0]


@pytest.mark.parametrize("kind", ["chatml", "unigram"])
def test_a_hundred_thousand_rows_take_no_noticeable_time(unread, kind):
    rows = [f"the user said hello to you {number} times" for number in range(100_000)]
    notice = unread(make_tokenizer(kind))
    started = time.process_time()
    notice.describe(rows)
    assert time.process_time() - started < 2.0


def test_every_kind_of_tokenizer_is_one_of_those_above():
    assert {*READS_ALL, "unigram", "wordpiece"} == set(KINDS)
