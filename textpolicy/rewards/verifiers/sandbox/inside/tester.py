"""Runs the tests, and asks the judged code, which runs in another box, for what they need.

A name of the code is here a `_Remote`: calling it sends plain values and receives plain values.
Comparisons are made here. A comparison with an object that did not cross the channel is false, and
arithmetic with one is refused, because either would ask the code for the verdict.
"""

# pyright: reportPrivateUsage=false
# The attributes of a `_Remote` have odd names, because all other names are those of the code.

import builtins
import importlib
import operator
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partialmethod
from typing import Any, cast

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

_MAX_ITEMS = 100_000
_MAX_ERROR = 4000
_STANDARD = {
    *("bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum"),
    *("fractions", "functools", "heapq", "itertools", "json", "math", "operator", "random", "re"),
    *("statistics", "string", "typing"),
}
"""Modules whose names a test may take from the imports of the code: they are imported here."""
_KEPT_NAMES = {"np": ("numpy", ""), "numpy": ("numpy", ""), "isclose": ("math", "isclose")}
"""Names that tests compare with and often leave to the imports of the code."""
_JUDGING_METHODS = {"startswith", "endswith", "issubset", "issuperset", "isdisjoint"}
"""Methods of plain values that answer a comparison with their argument."""


class _Code:
    """The judged code, as far as the tests can reach it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.broken = ""
        """Why the verdict is no, whatever the test does with the error. Empty if there is none."""
        self.requests = 0
        """How often the code was asked for more than a plain value."""
        self._callbacks: list[Callable[..., Any]] = []
        self._exceptions: dict[int, type[Exception]] = {}

    def load(self) -> dict[str, Any]:
        """Return the public names of the code; raise what the code raised."""
        message = self._receive()
        if "exports" not in message:
            raise self._error_of(message)
        exported = {}
        for name, data in message["exports"].items():
            # A built-in name keeps its meaning, and so does the name of a standard module.
            if name in _KEPT_NAMES:
                module, attribute = _KEPT_NAMES[name]
                exported[name] = _imported(module, attribute)
            elif name in sys.stdlib_module_names:
                exported[name] = importlib.import_module(name)
            # Among the names with an underscore is __builtins__, which gives a test its functions.
            elif name not in vars(builtins) and not name.startswith("_"):
                exported |= self._import(name, data)
        return exported

    def ask(self, what: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the answer to a request, or raise what the code raised."""
        self.requests += what != "plain"
        named = {name: self._encode(value) for name, value in kwargs.items()}
        request = {"do": what, "on": self._encode(target), "args": self._encode(args)}
        self._send({**request, "kwargs": named})
        while "callback" in (answer := self._receive()):
            self._send(self._call_back(answer))
        if answer.get("stop"):
            # Raised by no function but next: elsewhere it would end a loop of the test.
            raise StopIteration if what == "next" else RuntimeError("the code raised StopIteration")
        if "raised" in answer:
            raise self._error_of(answer)
        if "changed" in answer:
            _copy_changes(args, self._decode(answer["changed"]))
        return self._decode(answer["value"])

    def refuse(self, reason: str) -> TypeError:
        """Return the error of a request that would let the code decide; the verdict is no."""
        self.broken = self.broken or reason
        return TypeError(reason)

    def _send(self, message: dict[str, Any]) -> None:
        sys.stdout.flush()
        try:
            self._channel.send(message)
        except BrokenChannelError as error:
            self.broken = str(error)
            raise

    def _receive(self) -> dict[str, Any]:
        try:
            return self._channel.receive()
        except BrokenChannelError as error:
            self.broken = str(error)
            raise

    def _import(self, name: str, data: Any) -> dict[str, Any]:
        kind = data.get("is") if isinstance(data, dict) else None
        if kind == "module":
            known = data["of"].partition(".")[0] in sys.stdlib_module_names
            return {name: importlib.import_module(data["of"])} if known else {}
        if kind == "import":
            if data["of"] not in _STANDARD:
                return {}
            value = vars(importlib.import_module(data["of"])).get(name)
            kinds = (type, types.FunctionType, types.BuiltinFunctionType)
            return {name: value} if isinstance(value, kinds) else {}
        return {name: self._decode(data)}

    def _encode(self, value: Any) -> Any:
        return encode_value(value, self._encode_other)

    def _encode_other(self, value: Any) -> dict[str, Any]:
        if isinstance(value, _Remote):
            return {"is": "object", "of": number_of(value)}
        if isinstance(value, type) and value in self._exceptions.values():
            number = next(n for n, known in self._exceptions.items() if known is value)
            return {"is": "object", "of": number}
        if vars(builtins).get(getattr(value, "__name__", "")) is value:
            return {"is": "builtin", "of": value.__name__}
        if isinstance(value, Iterator | type({}.keys()) | type({}.values()) | type({}.items())):
            items = [item for item, _ in zip(value, range(_MAX_ITEMS), strict=False)]
            return {"is": "iterator", "of": self._encode(items)}
        if callable(value):
            self._callbacks.append(value)
            return {"is": "callback", "of": len(self._callbacks) - 1}
        raise TypeError(
            f"a test can pass plain values, functions and objects of the code, and not an object "
            f"of {type(value).__name__}"
        )

    def _decode(self, data: Any) -> Any:
        return decode_value(data, self._decode_object)

    def _decode_object(self, data: dict[str, Any]) -> Any:
        if data["is"] != "object":
            raise BrokenChannelError("the code sent something that is not a message")
        if "class" in data:
            return self._exception_class(data["class"])
        remote = _Remote(self, int(data["of"]), str(data["name"]), bool(data.get("plain")))
        return _awaited(remote) if data.get("async") else remote

    def _call_back(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            function = self._callbacks[message["callback"]]
            named = {name: self._decode(value) for name, value in message["kwargs"].items()}
            value = function(*self._decode(message["args"]), **named)
            return {"reply": [self._encode(value)]}
        except Exception as error:
            return {"reply": None, "raised": type(error).__name__, "message": str(error)[:1000]}

    def _error_of(self, message: dict[str, Any]) -> Exception:
        kind = self._exception_class(message["raised"])
        args = self._decode(message["args"])
        try:
            error = kind(*args)
        except Exception:
            error = RuntimeError(f"{kind.__name__}: {args}")
        error.add_note(str(message["traceback"])[-_MAX_ERROR:])
        return error

    def _exception_class(self, bases: Sequence[Any]) -> type[Exception]:
        """Return the class here for an exception of the code, from the names of its bases."""
        first, *rest = bases
        if isinstance(first, str):
            known = vars(builtins).get(first)
            if isinstance(known, type) and issubclass(known, Exception):
                # These two would end a loop of the test without an error.
                stops = issubclass(known, StopIteration | StopAsyncIteration)
                return RuntimeError if stops else known
            return self._exception_class(rest) if rest else RuntimeError
        name, number = first
        if number not in self._exceptions:
            base = self._exception_class(rest) if rest else RuntimeError
            self._exceptions[number] = cast("type[Exception]", type(str(name), (base,), {}))
        return self._exceptions[number]


class _Remote:
    """A function, class or object of the judged code."""

    __slots__ = ("_r_code", "_r_has_plain", "_r_name", "_r_number", "_r_plain")

    def __init__(self, code: _Code, number: int, name: str, has_plain: bool) -> None:
        values = (code, has_plain, name, number, (-1, None))
        for slot, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, slot, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        if name in _JUDGING_METHODS:
            if self._r_has_plain:
                return getattr(plain_of(self), name)
            raise self._r_code.refuse(
                f"the test asks {name} of an object of {self._r_name}, which is no plain value"
            )
        return self._r_code.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._r_code.ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._r_code.ask("delattr", self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._r_code.ask("call", self, *args, **kwargs)

    def __instancecheck__(self, value: Any) -> bool:
        return self._r_code.ask("isinstance", self, value) is True

    def __iter__(self) -> Iterator[Any]:
        return self._r_code.ask("iter", self)

    def __next__(self) -> Any:
        return self._r_code.ask("next", self)

    def __contains__(self, value: Any) -> bool:
        return any(item == value for item in self)

    def __eq__(self, other: object) -> bool:
        return _compare("eq", self, other)

    def __ne__(self, other: object) -> bool:
        return not _compare("eq", self, other)

    def __hash__(self) -> int:
        return hash(plain_of(self)) if self._r_has_plain else self._r_number

    def __enter__(self) -> Any:
        return self._r_code.ask("enter", self)

    def __exit__(self, *_: object) -> None:
        self._r_code.ask("exit", self)


def number_of(remote: _Remote) -> int:
    return remote._r_number


def plain_of(value: Any) -> Any:
    """Return the plain value of an object whose class derives from a plain class.

    The code is asked again only after it was asked for something else, which may have changed the
    value: otherwise each comparison of a test could meet another value.
    """
    if not isinstance(value, _Remote) or not value._r_has_plain:
        return value
    code, (asked, plain) = value._r_code, value._r_plain
    if asked != code.requests:
        plain = code.ask("plain", value)
        object.__setattr__(value, "_r_plain", (code.requests, plain))
    return plain


def _compare(what: str, left: _Remote, right: Any) -> bool:
    """Compare plain values here. Only two objects of the code are compared by the code."""
    plain_left, plain_right = plain_of(left), plain_of(right)
    remotes = isinstance(plain_left, _Remote) + isinstance(plain_right, _Remote)
    if remotes == 0:
        return _OPERATORS[what](plain_left, plain_right)
    if remotes == 2:
        return left._r_code.ask(what, left, right) is True
    if what == "eq":
        return False
    raise left._r_code.refuse(
        f"the test compares a plain value with an object of {left._r_name} that the code returned"
    )


def _calculate(what: str, left: Any, right: Any) -> Any:
    plain_left, plain_right = plain_of(left), plain_of(right)
    remotes = isinstance(plain_left, _Remote) + isinstance(plain_right, _Remote)
    remote = left if isinstance(left, _Remote) else right
    if remotes == 0:
        return _OPERATORS[what](plain_left, plain_right)
    if remotes == 2:
        return remote._r_code.ask(what, left, right)
    raise remote._r_code.refuse(
        f"the test calculates with a plain value and an object of {remote._r_name}, which the code "
        "returned; the code would see the value"
    )


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    **{name: vars(operator)[name] for name in (*COMPARISONS, *CALCULATIONS)},
    "pow": pow,
    "divmod": divmod,
}


def _add_special_methods() -> None:
    """Give `_Remote` the methods behind functions and operators."""
    for name in COMPARISONS[1:]:
        setattr(_Remote, f"__{name}__", partialmethod(_compare_with, name))
    for name in (*CALCULATIONS, "pow", "divmod"):
        special = name.rstrip("_")
        setattr(_Remote, f"__{special}__", partialmethod(_calculate_with, name))
        setattr(_Remote, f"__r{special}__", partialmethod(_calculate_from, name))
    converting = ("len", "bool", "int", "float", "complex", "str", "repr", "bytes", "format")
    rounding = ("abs", "round", "floor", "ceil", "trunc", "reversed")
    for name in (*converting, *rounding, *UNARY_OPERATORS, *ITEM_OPERATORS):
        setattr(_Remote, f"__{name}__", partialmethod(_ask, name))


def _ask(self: _Remote, what: str, *args: Any) -> Any:
    return self._r_code.ask(what, self, *args)


def _compare_with(self: _Remote, what: str, other: Any) -> bool:
    return _compare(what, self, other)


def _calculate_with(self: _Remote, what: str, other: Any) -> Any:
    return _calculate(what, self, other)


def _calculate_from(self: _Remote, what: str, other: Any) -> Any:
    return _calculate(what, other, self)


def _awaited(function: _Remote) -> Callable[..., Any]:
    """Return an `async def` for a coroutine function, which the code runs to its end."""

    async def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def _imported(module: str, attribute: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ImportError:
        # Not installed: a test that uses the name fails.
        return None
    return vars(found)[attribute] if attribute else found


def _copy_changes(args: Sequence[Any], changed: Any) -> None:
    """Copy what a call that returned None has made of its lists, dicts and sets."""
    for own, new in zip(args, changed, strict=False):
        if type(own) is type(new) and isinstance(own, list | bytearray):
            own[:] = new
        elif type(own) is type(new) and isinstance(own, dict | set):
            own.clear()
            own.update(new)


def _serve(test: str, descriptors: Sequence[int]) -> None:
    """Run one test and write the verdict to the second descriptor."""
    code = _Code(Channel(descriptors[0]))
    verdicts = Channel(descriptors[1])
    error = ""
    try:
        names = code.load()
        solution = types.ModuleType("solution")
        vars(solution).update(names)
        sys.modules["solution"] = solution
        exec(compile(test, "<test>", "exec"), {"__name__": "test", **names})
    except BaseException as raised:
        error = "".join(traceback.format_exception(raised))[-_MAX_ERROR:] or "the test failed"
    sys.stdout.flush()
    verdicts.send({"passed": not (error or code.broken), "error": error or code.broken})


def run_tester() -> None:
    _add_special_methods()
    serve_forks(_serve)
