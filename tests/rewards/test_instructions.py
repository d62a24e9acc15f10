"""Each instruction of IFEval with texts that follow it and texts that nearly do."""

# ruff: noqa: RUF001  Letters of other scripts that look like Latin ones are meant.

import time

import pytest

from textpolicy.errors import ConfigError
from textpolicy.rewards.verifiers import instructions_followed
from textpolicy.rewards.verifiers.instructions.checkers import CHECKERS, KINDS
from textpolicy.rewards.verifiers.instructions.following import check_instructions
from textpolicy.rewards.verifiers.instructions.language import KNOWN, language_of
from textpolicy.rewards.verifiers.instructions.text_units import (
    count_capital_words,
    count_sentences,
    count_words,
)

LESS, LEAST = {"relation": "less than"}, {"relation": "at least"}
# An instruction, its arguments, texts that follow it, and near misses.
CASES = [
    ("keywords:existence", {"keywords": ["sun", "c++"]}, ["Sunny C++"], ["sun and c", "su n c++"]),
    (
        "keywords:frequency",
        {"keyword": "ha", "frequency": 3, **LEAST},
        ["Ha ha haha", "hahaha"],
        ["ha ha h a"],
    ),
    ("keywords:frequency", {"keyword": "ha", "frequency": 3, **LESS}, ["ha ha"], ["HA ha Ha"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["rain", "no"]},
        ["A raincoat, nobody knows."],
        ["Rain.", "I say NO!"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "L", "let_frequency": 4, "let_relation": "at least"},
        ["Lill l"],
        ["lull"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "less than"},
        ["# one"],
        ["## two"],
    ),
    (
        "language:response_language",
        {"language": "de"},
        ["Das ist nicht der Weg, den wir gehen.", "123"],
        ["Dit is niet de weg die wij gaan.", "This is not the way.", "Wxyz qqq"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, **LEAST},
        ["One. Two! Three?", 'He said "No." Then he left. It was 3.5 km.'],
        ["One. Two!", "Mr. Smith and Dr. Who met. They spoke, i.e. argued."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, **LESS},
        ["One.\nTwo", "1. Milk.\n2. Bread."],
        ["One. Two. Three"],
    ),
    ("length_constraints:number_words", {"num_words": 4, **LEAST}, ["a b-c d"], ["a b_c d"]),
    ("length_constraints:number_words", {"num_words": 3, **LESS}, ["two words"], ["don't go"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\none *** two\n***"],
        ["one\n\ntwo", "one *** *** two", "one\n***\ntwo\n***\nthree", ""],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        ["First this.\n\nthen, that.", "a\n\n'Then' b"],
        ["Then this.\n\nthat.", "a\n\nThen b\n\nc", "a\n\nThen-b", "a\nThen b"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] of [town]", "[[a] b] [c]"],
        ["[name] (town)", "[name of\ntown]", "[a"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. Write!", "p. s. more"],
        ["Bye. PS Write!", "P.S more"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["P.P.S Again", "p. p. s."],
        ["P.S. Again"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b", "text\n* a\n- b"],
        ["* a", "* a\n** b", "* a\n* b\n* c", "1. a\n2. b"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is no.", "Well: My answer is maybe. Sorry"],
        ["My answer is no", "my answer is yes.", "Yes."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and *two*", "**bold** *one*"],
        ["*one* and two", "* *\n*one*", "*one\ntwo*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION1 SECTION2"],
        ["Section 1\nSECTION 2", "SECTION a SECTION 1"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n3\n```"],
        ["{'a': 1}", 'Sure: {"a": 1}', '{"a": 1', "[" * 200_000],
    ),
    (
        "detectable_format:title",
        {},
        ["<<Joy>>\ntext", "a << b >>"],
        ["<Joy>", "<< >>", "<<Joy\n>>"],
    ),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo", "******one******two******"],
        ["one ***** two", "one ****** one", "a****** ******b", "a******b******c"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Why is it so?"},
        ["  why is it so? Because."],
        ["Sure. Why is it so? Because.", "Why is it so. Because."],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Any questions?"},
        ["Done. any questions?", '"Done. Any questions?"\n'],
        ["Any questions? No.", "Any questions"],
    ),
    ("startend:quotation", {}, ['"All of it."', ' "" '], ['"All" of it', "“All of it.”", '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": "at least"},
        ["GO TO WELL-KNOWN places", "A B C"],
        ["GO TO Paris", "WELL-KNOWN-PLACE x"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["ONE Two"],
        ["ONE TWO"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THIS IS THE WAY.", "1. GO!"],
        ["THIS IS The WAY.", "DAS IST NICHT DER WEG.", "123"],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["this is the way, and not that."],
        ["this is The way.", "das ist nicht der weg."],
    ),
    ("punctuation:no_comma", {}, ["No comma; none. 、"], ["One, two"]),
]


def strictly(text, id, arguments):
    (found,) = instructions_followed(text, [id], [arguments]).strict
    return found


@pytest.mark.parametrize(("id", "arguments", "hits", "misses"), CASES)
def test_texts_that_follow_an_instruction_are_told_from_those_that_nearly_do(
    id, arguments, hits, misses
):
    assert [text for text in hits if not strictly(text, id, arguments)] == []
    assert [text for text in misses if strictly(text, id, arguments)] == []


def test_all_25_public_instructions_have_cases_and_follow_no_empty_text():
    assert len(CHECKERS) == 25 == len({id for id, *_ in CASES})
    assert not any(strictly(" \n", id, arguments) for id, arguments, *_ in CASES)


def test_loose_accuracy_leaves_out_lines_at_the_ends_and_asterisks():
    ids, no_arguments = ["startend:quotation", "punctuation:no_comma"], [{}, {}]
    found = instructions_followed('Sure, here it is:\n**"All of it."**', ids, no_arguments)
    assert (found.strict, found.loose) == ([False, False], [True, True])
    found = instructions_followed('Sure\n"All"\nBye', ids[:1], [{}])
    assert (found.strict, found.loose) == ([False], [True])
    found = instructions_followed('Sure\nso\n"All"', ids[:1], [{}])
    assert (found.strict, found.loose) == ([False], [False])


def test_arguments_are_as_tables_hold_them():
    given = {"num_words": 2.0, "relation": "at least", "keywords": None, "language": None}
    assert strictly("two words", "length_constraints:number_words", given)


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (["punctuation:no_coma"], [{}], "Did you mean 'punctuation:no_comma'"),
        (["length_constraints:number_words"], [{"relation": "at least"}], "num_words is None; exp"),
        (
            ["length_constraints:number_words"],
            [{"num_words": -1, "relation": "at most"}],
            "num_words is -1; .*relation is 'at most'; expected one of less than, at least",
        ),
        (["language:response_language"], [{"language": "tlh"}], "expected one of ar, bg, bn"),
        (["keywords:existence"], [{"keywords": "sun"}], "expected a list of texts"),
        (["keywords:letter_frequency"], [{"letter": "ab"}], "expected one character"),
        (["punctuation:no_comma"], [], "expected two lists of one length"),
        ([], [], "expected two lists of one length"),
        (["punctuation:no_comma"], [None], "expected a mapping"),
        ([3], [{}], "no instruction 3"),
    ],
)
def test_rows_that_cannot_be_checked_are_refused(ids, arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_instructions(ids, arguments)


SENTENCES = {
    "en": "There is no easy way to learn it, but you have to begin with the first step.",
    "es": "No hay una manera fácil de aprender esto, pero hay que empezar con el primer paso.",
    "pt": "Não há uma maneira fácil de aprender isso, mas é preciso começar com o primeiro passo.",
    "fr": "Il n'y a pas de moyen facile pour apprendre cela, mais il faut faire le premier pas.",
    "de": "Es gibt keinen leichten Weg, das zu lernen, und der erste Schritt ist nicht der letzte.",
    "it": "Non è facile imparare questa cosa, ma si deve fare il primo passo con gli altri.",
    "pl": "Nie jest łatwo się tego nauczyć, ale trzeba zrobić pierwszy krok.",
    "vi": "Không có cách nào dễ dàng để học điều này, và bạn phải bắt đầu với bước đầu tiên.",
    "fi": "Sitä ei ole helppo oppia, mutta on otettava ensimmäinen askel ja jatkettava.",
    "sw": "Si rahisi kujifunza jambo hili, na ni lazima kuanza kwa hatua ya kwanza.",
    "ru": "Это не легко выучить, но все начинают с первого шага.",
    "uk": "Це не легко вивчити, але всі починають з першого кроку, і він є важким.",
    "bg": "Това не е лесно да се научи, но всички започват с първата стъпка.",
    "hi": "यह सीखना आसान नहीं है, लेकिन पहला कदम उठाना होगा और आगे बढ़ना होगा।",
    "mr": "हे शिकणे सोपे नाही, पण पहिले पाऊल उचलावे लागते आणि पुढे जावे लागते आहे.",
    "ne": "यो सिक्न सजिलो छैन, तर पहिलो पाइला चाल्नु पर्छ र अगाडि बढ्नु पनि छ।",
    "ar": "ليس من السهل أن تتعلم هذا، ولكن يجب أن تبدأ الخطوة الأولى في هذه المدينة.",
    "fa": "یاد گرفتن این کار آسان نیست، اما باید از قدم اول شروع کرد و ژرف دید.",
    "ur": "یہ سیکھنا آسان نہیں ہے، لیکن پہلا قدم اٹھانا ہو گا اور آگے بڑھنا ہے۔",
    "ja": "これを学ぶのは簡単ではありませんが、最初の一歩を踏み出す必要があります。",
    "zh": "学习并不容易，但必须迈出第一步。",
    "ko": "이것을 배우는 것은 쉽지 않지만 첫걸음을 내디뎌야 합니다.",
    "th": "ไม่มีวิธีง่ายๆ ในการเรียนรู้สิ่งนี้",
    "bn": "এটি শেখা সহজ নয়, কিন্তু প্রথম পদক্ষেপ নিতে হবে।",
    "ta": "இதைக் கற்றுக்கொள்வது எளிதல்ல.",
    "te": "దీన్ని నేర్చుకోవడం సులభం కాదు.",
    "kn": "ಇದನ್ನು ಕಲಿಯುವುದು ಸುಲಭವಲ್ಲ.",
    "ml": "ഇത് പഠിക്കുന്നത് എളുപ്പമല്ല.",
    "gu": "આ શીખવું સહેલું નથી.",
    "pa": "ਇਹ ਸਿੱਖਣਾ ਸੌਖਾ ਨਹੀਂ ਹੈ।",
    "he": "לא קל ללמוד את זה.",
    "el": "Δεν είναι εύκολο να το μάθεις.",
}


def test_every_language_is_found_in_a_sentence_of_it():
    assert SENTENCES.keys() == KNOWN
    assert {code: language_of(text) for code, text in SENTENCES.items()} == {
        code: code for code in SENTENCES
    }
    assert [language_of(text) for text in ("", "123 !?", "Wxyz qqq", "ᚠᚢᚦ")] == [None] * 4


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("One", 1),
        ("One. Two", 2),
        ("Really?! Yes.", 2),
        ('"Stop!" he said. (He meant it.) Then: nothing.', 4),
        ("At 5 p.m. we met Mrs. J. R. Smith of Acme Inc. in the U.S. for talks.", 1),
        ("It costs 3.50. Then 5. Then more.", 3),
        ("Wait... what? Wait... Now.", 3),
        ("これは一つ。これは二つ！三つ", 3),
        ("See https://a.b/c.d?e for it. Good.", 2),
    ],
)
def test_sentences_are_counted(text, count):
    assert count_sentences(text) == count


def test_words_are_runs_of_letters_and_capital_words_may_have_hyphens():
    assert count_words("don't well-known x_1 — 3.5") == 7
    assert count_capital_words("I SAW a UFO-LIKE thing, OK? X2 and 42, DON'T") == 6


@pytest.mark.parametrize(
    "text",
    ["*" * 200_000, "[" * 200_000, "<<" * 100_000, "\n" * 200_000, "a. " * 70_000, "- \n" * 70_000],
)
def test_no_text_takes_long(text):
    ids = [id for id, *_ in CASES]
    started = time.process_time()
    instructions_followed(text, ids, [arguments for _, arguments, *_ in CASES])
    assert time.process_time() - started < 8


def test_every_kind_of_argument_has_words():
    assert {kind for checker in CHECKERS.values() for kind in checker.needs.values()} == set(KINDS)
