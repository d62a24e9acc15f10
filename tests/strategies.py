"""What property tests draw: rollouts, JSON values, texts near a format, and how many examples."""

import math
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from textpolicy.types import Rollout, Sampling, StopReason, Turn

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=20)
# With half surrogate pairs, which a broken byte of a model or of a user's file may become.
ANY_TEXTS = st.text(st.characters(codec=None), max_size=20)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), FLOATS, ANY_TEXTS)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXTS, inner, max_size=4),
    max_leaves=8,
)
JSON_TABLES = st.dictionaries(ANY_TEXTS, JSON, max_size=4)


def examples(share: float) -> settings:
    """Return settings with a share of the profile's number of examples, for costly properties."""
    return settings(max_examples=max(1, round(share * settings().max_examples)))


def like(*fragments: str) -> st.SearchStrategy[str]:
    """Return texts of a format's fragments in any order, with other characters between them."""
    return st.lists(st.sampled_from(fragments) | st.characters(), max_size=30).map("".join)


JSON_LIKE = like(
    *'[]{}",:\n ',
    *["null", "true", "NaN", "-Infinity", "1e999", "1" * 400, "0.5", '"a"', '"\\ud800"', "\\u00"],
    *["[" * 70, '{"a":' * 70, '{"step": 1}', '{"step": 1e2}\n', "\ufeff", "\u2028", "9" * 5000],
)
TOML_LIKE = like(
    *"[]{}\"'=.,#\n ",
    *["[trainer]\n", "[run]\n", "lr = ", "steps = ", "options = ", "algorithm", "nan", "-inf"],
    *[
        "1979-05-27T07:32:00Z",
        "1979-13-40",
        "07:32:61",
        "0x",
        "1_0",
        "1e400",
        "9" * 400,
        "9" * 5000,
    ],
    *['"""', "'''", "\\u0000", "\\", "\r", "[" * 70, "a." * 70, "{a=" * 70, "[[a]]\n", "\ufeff"],
)


def same_number(one: Any, other: Any) -> bool:
    """Return whether two numbers are equal, of one type, or both NaN."""
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and one == other


TURNS = st.builds(
    Turn,
    completion=ANY_TEXTS,
    reward=FLOATS,
    replies=st.lists(st.fixed_dictionaries({"role": TEXTS, "content": ANY_TEXTS}), max_size=2),
)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.integers(1, 500),
    temperature=st.floats(0.1, 2),
    top_k=st.integers(0, 9),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=2).map(tuple),
)


@st.composite
def rollouts(draw: st.DrawFn, versions: st.SearchStrategy[int]) -> Rollout:
    """Return a rollout with a value in every field."""
    tokens = draw(
        st.lists(st.tuples(st.integers(0, 300), st.booleans(), st.floats(-9, 0)), max_size=6)
    )
    numbers = st.dictionaries(ANY_TEXTS, FLOATS, max_size=2)
    return Rollout(
        tokens=[token for token, _, _ in tokens],
        mask=[counted for _, counted, _ in tokens],
        logprobs=[logprob if counted else 0.0 for _, counted, logprob in tokens],
        completion=draw(ANY_TEXTS),
        reward=draw(st.none() | FLOATS),
        rewards=draw(numbers),
        metrics=draw(numbers),
        stop_reason=draw(st.sampled_from(StopReason)),
        sampling=draw(SAMPLINGS),
        version=draw(versions),
        error=draw(st.none() | ANY_TEXTS),
        turns=draw(st.lists(TURNS, max_size=2)),
    )
