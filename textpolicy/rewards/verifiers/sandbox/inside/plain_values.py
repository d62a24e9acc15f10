"""Plain values as JSON, and the channel between the judged code and the tests.

Only numbers, texts, containers and a few values of the standard library cross the channel. They
are copied, and a copy is of the exact class: no object of the judged code reaches the tests, so no
`__eq__` of the code can answer a comparison. Anything else crosses as the number of an object that
stays on its side.
"""

import collections
import datetime
import decimal
import fractions
import json
import socket
from collections.abc import Callable
from typing import Any

MAX_LINE_BYTES = 16 << 20
# Names in the module `operator`.
UNARY_OPERATORS = ("index", "neg", "pos", "invert")
ITEM_OPERATORS = ("getitem", "setitem", "delitem")
COMPARISONS = ("eq", "lt", "le", "gt", "ge")
CALCULATIONS = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "lshift", "rshift"),
    *("and_", "or_", "xor"),
)
_MAX_JSON_INT = 1 << 62


class BrokenChannelError(Exception):
    """The other side has ended, or has sent something that is not a message."""


class Channel:
    """Messages of JSON, one in a line, over a socket."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=descriptor)
        self._received = b""

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise BrokenChannelError("the code ended its process") from error

    def receive(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            try:
                part = self._socket.recv(1 << 16)
            except OSError as error:
                raise BrokenChannelError("the code ended its process") from error
            if not part:
                raise BrokenChannelError("the code ended its process")
            self._received += part
            if len(self._received) > MAX_LINE_BYTES:
                raise BrokenChannelError(f"the code sent more than {MAX_LINE_BYTES} bytes")
        line, _, self._received = self._received.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BrokenChannelError("the code sent something that is not a message") from error
        if not isinstance(message, dict):
            raise BrokenChannelError("the code sent something that is not a message")
        return message


def _pairs(value: Any) -> list[list[Any]]:
    return [list(pair) for pair in value.items()]


# The class, its name on the channel, how a value becomes parts, and how the parts become a value.
_CLASSES: list[tuple[type, str, Callable[[Any], Any], Callable[[Any], Any]]] = [
    (tuple, "tuple", list, tuple),
    (set, "set", list, set),
    (frozenset, "frozenset", list, frozenset),
    (collections.deque, "deque", list, collections.deque),
    (dict, "dict", _pairs, dict),
    (collections.OrderedDict, "ordered", _pairs, collections.OrderedDict),
    (collections.Counter, "counter", _pairs, lambda pairs: collections.Counter(dict(pairs))),
    (
        collections.defaultdict,
        "defaults",
        _pairs,
        lambda pairs: collections.defaultdict(None, pairs),
    ),
    (range, "range", lambda r: [r.start, r.stop, r.step], lambda parts: range(*parts)),
    (slice, "slice", lambda s: [s.start, s.stop, s.step], lambda parts: slice(*parts)),
    (bytes, "bytes", bytes.hex, bytes.fromhex),
    (bytearray, "bytearray", bytearray.hex, bytearray.fromhex),
    (complex, "complex", lambda z: [z.real, z.imag], lambda parts: complex(*parts)),
    (decimal.Decimal, "decimal", str, decimal.Decimal),
    (
        fractions.Fraction,
        "fraction",
        lambda f: [f.numerator, f.denominator],
        lambda parts: fractions.Fraction(*parts),
    ),
    (datetime.date, "date", datetime.date.isoformat, datetime.date.fromisoformat),
    (datetime.time, "time", datetime.time.isoformat, datetime.time.fromisoformat),
    (
        datetime.datetime,
        "datetime",
        datetime.datetime.isoformat,
        datetime.datetime.fromisoformat,
    ),
    (
        datetime.timedelta,
        "timedelta",
        lambda t: [t.days, t.seconds, t.microseconds],
        lambda parts: datetime.timedelta(*parts),
    ),
]
_BY_CLASS = {kind: (name, to_parts) for kind, name, to_parts, _ in _CLASSES}
_BY_NAME = {name: from_parts for _, name, _, from_parts in _CLASSES}


def encode_value(value: Any, encode_other: Callable[[Any], Any]) -> Any:
    """Return JSON for a value; `encode_other` is called for what is not plain."""
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        return value if -_MAX_JSON_INT < value < _MAX_JSON_INT else {"is": "int", "of": hex(value)}
    if value is Ellipsis:
        return {"is": "ellipsis"}
    if kind is list:
        return [encode_value(item, encode_other) for item in value]
    if kind in _BY_CLASS:
        name, to_parts = _BY_CLASS[kind]
        return {"is": name, "of": encode_value(to_parts(value), encode_other)}
    return encode_other(value)


def decode_value(data: Any, decode_other: Callable[[dict[str, Any]], Any]) -> Any:
    """Return the value of JSON; `decode_other` is called for what is not plain."""
    if isinstance(data, list):
        return [decode_value(item, decode_other) for item in data]
    if not isinstance(data, dict):
        return data
    name = data.get("is")
    if name == "int":
        return int(data["of"], 16)
    if name == "ellipsis":
        return ...
    if name in _BY_NAME:
        return _BY_NAME[name](decode_value(data["of"], decode_other))
    return decode_other(data)
