"""The rule file: what must never leave the machine, in TOML.

    [[rules]]
    name = "falcon"
    words = ["Project Falcon", "FLC-7"]
    action = "block"

A rule looks for words, for a regular expression, or for one of Presidio's entity types; what it finds stays here with
the whole request (`block`), or leaves as a placeholder (`redact`). Expressions are RE2's, whose time grows with the
text alone: one that takes for ever cannot be written. Left out on purpose: applying them (`finding`, `border`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from selfroute.config import Config
from selfroute.errors import ConfigError

INSTALL = "pip install 'selfroute[redact]' (in a checkout: pip install '.[redact]')"


class Rule(Config):
    """One rule; it has exactly one of `words`, `regex` and `entity`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    """What clients and records are told of it."""
    action: Literal["block", "redact"]
    """`block`: the request stays on the device; `redact`: a placeholder leaves in its place."""
    words: tuple[str, ...] = ()
    """Words or phrases, whole, in upper or lower case, with any white space between the words of a phrase."""
    regex: str = ""
    """A regular expression as RE2 has it; `(?i)` ignores case."""
    entity: str = ""
    """An entity type of Presidio's, such as `CREDIT_CARD`."""


def read_rules(path: str | Path, known_entities: Callable[[], Collection[str]]) -> tuple[Rule, ...]:
    """The rules of a file; `known_entities` is asked where a rule names one.

    Raises:
        ConfigError: no such file, no RE2, or with every fault of the file on a line of its own.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the rule file {path} cannot be read: {error.strerror} (privacy.rules)") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the rule file {path} is not valid TOML: {error}") from error
    given = values.get("rules")
    if set(values) != {"rules"} or not isinstance(given, list) or not given:
        held = ", ".join(sorted(values)) or "nothing"
        raise ConfigError(f"the rule file {path} must hold [[rules]], and nothing else (it holds: {held})")
    rules: list[Rule] = []
    faults: list[str] = []
    for index, value in enumerate(given):
        name = value.get("name") if isinstance(value, Mapping) else None
        where = f"rules[{index}]" + (f" {name!r:.60}" if name else "")
        try:
            rule = Rule.model_validate(value)
        except ValidationError as error:
            faults += [f"{where} {'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()]
            continue
        faults += [f"{where} {fault}" for fault in _faults(rule, known_entities)]
        if any(rule.name == other.name for other in rules):
            faults.append(f"{where} name: there is another rule of that name")
        rules.append(rule)
    if faults:
        raise ConfigError(f"the rule file {path} cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults))
    return tuple(rules)


def _faults(rule: Rule, known_entities: Callable[[], Collection[str]]) -> list[str]:
    given = [name for name in ("words", "regex", "entity") if getattr(rule, name)]
    if len(given) != 1:
        return [f"needs exactly one of words, regex and entity, and has {', '.join(given) or 'none'}"]
    if not all(word.strip() for word in rule.words):
        return ["words: one of them is empty"]
    if rule.entity and rule.entity not in (known := known_entities()):
        return [f"entity: there is no {rule.entity!r} (known: {', '.join(sorted(known))})"]
    try:
        if rule.regex and _compiled(rule.regex).search(""):
            return ["regex: it finds the empty text, which is everywhere"]
    except ValueError as error:
        return [f"regex: {error}"]
    return []


def matcher(rule: Rule) -> Callable[[str], list[tuple[int, int]]]:
    """What finds the places of a rule's words or expression in a text."""
    if rule.regex:
        expression = _compiled(rule.regex)
        return lambda text: [m.span() for m in expression.finditer(text) if m.group()]
    # Each by itself: one that goes on in a longer word would hide another that begins there and does not.
    phrases = [_compiled("(?i)" + r"[\s\p{Z}]+".join(map(_re2().escape, phrase.split()))) for phrase in rule.words]
    return lambda text: [m.span() for p in phrases for m in p.finditer(text) if _whole(text, *m.span())]


def _whole(text: str, start: int, end: int) -> bool:
    """Whether no letter or digit goes on before or after; what RE2 takes for a word is ASCII."""
    borders = text[max(0, start - 1) : start + 1], text[end - 1 : end + 1]
    return not any(re.fullmatch(r"\w\w", border) for border in borders)


def _re2() -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import re2
    except ImportError as error:
        raise ConfigError(f"rules need google-re2: {INSTALL}") from error
    return re2


def _compiled(expression: str) -> Any:
    """An RE2 expression.

    Raises:
        ConfigError: google-re2 is not installed.
        ValueError: RE2 does not take it.
    """
    re2 = _re2()
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(expression, options)
    except re2.error as error:
        said = error.args[0] if error.args else ""
        reason = said.decode(errors="replace") if isinstance(said, bytes) else said
        raise ValueError(f"RE2 does not take it: {reason} (it has no look-around and no back-references)") from None
