"""Tools for models: their JSON schemas, the calls in an answer, and a check of their arguments."""

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from textpolicy.environments.mcp.tools import McpTool
from textpolicy.errors import TaskError
from textpolicy.untrusted.parsing import parse_json

Tool = Callable[..., Any]

# Models read the errors of calls, so a new wording changes learning results.
_MAX_CALL_CHARACTERS = 4000
MAX_CALLS_PER_ANSWER = 16
_JSON_TYPES = {
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
    """One call as the model wrote it. `error` is the reason if the call cannot be read."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    error: str | None = None


ParseCalls = Callable[[str, Mapping[str, Tool]], list[ToolCall]]
"""Returns the calls in an answer. An answer without calls is the final answer."""


def tool_schema(tool: Tool) -> dict[str, Any]:
    """Return the tool's JSON schema, in the form that chat models are trained on.

    The docstring of a function is its description. Every parameter needs an annotation, which gives
    its type. The tool of an MCP server is described as its server does.
    """
    if isinstance(tool, McpTool):
        return deepcopy(dict(tool.description))
    hints = get_type_hints(tool)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for name, parameter in inspect.signature(tool).parameters.items():
        if name not in hints or parameter.kind not in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            raise TaskError(
                f"tool {tool.__name__}: parameter {name!r} has no annotation, or cannot be passed "
                "by name. The model is told the type of each parameter: write it as in `a: int`"
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
    if origin not in _JSON_TYPES:
        raise TaskError(
            f"{where} has the type {hint!r}; expected one of {[k.__name__ for k in _JSON_TYPES]}"
        )
    items = get_args(hint)
    if origin is list and items:
        return {"type": "array", "items": _schema(items[0], where)}
    return {"type": _JSON_TYPES[origin]}


def parse_tagged_calls(text: str, tools: Mapping[str, Tool]) -> list[ToolCall]:
    """Return calls as Qwen and Hermes write them: JSON between <tool_call> and </tool_call>."""
    return [_parse_tagged_call(call) for call in _TAGGED.findall(text)]


def _parse_tagged_call(text: str) -> ToolCall:
    if len(text) > _MAX_CALL_CHARACTERS:
        return _too_long_call("", text)
    try:
        call = parse_json(text)
        return ToolCall(call["name"], dict(call.get("arguments", {})))
    except (ValueError, TypeError, KeyError, AttributeError):
        form = '{"name": "...", "arguments": {...}}'
        return ToolCall("", error=f"the call does not read as {form}")


def parse_python_calls(text: str, tools: Mapping[str, Tool]) -> list[ToolCall]:
    """Return calls as Python writes them, one a line: `name(1, b="x")` with the name of a tool.

    Arguments must be literals, because no code of the model is evaluated.
    """
    lines = [line.strip() for line in text.splitlines()]
    return [
        _parse_python_call(line, tools[name])
        for line in lines
        if (name := line.partition("(")[0]) in tools and "(" in line
    ]


def _parse_python_call(line: str, tool: Tool) -> ToolCall:
    name = tool.__name__
    if len(line) > _MAX_CALL_CHARACTERS:
        return _too_long_call(name, line)
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


def _too_long_call(name: str, text: str) -> ToolCall:
    error = f"a call of {len(text)} characters; at most {_MAX_CALL_CHARACTERS}"
    return ToolCall(name, error=error)


def problem_with_call(call: ToolCall, tools: Mapping[str, Tool]) -> str | None:
    """Return a message to the model about what is wrong with the call, or None if it is valid."""
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
        if name not in properties and not parameters.get("additionalProperties"):
            return f"{call.name} has no {name!r}; it has {', '.join(properties) or 'none'}"
        if not _matches(value, properties.get(name)):
            options = properties[name].get("anyOf", [properties[name]])
            types = " or ".join(option.get("type", "another form") for option in options)
            return f"{name} is {value!r:.60}; expected {types}"
    return None


def _matches(value: Any, schema: Any) -> bool:
    """Return False if the value is of another type. MCP servers check what is not read here."""
    if not isinstance(schema, Mapping):
        return True
    if options := schema.get("anyOf"):
        return any(_matches(value, option) for option in options)
    kind = schema.get("type")
    if kind not in _JSON_TYPES.values():
        return True
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "array" and isinstance(value, list) and "items" in schema:
        return all(_matches(item, schema["items"]) for item in value)
    return _JSON_TYPES.get(type(value)) == kind
