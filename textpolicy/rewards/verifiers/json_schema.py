"""Read JSON in completions strictly, and check JSON against a schema.

The schema language is a bounded part of JSON Schema. The package `jsonschema` is not used, because
it follows references to other documents, runs `pattern` in an engine that can hang, and needs four
more packages. A keyword that is not known here is an error.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.rewards.verifiers.text_answers import pattern_match

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
_NESTED = {"properties", "required", "additionalProperties", "items", "allOf"}


def read_json(text: str) -> Any:
    """Return the value of a JSON text, which may have a fence of ``` around it; raise ValueError.

    NaN, infinity, a repeated key in an object, and more than 64 levels of nesting are refused.
    """
    text = text.strip()
    if (fence := re.match(r"```[a-z]*\n", text)) and text.endswith("```"):
        text = text[fence.end() : -3].strip()
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"the text is longer than {_MAX_LENGTH} characters")
    if _nesting_depth(text) > _MAX_DEPTH:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    return json.loads(
        text,
        parse_constant=_parse_finite,
        parse_float=_parse_finite,
        object_pairs_hook=_make_object,
    )


def json_match(completion: str, schema: Schema) -> bool:
    """Return whether the completion is JSON that fits the schema."""
    return next(json_problems(completion, schema), None) is None


def json_problems(completion: str, schema: Schema) -> Iterator[str]:
    """Yield each reason why the completion does not fit the schema, with its place in the JSON.

    The known keywords are type, enum, const, properties, required, additionalProperties,
    minProperties, maxProperties, items, minItems, maxItems, uniqueItems, minLength, maxLength,
    pattern, minimum, maximum, exclusiveMinimum, exclusiveMaximum, multipleOf, allOf, anyOf, oneOf
    and not.
    """
    _check_keywords(schema)
    try:
        value = read_json(completion)
    except ValueError as error:
        yield f"not JSON: {error}"
        return
    yield from _problems(value, schema, "$")


def _check_keywords(schema: Schema, depth: int = 0) -> None:
    """Raise `ConfigError` for an unknown keyword, or for a schema that is nested too deep."""
    if isinstance(schema, bool):
        return
    if depth > _MAX_DEPTH:
        raise ConfigError(f"the schema is nested too deep; expected at most {_MAX_DEPTH} levels")
    unknown = sorted(set(schema) - set(_LIMITS) - _NESTED - _ANNOTATIONS)
    if unknown:
        raise ConfigError(
            f"the schema has the unknown keywords {', '.join(unknown)}; "
            f"known keywords are {', '.join(sorted(_NESTED | set(_LIMITS)))}"
        )
    inner: list[Schema] = [*schema.get("properties", {}).values()]
    inner += [s for key in ("allOf", "anyOf", "oneOf") for s in schema.get(key, ())]
    inner += [schema[key] for key in ("items", "not", "additionalProperties") if key in schema]
    for subschema in inner:
        _check_keywords(subschema, depth + 1)


def _problems(value: Any, schema: Schema, place: str) -> Iterator[str]:
    """Yield each reason why the value at `place` does not fit the schema."""
    if isinstance(schema, bool):
        if not schema:
            yield f"{place}: nothing is allowed here"
        return
    for keyword, limit in schema.items():
        if keyword in _LIMITS:
            types, is_within = _LIMITS[keyword]
            limited = types is None or (isinstance(value, types) and not isinstance(value, bool))
            if limited and not is_within(value, limit):
                yield f"{place}: {_shown(value)} violates {keyword} {_shown(limit)}"
    for inner in schema.get("allOf", ()):
        yield from _problems(value, inner, place)
    yield from _member_problems(value, schema, place)


def _member_problems(value: Any, schema: Mapping[str, Any], place: str) -> Iterator[str]:
    """Yield each reason why a member of an object or array does not fit the schema."""
    if isinstance(value, dict):
        missing = [name for name in schema.get("required", ()) if name not in value]
        yield from (f"{place}: {name!r} is missing" for name in missing)
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for name, item in value.items():
            yield from _problems(item, properties.get(name, others), f"{place}.{name}")
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            yield from _problems(item, schema["items"], f"{place}[{number}]")


def _has_type(value: Any, names: str | Sequence[str]) -> bool:
    for name in [names] if isinstance(names, str) else names:
        whole = name == "integer" and isinstance(value, float) and value.is_integer()
        # Python's bool is an int, and JSON's true is not an integer.
        if whole or (
            isinstance(value, _TYPES[name]) and isinstance(value, bool) == (name == "boolean")
        ):
            return True
    return False


def _count_fitting(value: Any, schemas: Sequence[Schema]) -> int:
    return sum(next(_problems(value, schema, ""), None) is None for schema in schemas)


def _sorted_json(value: Any) -> str:
    """Return a text that is the same for values that are equal as JSON, where true is not 1."""
    return json.dumps(value, sort_keys=True)


_NUMBER, _TEXT, _LIST, _OBJECT = (int, float), (str,), (list,), (dict,)
_LIMITS: dict[str, tuple[tuple[type, ...] | None, Callable[[Any, Any], bool]]] = {
    "type": (None, _has_type),
    "enum": (None, lambda value, choices: _sorted_json(value) in map(_sorted_json, choices)),
    "const": (None, lambda value, other: _sorted_json(value) == _sorted_json(other)),
    "anyOf": (None, lambda value, schemas: _count_fitting(value, schemas) >= 1),
    "oneOf": (None, lambda value, schemas: _count_fitting(value, schemas) == 1),
    "not": (None, lambda value, schema: _count_fitting(value, [schema]) == 0),
    "minProperties": (_OBJECT, lambda value, limit: len(value) >= limit),
    "maxProperties": (_OBJECT, lambda value, limit: len(value) <= limit),
    "minItems": (_LIST, lambda value, limit: len(value) >= limit),
    "maxItems": (_LIST, lambda value, limit: len(value) <= limit),
    "uniqueItems": (
        _LIST,
        lambda value, on: not on or len({*map(_sorted_json, value)}) == len(value),
    ),
    "minLength": (_TEXT, lambda value, limit: len(value) >= limit),
    "maxLength": (_TEXT, lambda value, limit: len(value) <= limit),
    "pattern": (_TEXT, lambda value, pattern: pattern_match(value, pattern)),
    "minimum": (_NUMBER, operator.ge),
    "maximum": (_NUMBER, operator.le),
    "exclusiveMinimum": (_NUMBER, operator.gt),
    "exclusiveMaximum": (_NUMBER, operator.lt),
    "multipleOf": (_NUMBER, lambda value, step: math.remainder(value, step) == 0),
}
"""Each keyword with the types of values that it limits (None: all) and a test of one value."""


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _nesting_depth(text: str) -> int:
    """Return how deep the brackets outside strings nest, without the recursion of a parser."""
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


def _parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return value
