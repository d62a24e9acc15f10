"""Stop strings end a row at the token that completes them, in a time that does not grow."""

import random

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from textpolicy.generation.prompts import decode_text
from textpolicy.generation.stop_rules import StopAtStrings
from textpolicy.types import StopReason

PIECES = ["a", "b", " b", "  ", "ab", "ba", " ", " a", "é", "日本", "本", "\n", "🙂", "b🙂a", "."]


def byte_fallback_tokenizer() -> TokenizerWrapper:
    """Return a tokenizer as Llama 2 has it: spaces as ▁, rare characters as bytes."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "a", "b", "ab", "▁b", "日", "."]
    pieces = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    inner = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    return TokenizerWrapper(tokenizer)


def word_piece_tokenizer(*, cleans_up: bool) -> TokenizerWrapper:
    """Return a tokenizer as BERT has it: a token in the middle of a word has another text alone."""
    words = ["[UNK]", "</s>", "a", "b", "ab", "do", "n", "n't", "t", "'", "."]
    vocabulary = {word: number for number, word in enumerate([*words, "##a", "##b", "##ab"])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        eos_token="</s>",
        clean_up_tokenization_spaces=cleans_up,
    )
    return TokenizerWrapper(tokenizer)


@pytest.fixture(scope="module")
def tokenizers(load_tiny):
    pieces = [word_piece_tokenizer(cleans_up=cleans_up) for cleans_up in (False, True)]
    return [load_tiny()[1], byte_fallback_tokenizer(), *pieces]


def first_stop(tokenizer, tokens, strings):
    """The rule by its definition: the whole text is decoded after each token."""
    for end in range(1, len(tokens) + 1):
        if tokens[end - 1] in tokenizer.eos_token_ids:
            return end, StopReason.STOP_TOKEN
        if any(string in decode_text(tokenizer, tokens[:end]) for string in strings):
            return end, StopReason.STOP_STRING
    return None


def first_stop_of_rule(tokenizer, tokens, strings):
    rule = StopAtStrings(tokenizer, strings)
    for end in range(1, len(tokens) + 1):
        if reason := rule(tokens[:end]):
            return end, reason
    return None


def random_tokens(rng, tokenizer, choices):
    """Pieces of text, and between them single tokens, which may be half a character or special."""
    tokens: list[int] = []
    while len(tokens) < 40:
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 4)))
        tokens += tokenizer.encode(text, add_special_tokens=False)
        if rng.random() < 0.4:
            tokens += rng.choices(choices, k=rng.choice([1, 1, 3]))
    return tokens


@pytest.mark.parametrize(("which", "late"), [(0, 10), (1, 10), (2, 3), (3, 3)])
def test_a_row_ends_at_the_token_at_which_its_whole_text_has_a_stop_string(tokenizers, which, late):
    tokenizer, rng = tokenizers[which], random.Random(which)
    usable = [t for t in range(len(tokenizer)) if t not in tokenizer.eos_token_ids]
    found = []
    for _ in range(150):
        tokens = random_tokens(rng, tokenizer, usable)
        strings = [
            "".join(rng.choices(PIECES, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 2))
        ]
        expected = first_stop(tokenizer, tokens, strings)
        assert first_stop_of_rule(tokenizer, tokens, strings) == expected, (tokens, strings)
        found.append(expected)
    assert sum(one is None for one in found) > 10
    assert sum(one is not None and one[0] > 20 for one in found) > late


def test_a_string_that_ends_in_the_middle_of_a_word_ends_a_row(tokenizers):
    words = tokenizers[2]
    tokens = words.convert_tokens_to_ids(["b", "a", "##b", "##ab", "."])
    assert first_stop_of_rule(words, tokens, ["bb"]) is None
    assert first_stop_of_rule(words, tokens, ["abab"]) == (4, StopReason.STOP_STRING)
    assert first_stop_of_rule(words, tokens, ["bab"]) == (4, StopReason.STOP_STRING)


def test_a_token_that_removes_a_space_before_it_ends_a_row(tokenizers):
    plain, cleaning = tokenizers[2:]
    tokens = plain.convert_tokens_to_ids(["do", "n't"])
    assert first_stop_of_rule(plain, tokens, ["don"]) is None
    assert first_stop_of_rule(cleaning, tokens, ["don"]) == (2, StopReason.STOP_STRING)


def test_a_string_in_the_middle_of_a_token_and_one_over_many_tokens_end_a_row(tokenizers):
    tokenizer = tokenizers[1]
    text = [tokenizer.convert_tokens_to_ids(piece) for piece in ("▁b", "ab", "a")]
    assert first_stop_of_rule(tokenizer, text[1:], ["b"]) == (1, StopReason.STOP_STRING)
    smiling = tokenizer.encode("🙂", add_special_tokens=False)[-4:]
    assert first_stop_of_rule(tokenizer, [*smiling, *smiling], ["🙂🙂"]) == (
        8,
        StopReason.STOP_STRING,
    )
    assert first_stop_of_rule(tokenizer, [*smiling, *smiling[:3]], ["🙂🙂"]) is None


@pytest.mark.parametrize("string", ["é🙂", "🙂é🙂", "日é", "é"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_string_after_many_characters_of_several_tokens_ends_a_row(tokenizers, which, string):
    tokenizer = tokenizers[which]
    for before in range(5):
        text = "é" * before + "🙂" * 12 + string
        tokens = tokenizer.encode(text, add_special_tokens=False)
        expected = first_stop(tokenizer, tokens, [string])
        assert first_stop_of_rule(tokenizer, tokens, [string]) == expected != None  # noqa: E711


def test_special_tokens_inside_a_stop_string_have_no_text(load_tiny):
    _, tokenizer = load_tiny()
    (special,) = set(tokenizer.all_special_ids) - tokenizer.eos_token_ids
    first, last = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")
    tokens = [first, *[special] * 50, last]
    assert first_stop_of_rule(tokenizer, tokens, ["ab"]) == (52, StopReason.STOP_STRING)


def test_the_number_of_tokens_that_are_decoded_does_not_grow_with_the_text(load_tiny):
    _, tokenizer = load_tiny()
    lengths = []

    class Counting(TokenizerWrapper):
        def decode(self, tokens, **options):
            lengths.append(len(tokens))
            return tokenizer.decode(tokens, **options)

    rule = StopAtStrings(Counting(tokenizer._tokenizer), ["zz", "stop via"])
    letter = tokenizer.encode("a", add_special_tokens=False)
    assert rule(letter * 40) is rule(letter * 4000) is None
    alone, twice, *windows = lengths
    assert (alone, twice) == (1, 2) and windows[0] == windows[1] < 20


def test_nothing_is_decoded_after_a_token_in_which_no_string_can_end(load_tiny):
    _, tokenizer = load_tiny()
    decoded = []

    class Counting(TokenizerWrapper):
        def decode(self, tokens, **options):
            decoded.append(tokens)
            return tokenizer.decode(tokens, **options)

    rule = StopAtStrings(Counting(tokenizer._tokenizer), ["zz", "stop here"])
    letter = tokenizer.encode("a", add_special_tokens=False)
    for length in range(1, 50):
        assert rule(letter * length) is None
    assert decoded == [letter, letter * 2]
