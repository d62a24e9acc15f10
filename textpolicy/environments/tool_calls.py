"""Tools as models see them: schemas from signatures, calls found in text, arguments checked."""

import ast
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from textpolicy.errors import TaskError

Tool = Callable[..., Any]

_MAX_CALL_CHARACTERS = 4000
MAX_CALLS_PER_ANSWER = 16
_KINDS = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
    NoneType: "null",
}
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the model wrote it. `error` says why it cannot be made, if it cannot."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    error: str | None = None


ParseCalls = Callable[[str, Mapping[str, Tool]], list[ToolCall]]
"""The calls in an answer; none means that the answer is the final one."""


def tool_schema(tool: Tool) -> dict[str, Any]:
    """The tool's JSON schema, in the form that chat models are trained on.

    The description is the docstring; types come from annotations, and every parameter needs one.
    """
    hints = get_type_hints(tool)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for name, parameter in inspect.signature(tool).parameters.items():
        if name not in hints or parameter.kind not in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            raise TaskError(
                f"tool {tool.__name__}: parameter {name!r} has no annotation, or cannot be given "
                "by name; expected one such as `a: int`, from which the model is told its type"
            )
        properties[name] = _schema(hints[name], f"tool {tool.__name__}: parameter {name!r}")
        if parameter.default is parameter.empty:
            required.append(name)
    return {
        "type": "function",
        "function": {
            "name": tool.__name__,
            "description": inspect.getdoc(tool) or "",
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return {"anyOf": [_schema(part, where) for part in get_args(hint)]}
    if origin not in _KINDS:
        raise TaskError(
            f"{where} is annotated {hint!r}; expected one of {[k.__name__ for k in _KINDS]}"
        )
    items = get_args(hint)
    if origin is list and items:
        return {"type": "array", "items": _schema(items[0], where)}
    return {"type": _KINDS[origin]}


def parse_tagged_calls(text: str, tools: Mapping[str, Tool]) -> list[ToolCall]:
    """Calls as Qwen, Hermes and others write them: JSON between <tool_call> and </tool_call>."""
    return [_tagged_call(found) for found in _TAGGED.findall(text)]


def _tagged_call(text: str) -> ToolCall:
    if len(text) > _MAX_CALL_CHARACTERS:
        return ToolCall(
            "", error=f"a call of {len(text)} characters; at most {_MAX_CALL_CHARACTERS}"
        )
    try:
        call = json.loads(text)
        return ToolCall(call["name"], dict(call.get("arguments", {})))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        form = '{"name": "...", "arguments": {...}}'
        return ToolCall("", error=f"the call does not read as {form}")


def parse_python_calls(text: str, tools: Mapping[str, Tool]) -> list[ToolCall]:
    """Calls as Python writes them, `name(1, b="x")`, one a line, of the tools' names only.

    Arguments are literals: nothing is evaluated.
    """
    lines = [line.strip() for line in text.splitlines()]
    return [
        _written_call(line, tools[name])
        for line in lines
        if (name := line.partition("(")[0]) in tools and "(" in line
    ]


def _written_call(line: str, tool: Tool) -> ToolCall:
    name = tool.__name__
    if len(line) > _MAX_CALL_CHARACTERS:
        return ToolCall(
            name, error=f"a call of {len(line)} characters; at most {_MAX_CALL_CHARACTERS}"
        )
    try:
        call = ast.parse(line, mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("no call")
        given = [ast.literal_eval(argument) for argument in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        bound = inspect.signature(tool).bind_partial(*given, **named)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return ToolCall(name, error=f"the call does not read as {name}(...) with plain values")
    return ToolCall(name, bound.arguments)


def check_arguments(call: ToolCall, tools: Mapping[str, Tool]) -> str | None:
    """What is wrong with the call, for the model to read; None if it can be made."""
    if call.error:
        return call.error
    if call.name not in tools:
        return f"no tool {call.name!r}; the tools are {', '.join(tools)}"
    parameters = tool_schema(tools[call.name])["function"]["parameters"]
    properties: Mapping[str, Any] = parameters["properties"]
    for name in parameters["required"]:
        if name not in call.arguments:
            return f"{call.name} needs {name!r}"
    for name, value in call.arguments.items():
        if name not in properties:
            return f"{call.name} has no {name!r}; it has {', '.join(properties) or 'none'}"
        if not _fits(value, properties[name]):
            return f"{name} is {value!r:.60}; expected {_in_words(properties[name])}"
    return None


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    if options := schema.get("anyOf"):
        return any(_fits(value, option) for option in options)
    kind = schema["type"]
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "array" and isinstance(value, list) and "items" in schema:
        return all(_fits(item, schema["items"]) for item in value)
    return _KINDS.get(type(value)) == kind


def _in_words(schema: Mapping[str, Any]) -> str:
    options: Sequence[Mapping[str, Any]] = schema.get("anyOf", [schema])
    return " or ".join(str(option["type"]) for option in options)
