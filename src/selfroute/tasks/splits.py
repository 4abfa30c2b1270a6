"""A problem's split for ever: a hash of what the problem is decides it, whatever file or seed it came from."""

from __future__ import annotations

import hashlib
import json

from selfroute.types import Split


def problem_hash(content: object) -> int:
    """64 bits of the SHA-256 of a problem's content, which is written as JSON."""
    return int.from_bytes(hashlib.sha256(json.dumps(content).encode()).digest()[:8], "big")


def split_of_hash(number: int) -> Split:
    """80 % train, 8 % calibration, 12 % test."""
    share = number % 100
    return "train" if share < 80 else "calibration" if share < 88 else "test"
