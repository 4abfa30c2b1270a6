"""Witness of sockets: every address that this process connects to, sends to or looks up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname")
_watching: list[list[Any]] = []
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in _EVENTS:
        where = arguments[:2] if event == "socket.getaddrinfo" else arguments[-1]
        for seen in _watching:
            seen.append(where)


@contextmanager
def watched() -> Iterator[list[Any]]:
    """The addresses, as they come; an audit hook sees those of every library that uses Python's sockets."""
    global _hooked
    if not _hooked:
        # It cannot be taken away again, and does nothing while nobody watches.
        sys.addaudithook(_hook)
        _hooked = True
    seen: list[Any] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)
