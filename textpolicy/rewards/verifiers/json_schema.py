"""JSON in completions: read strictly, and held to a schema.

The schema language is a bounded part of JSON Schema, of our own rather than the `jsonschema`
package: that follows references to other documents, runs `pattern` in an engine that can hang, and
brings four packages. A keyword that is not known here is an error, never passed over.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.rewards.verifiers.regular_expressions import pattern_match

_MAX_LENGTH = 200_000
_MAX_DEPTH = 64

Schema = Mapping[str, Any] | bool
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_ANNOTATIONS = {"$schema", "$id", "$comment", "title", "description", "default", "examples"}


def read_json(text: str) -> Any:
    """The value of a JSON text, a fence of ``` around it aside; raises ValueError.

    Stricter than the standard library: no NaN or infinity, no key twice, at most _MAX_DEPTH levels.
    """
    text = _unfenced(text.strip())
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"longer than {_MAX_LENGTH} characters")
    if _depth(text) > _MAX_DEPTH:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    return json.loads(
        text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_without_twins
    )


def json_match(completion: str, schema: Schema) -> bool:
    """Whether the completion is JSON that fits the schema."""
    return next(json_problems(completion, schema), None) is None


def json_problems(completion: str, schema: Schema) -> Iterator[str]:
    """What keeps the completion from fitting the schema, each with its place; nothing if it does.

    Known are: type, enum, const, properties, required, additionalProperties, minProperties,
    maxProperties, items, minItems, maxItems, uniqueItems, minLength, maxLength, pattern, minimum,
    maximum, exclusiveMinimum, exclusiveMaximum, multipleOf, allOf, anyOf, oneOf and not.
    """
    check_schema(schema)
    try:
        value = read_json(completion)
    except ValueError as error:
        yield f"not JSON: {error}"
        return
    yield from _problems(value, schema, "$")


def check_schema(schema: Schema, depth: int = 0) -> None:
    """Raise `ConfigError` for a keyword that is not known here."""
    if isinstance(schema, bool):
        return
    unknown = sorted(set(schema) - set(_KEYWORDS) - _ANNOTATIONS - {"additionalProperties"})
    if unknown or depth > _MAX_DEPTH:
        raise ConfigError(
            f"the schema uses {', '.join(unknown) or f'more than {_MAX_DEPTH} levels'}; "
            f"known keywords are {', '.join(sorted(_KEYWORDS))}, additionalProperties"
        )
    for keyword, inner in schema.items():
        for below in _schemas_in(keyword, inner):
            check_schema(below, depth + 1)


def _schemas_in(keyword: str, inner: Any) -> list[Schema]:
    if keyword in ("items", "not", "additionalProperties"):
        return [inner]
    if keyword in ("allOf", "anyOf", "oneOf"):
        return list(inner)
    return list(inner.values()) if keyword == "properties" else []


def _problems(value: Any, schema: Schema, place: str) -> Iterator[str]:
    if isinstance(schema, bool):
        if not schema:
            yield f"{place}: nothing is allowed here"
        return
    for keyword, limit in schema.items():
        if keyword in _KEYWORDS:
            yield from _KEYWORDS[keyword](value, limit, place)
    if isinstance(value, dict) and "additionalProperties" in schema:
        for name in value.keys() - schema.get("properties", {}).keys():
            yield from _problems(value[name], schema["additionalProperties"], f"{place}.{name}")


def _holds(
    kinds: tuple[type, ...], holds: Callable[[Any, Any], bool]
) -> Callable[[Any, Any, str], Iterator[str]]:
    """A keyword that says something of values of these kinds, and nothing of others."""

    def check(value: Any, limit: Any, place: str) -> Iterator[str]:
        relevant = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
        if relevant and not holds(value, limit):
            yield f"{place}: {_shown(value)} breaks {_shown(limit)}"

    return check


def _type(value: Any, names: Any, place: str) -> Iterator[str]:
    names = [names] if isinstance(names, str) else names
    if not any(_is_of(value, name) for name in names):
        yield f"{place}: {_shown(value)} is not of type {' or '.join(names)}"


def _is_of(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name]) or (
        name == "integer" and isinstance(value, float) and value.is_integer()
    )


def _enum(value: Any, choices: Any, place: str) -> Iterator[str]:
    if not any(_same(value, choice) for choice in choices):
        yield f"{place}: {_shown(value)} is not one of {_shown(choices)}"


def _required(value: Any, names: Any, place: str) -> Iterator[str]:
    missing = [name for name in names if name not in value] if isinstance(value, dict) else []
    yield from (f"{place}: {name!r} is missing" for name in missing)


def _properties(value: Any, schemas: Any, place: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, schema in schemas.items():
            if name in value:
                yield from _problems(value[name], schema, f"{place}.{name}")


def _items(value: Any, schema: Any, place: str) -> Iterator[str]:
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _problems(item, schema, f"{place}[{number}]")


def _fitting(value: Any, schemas: Any) -> int:
    return sum(next(_problems(value, schema, ""), None) is None for schema in schemas)


def _all_of(value: Any, schemas: Any, place: str) -> Iterator[str]:
    for schema in schemas:
        yield from _problems(value, schema, place)


def _some_of(words: str, enough: Callable[[int], bool]) -> Callable[..., Iterator[str]]:
    def check(value: Any, schemas: Any, place: str) -> Iterator[str]:
        if not enough(_fitting(value, schemas)):
            yield f"{place}: {_shown(value)} fits {_fitting(value, schemas)} of them, not {words}"

    return check


def _not(value: Any, schema: Any, place: str) -> Iterator[str]:
    if _fitting(value, [schema]):
        yield f"{place}: {_shown(value)} fits what it must not"


def _same(left: Any, right: Any) -> bool:
    """Equal as JSON: true is not 1."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def _unique(value: Any, wanted: Any) -> bool:
    keys = sorted(json.dumps(item, sort_keys=True) for item in value)
    return not wanted or all(left != right for left, right in pairwise(keys))


_NUMBER, _TEXT, _LIST, _OBJECT = (int, float), (str,), (list,), (dict,)
_KEYWORDS: dict[str, Callable[[Any, Any, str], Iterator[str]]] = {
    "type": _type,
    "enum": _enum,
    "const": lambda value, constant, place: _enum(value, [constant], place),
    "required": _required,
    "properties": _properties,
    "items": _items,
    "allOf": _all_of,
    "anyOf": _some_of("at least one", lambda count: count >= 1),
    "oneOf": _some_of("exactly one", lambda count: count == 1),
    "not": _not,
    "minProperties": _holds(_OBJECT, lambda value, limit: len(value) >= limit),
    "maxProperties": _holds(_OBJECT, lambda value, limit: len(value) <= limit),
    "minItems": _holds(_LIST, lambda value, limit: len(value) >= limit),
    "maxItems": _holds(_LIST, lambda value, limit: len(value) <= limit),
    "uniqueItems": _holds(_LIST, _unique),
    "minLength": _holds(_TEXT, lambda value, limit: len(value) >= limit),
    "maxLength": _holds(_TEXT, lambda value, limit: len(value) <= limit),
    "pattern": _holds(_TEXT, lambda value, pattern: pattern_match(value, pattern)),
    "minimum": _holds(_NUMBER, lambda value, limit: value >= limit),
    "maximum": _holds(_NUMBER, lambda value, limit: value <= limit),
    "exclusiveMinimum": _holds(_NUMBER, lambda value, limit: value > limit),
    "exclusiveMaximum": _holds(_NUMBER, lambda value, limit: value < limit),
    "multipleOf": _holds(_NUMBER, lambda value, step: math.remainder(value, step) == 0),
}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _unfenced(text: str) -> str:
    fence = re.match(r"```[a-z]*\n", text)
    return text[fence.end() : -3].strip() if fence and text.endswith("```") else text


def _depth(text: str) -> int:
    """How deep the brackets nest, strings aside; a parser would find out by recursion."""
    deepest = depth = 0
    inside = escaped = False
    for char in text:
        if inside:
            inside, escaped = escaped or char != '"', char == "\\" and not escaped
        elif char == '"':
            inside = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > _MAX_DEPTH:
                break
        elif char in "]}":
            depth -= 1
    return deepest


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is beyond what a number can hold")
    return number


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return value
