"""Runs the judged code, and answers what the tests ask of it.

The judged code can change everything in this process, this file included. It can then answer
wrongly, and nothing else: what is right is known to another process alone.
"""

import builtins
import linecache
import math
import operator
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

from textpolicy.rewards.verifiers.sandbox.inside.fork_server import serve_forks
from textpolicy.rewards.verifiers.sandbox.inside.plain_values import (
    CALCULATIONS,
    COMPARISONS,
    ITEM_OPERATORS,
    UNARY_OPERATORS,
    BrokenChannelError,
    Channel,
    decode_value,
    encode_value,
)

_IS_COROUTINE = 0x80
_BASES = (bool, int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = function(*args, **kwargs)
    if not isinstance(result, types.CoroutineType):
        return result
    # Imported where it is needed, because it takes longer than the rest of this process.
    import asyncio

    return asyncio.run(result)


def _plain(value: Any) -> Any:
    """Return the plain value of an object of a class that derives from a plain class."""
    base: Any = next(base for base in _BASES if isinstance(value, base))
    return base(value)


# By the name on the channel. The tests ask for the operators of two objects of the code alone.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": _call,
    "plain": _plain,
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "isinstance": lambda kind, value: isinstance(value, kind),
    "enter": lambda manager: type(manager).__enter__(manager),
    "exit": lambda manager: type(manager).__exit__(manager, None, None, None),
    **{
        function.__name__: function
        for function in (len, bool, int, float, complex, str, repr, iter, next, abs, round)
    },
    **{
        function.__name__: function
        for function in (reversed, divmod, pow, bytes, format, math.floor, math.ceil, math.trunc)
    },
    **{
        name: vars(operator)[name]
        for name in (*UNARY_OPERATORS, *ITEM_OPERATORS, *COMPARISONS, *CALCULATIONS)
    },
}


class _Server:
    """Answers requests on the objects of the judged code, which it keeps by numbers."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def answer_until_reply(self) -> dict[str, Any]:
        """Answer requests until the reply to a callback comes."""
        while True:
            message = self._channel.receive()
            if "reply" in message:
                return message
            self._channel.send(self._answer(message))

    def export(self, names: dict[str, Any]) -> dict[str, Any]:
        public = {name: value for name, value in names.items() if not name.startswith("_")}
        return {name: self._export_one(name, value) for name, value in public.items()}

    def describe_error(self, error: BaseException) -> dict[str, Any]:
        try:
            args = [encode_value(arg, lambda other: repr(other)[:1000]) for arg in error.args]
            text = "".join(traceback.format_exception(error))[-4000:]
        except BaseException:
            args, text = [], "its message cannot be shown"
        return {"raised": self._describe_class(type(error)), "args": args, "traceback": text}

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            target, args, kwargs = self._decode(message["on"]), message["args"], message["kwargs"]
            args = self._decode(args)
            kwargs = {name: self._decode(value) for name, value in kwargs.items()}
            value = _OPERATIONS[message["do"]](target, *args, **kwargs)
            answer = {"value": self._encode(value)}
            if message["do"] == "call" and value is None:
                answer["changed"] = self._encode(args)
        except StopIteration:
            answer = {"stop": True}
        except BaseException as error:
            answer = self.describe_error(error)
        flush_output()
        return answer

    def _encode(self, value: Any) -> Any:
        return encode_value(value, self._encode_object)

    def _encode_object(self, value: Any) -> Any:
        if type(value).__module__ == "numpy" and not hasattr(value, "__len__"):
            return encode_value(value.item(), self._encode_object)
        number = self._keep(value)
        described: dict[str, Any] = {"is": "object", "of": number, "name": type(value).__name__}
        if isinstance(value, types.FunctionType) and value.__code__.co_flags & _IS_COROUTINE:
            described["async"] = True
        if isinstance(value, type) and issubclass(value, Exception):
            described["class"] = self._describe_class(value)
        if isinstance(value, _BASES):
            described["plain"] = True
        return described

    def _keep(self, value: Any) -> int:
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)
        return number

    def _decode(self, data: Any) -> Any:
        return decode_value(data, self._decode_object)

    def _decode_object(self, data: dict[str, Any]) -> Any:
        match data["is"]:
            case "object":
                return self._objects[data["of"]]
            case "builtin":
                return vars(builtins)[data["of"]]
            case "iterator":
                return iter(self._decode(data["of"]))
            case _:
                return self._callback(data["of"])

    def _callback(self, number: int) -> Callable[..., Any]:
        def callback(*args: Any, **kwargs: Any) -> Any:
            named = {name: self._encode(value) for name, value in kwargs.items()}
            self._channel.send({"callback": number, "args": self._encode(args), "kwargs": named})
            reply = self.answer_until_reply()
            if reply["reply"] is not None:
                return self._decode(reply["reply"][0])
            raise vars(builtins).get(reply["raised"], RuntimeError)(reply["message"])

        return callback

    def _export_one(self, name: str, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return {"is": "module", "of": value.__name__}
        module = sys.modules.get(getattr(value, "__module__", None) or "solution")
        is_foreign = module is not sys.modules["solution"] and callable(value)
        if is_foreign and module and vars(module).get(name) is value:
            return {"is": "import", "of": module.__name__}
        return self._encode(value)

    def _describe_class(self, kind: type) -> list[Any]:
        """Return the names of an exception's classes, with numbers for those of the code."""
        return [
            base.__name__ if base.__module__ == "builtins" else [base.__name__, self._keep(base)]
            for base in kind.__mro__
        ]


def flush_output() -> None:
    """Write what was printed before the answer is sent, whatever the code has made of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            continue


def _serve(code: str, descriptors: Sequence[int]) -> None:
    """Run the code as the module `solution`, and answer until the tests end."""
    channel = Channel(descriptors[0])
    server = _Server(channel)
    solution = types.ModuleType("solution")
    sys.modules["solution"] = solution
    linecache.cache["solution.py"] = (
        len(code),
        None,
        code.splitlines(keepends=True),
        "solution.py",
    )
    try:
        exec(compile(code, "solution.py", "exec"), solution.__dict__)
    except BaseException as error:
        flush_output()
        channel.send(server.describe_error(error))
        return
    flush_output()
    try:
        channel.send({"exports": server.export(vars(solution))})
        server.answer_until_reply()
    except BrokenChannelError:
        return


def run_judged_code() -> None:
    serve_forks(_serve)
