"""Whether a pattern matches a text: run in a worker of `pool`, since a pattern may take for ever on a text."""

from __future__ import annotations

import re


def matches(pattern: str, answer: str) -> bool:
    """Whether the pattern matches the text from its first to its last character."""
    return re.fullmatch(pattern, answer) is not None
