"""Messages and tools of a chat request, in the form that chat templates read."""

from collections.abc import Mapping, Sequence
from typing import Any

from textpolicy.serving.body_fields import BOOL, BodyFields, is_text, wrong_value
from textpolicy.serving.refusal import RefusalError
from textpolicy.untrusted.parsing import parse_json

MAX_MESSAGES = 4096
MAX_TOOLS = 128
_ROLES = ("system", "user", "assistant", "tool", "developer")


def read_messages(given: Any) -> list[Mapping[str, Any]]:
    """Return the messages of a conversation; raise `RefusalError` if one cannot be read."""
    if not isinstance(given, list) or not 0 < len(given) <= MAX_MESSAGES:
        raise wrong_value("messages", given, f"a list of 1 to {MAX_MESSAGES} messages")
    return [_read_message(message, f"messages[{i}]") for i, message in enumerate(given)]


def read_tools(fields: BodyFields) -> list[Mapping[str, Any]]:
    """Return the tools that the model may call; none if tool_choice forbids to call any."""
    given = fields.raw("tools") or []
    choice = fields.raw("tool_choice")
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise wrong_value("tools", given, f"a list of up to {MAX_TOOLS} tools")
    for index, tool in enumerate(given):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not is_text(function.get("name")):
            raise wrong_value(
                f"tools[{index}]", tool, 'an object such as {"type": "function", "function": {...}}'
            )
    if choice not in (None, "auto", "none") or (choice == "auto" and not given):
        raise RefusalError(
            f"tool_choice is {str(choice)[:60]!r} with {len(given)} tools; answers are not "
            "constrained here, so a call cannot be forced. Expected 'auto' or 'none'",
            param="tool_choice",
            code="unsupported_parameter",
        )
    if given and fields.take("parallel_tool_calls", BOOL, True) is False:
        raise RefusalError(
            "parallel_tool_calls is false; the model decides how many calls it makes. Leave the "
            "parameter out, and take the first call",
            param="parallel_tool_calls",
            code="unsupported_parameter",
        )
    fields.ignore("parallel_tool_calls")
    return [] if choice == "none" else given


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise wrong_value(where, message, f"an object whose role is one of {', '.join(_ROLES)}")
    role: str = message["role"]
    read = {
        "role": "system" if role == "developer" else role,
        "content": _read_content(message.get("content"), f"{where}.content"),
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := message.get(name)) is not None:
            if not is_text(value):
                raise wrong_value(f"{where}.{name}", value, "a text")
            read[name] = value
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise wrong_value(f"{where}.tool_calls", calls, "a list of calls")
        read["tool_calls"] = [_read_call(call, f"{where}.tool_calls") for call in calls]
    return read


def _read_content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if is_text(content):
        return content
    parts: Sequence[Any] = content if isinstance(content, list) else [None]
    texts = [part.get("text") if _is_text_part(part) else None for part in parts]
    if not all(map(is_text, texts)):
        raise wrong_value(where, content, "a text, or a list of parts of the type 'text'")
    return "".join(text for text in texts if text)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text"


def _read_call(call: Any, where: str) -> dict[str, Any]:
    """Return a call with its arguments as an object, which is what templates write as JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not is_text(function.get("name")):
        raise wrong_value(where, call, "calls with a function that has a name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except ValueError as error:
            raise RefusalError(
                f"the arguments of a call of {function['name']!r:.80} are no JSON: {error}",
                param=where,
            ) from error
    if not isinstance(arguments, dict | None):
        raise wrong_value(f"{where}.function.arguments", arguments, "a JSON object")
    read = {"type": "function", "function": function | {"arguments": arguments or {}}}
    return read | ({"id": call["id"]} if is_text(call.get("id")) else {})
