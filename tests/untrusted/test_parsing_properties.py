"""Any bytes give a value or one of our errors, and what json writes is read back equal."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import ANY_TEXTS, JSON, JSON_LIKE, TOML_LIKE
from textpolicy.errors import UnreadableError
from textpolicy.untrusted.bounds import MAX_DEPTH, MAX_MESSAGE_CHARACTERS
from textpolicy.untrusted.files import read_utf8
from textpolicy.untrusted.parsing import parse_json, parse_toml, read_json_file, read_toml_file
from textpolicy.untrusted.terminal import terminal_message, terminal_safe

ANY_BYTES = st.binary(max_size=60) | JSON_LIKE.map(lambda text: text.encode(errors="replace"))


def depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    parts = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, parts), default=0)


@given(JSON_LIKE | ANY_TEXTS | ANY_BYTES)
@example("[" * 100_000)
@example("[NaN]")
@example("1e999")
@example(('{"a":' * 65 + "1" + "}" * 65).encode("utf-16"))
def test_any_text_is_json_of_bounded_depth_or_a_value_error(text):
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert depth(value) <= MAX_DEPTH
    json.dumps(value, allow_nan=False)


@given(JSON_LIKE | ANY_BYTES)
def test_json_with_constants_is_read_or_refused_too(text):
    with suppress(ValueError):
        assert depth(parse_json(text, constants=True)) <= MAX_DEPTH


@given(JSON, st.booleans(), st.sampled_from([None, 2]))
def test_json_is_read_back_equal(value, as_bytes, indent):
    text = json.dumps(value, indent=indent)
    assert parse_json(text.encode() if as_bytes else text) == value


@given(st.integers(1, 2 * MAX_DEPTH), st.booleans())
def test_json_is_refused_exactly_above_the_greatest_depth(levels, lists):
    text = "[" * levels + "]" * levels if lists else '{"":' * levels + "0" + "}" * levels
    try:
        assert depth(parse_json(text)) == levels <= MAX_DEPTH
    except ValueError:
        assert levels > MAX_DEPTH


@given(TOML_LIKE | ANY_TEXTS)
@example("a." * 3000 + "a = 1")
@example("a = " + "[" * 5000)
def test_any_text_is_toml_of_bounded_depth_or_a_value_error(text):
    with suppress(ValueError):
        assert depth(parse_toml(text)) <= MAX_DEPTH + 1


@given(ANY_BYTES | TOML_LIKE.map(lambda text: text.encode(errors="surrogatepass")))
def test_files_of_any_bytes_are_read_or_unreadable_by_name(tmp_path: Path, content: bytes):
    path = tmp_path / "file.any"
    path.write_bytes(content)
    for read in (read_utf8, read_json_file, read_toml_file):
        try:
            read(path)
        except UnreadableError as error:
            assert str(path) in str(error)


@given(st.binary(max_size=60), st.integers(0, 60))
def test_a_file_is_read_exactly_up_to_its_bound(tmp_path: Path, content: bytes, limit: int):
    path = tmp_path / "file.any"
    path.write_bytes(content)
    try:
        read_utf8(path, limit=limit)
    except UnreadableError as error:
        assert ("more than" in str(error)) == (len(content) > limit)
    else:
        assert len(content) <= limit


@given(ANY_TEXTS)
def test_text_for_a_terminal_is_printable_and_keeps_what_is_safe(text):
    safe = terminal_safe(text)
    assert all(char.isprintable() or char in "\n\t" or char.isspace() for char in safe)
    assert not set(safe) & {"\x1b", "\x9b", "\r", "\u202e", "\u2028", "\x7f"}
    assert terminal_safe(safe) == safe
    safe.encode()
    if text.isprintable():
        assert safe == text


@given(ANY_TEXTS, st.integers(1, 3000))
def test_a_message_for_a_terminal_is_bounded(text, times):
    # An escape has at most ten characters.
    assert len(terminal_message(text * times)) <= 10 * MAX_MESSAGE_CHARACTERS + 50
