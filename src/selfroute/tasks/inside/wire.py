"""What goes into and comes out of a sandbox, and between two: messages, and plain Python data in them."""

from __future__ import annotations

import json
import math
import os

TYPE_CHECKING = False  # importing typing would take as long as all the others
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

_KINDS: Mapping[str, Callable[[list[Any]], Any]] = {"t": tuple, "s": set, "z": frozenset, "d": dict}


def pack(value: Any, other: Callable[[Any], int] | None = None) -> Any:
    """Plain data as JSON can hold it, its types kept; `other` gives a number for an object that is not data.

    Raises:
        TypeError: an object that is not data, and no `other`.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        # Python refuses to write long numbers in decimal.
        number = int.__int__(value)
        return number if -(2**63) < number < 2**63 else {"i": hex(number)}
    if isinstance(value, float):
        return float.__float__(value) if math.isfinite(value) else {"f": repr(float.__float__(value))}
    if isinstance(value, list):
        return [pack(v, other) for v in value]
    if isinstance(value, tuple):
        return {"t": [pack(v, other) for v in value]}
    if isinstance(value, (set, frozenset)):
        return {"s" if isinstance(value, set) else "z": [pack(v, other) for v in value]}
    if isinstance(value, dict):
        return {"d": [[pack(k, other), pack(v, other)] for k, v in value.items()]}
    if isinstance(value, complex):
        return {"c": [repr(value.real), repr(value.imag)]}
    if isinstance(value, (bytes, bytearray)):
        return {"b": value.hex()}
    if other is None:
        raise TypeError(f"a {type(value).__name__} is not plain data")
    return {"o": other(value)}


def unpack(packed: Any, found: Any = None, kinds: Mapping[str, Callable[[list[Any]], Any]] = _KINDS) -> Any:
    """The value that `pack` made; `found(number)` gives the object of a number, and `kinds` says what is made of the
    list that a tuple, a set, a frozenset or a dict (pairs) was sent as.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: `pack` did not make this.
    """
    if isinstance(packed, list):
        return [unpack(v, found, kinds) for v in packed]
    if not isinstance(packed, dict):
        return packed
    [(kind, inner)] = packed.items()
    if kind == "i":
        return int(inner, 16)
    if kind == "f":
        return float(inner)
    if kind == "c":
        return complex(*map(float, inner))
    if kind == "b":
        return bytes.fromhex(inner)
    if kind == "o":
        return found(inner)
    return kinds[kind]([unpack(v, found, kinds) for v in inner])


def read(number: int) -> Any:
    """The next message; the process ends where there is none."""

    def exactly(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = os.read(number, count - len(data))
            if not part:
                os._exit(0)
            data += part
        return bytes(data)

    return json.loads(exactly(int.from_bytes(exactly(8), "big")))


def write(number: int, message: Any) -> None:
    data = json.dumps(message).encode()
    rest = memoryview(len(data).to_bytes(8, "big") + data)
    while rest:
        rest = rest[os.write(number, rest) :]
