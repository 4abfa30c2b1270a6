"""Configs: one frozen pydantic class a command, read from TOML by name or path, changed by `key=value`.

Choices by name (a task, a cloud) are a table with `name` and that choice's own settings; the name is looked up in a
literal dict of dotted paths, and any other name with a colon is the dotted path of a class of the user's own.
"""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from selfroute.errors import ConfigError


class Config(BaseModel):
    """Base of every config: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Choice(BaseModel):
    """A choice by name: `name`, and beside it the chosen class's own settings."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str
    """A name from the list, or `package.module:Class`."""

    @property
    def settings(self) -> dict[str, Any]:
        """What stands beside the name."""
        return dict(self.model_extra or {})


C = TypeVar("C", bound=BaseModel)


def build(choice: Choice, known: Mapping[str, str], key: str = "") -> Any:
    """The object that a choice names: `Class(Class.Config(**settings))`. `key` is where it stands in its config.

    Raises:
        ConfigError: an unknown name, or settings that its Config refuses.
    """
    made = chosen(choice, known, key)
    return made(_settings(made, choice, key))


def resolve(choice: Choice, known: Mapping[str, str], key: str) -> Choice:
    """A choice with all of its settings, defaults written out, so that a record of it means the same for ever.

    `key` is where it stands in its config.

    Raises:
        ConfigError: as from `build`.
    """
    settings = _settings(chosen(choice, known, key), choice, key)
    return Choice(name=choice.name, **settings.model_dump(mode="json"))


def _settings(made: Any, choice: Choice, key: str) -> BaseModel:
    where, under = (f"{key} {choice.name!r}", f"{key}.") if key else (choice.name, "")
    settings: BaseModel = validate(made.Config, choice.settings, where, under=under)
    return settings


def chosen(choice: Choice, known: Mapping[str, str], key: str = "") -> Any:
    """The class that a choice names. `key` is where the choice stands in its config.

    Raises:
        ConfigError: there is none of that name, or it has no `Config`.
    """
    path = known.get(choice.name, choice.name)
    module, colon, name = path.partition(":")
    if not module or not colon:
        where = f"{key}.name: " if key else ""
        raise ConfigError(
            f"{where}no such choice: {choice.name!r}{_near(choice.name, known)} (known: {', '.join(sorted(known))}; "
            "or package.module:Class)"
        )
    try:
        made = getattr(importlib.import_module(module), name)
        if not issubclass(made.Config, BaseModel):
            raise ConfigError(f"{path!r} needs a `Config`, a pydantic class of its settings")
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot import {path!r}: {error}") from error
    return made


def validate(kind: type[C], values: Mapping[str, Any], where: str, *, under: str = "") -> C:
    """`kind(**values)`, with every fault on a line of its own, its key written with `under` before it. A table's keys
    are listed once, however many are not among them.

    Raises:
        ConfigError: naming each bad key, its value and what was expected.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        lines: list[str] = []
        listed: set[tuple[str, ...]] = set()
        for fault in error.errors():
            key = ".".join(map(str, fault["loc"]))
            if fault["type"] == "extra_forbidden" and (known := _fields(kind, fault["loc"][:-1])):
                *tables, last = map(str, fault["loc"])
                near = _near(last, known, under + "".join(f"{table}." for table in tables))
                fault["msg"] += near or ("" if tuple(tables) in listed else f"; known: {', '.join(known)}")
                listed |= set() if near else {tuple(tables)}
            elif fault["type"] == "model_type":
                fault["msg"] = f"a table, whose values are written {under}{key}.KEY=VALUE"
            elif fault["type"] in ("tuple_type", "list_type"):
                example = f'{under}{key}=["a", "b"]'
                fault["msg"] = f"a list, such as {example!r} (in a shell with the outer quotes)"
            # Where a key for an API was written down by mistake, it is not repeated.
            secret = "key" in key.lower()
            got = "" if secret or not key or fault["type"] == "missing" else f" (got {fault['input']!r:.80})"
            message = fault["msg"].removeprefix("Value error, ")
            lines.append(f"  {under}{key}: {message}{got}" if key else f"  {message}")
        raise ConfigError(f"{where} cannot be used:\n" + "\n".join(lines)) from None


def _fields(kind: type[BaseModel], tables: Sequence[int | str]) -> Sequence[str]:
    """The keys of a table in a config; none where it is not of one kind."""
    for table in tables:
        inside = kind.model_fields[str(table)].annotation if str(table) in kind.model_fields else None
        if not (isinstance(inside, type) and issubclass(inside, BaseModel)):
            return ()
        kind = inside
    return tuple(kind.model_fields)


def _near(name: str, known: Iterable[str], under: str = "") -> str:
    """What may have been meant by a name that is not known; "" where none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {under}{near[0]}?" if near else ""


def names() -> list[str]:
    """Configs that come with the package."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in (resources.files("selfroute") / "configs").iterdir()
        if entry.name.endswith(".toml")
    )


def load(kind: type[C], name: str, overrides: Sequence[str] = ()) -> C:
    """Read a config by package name or path and apply `key=value` overrides (dotted keys reach into tables).

    Raises:
        ConfigError: no such config, bad TOML, or values that do not fit.
    """
    values = read(name)
    if not values.keys() <= kind.model_fields.keys():
        if name in names():
            raise ConfigError(f"{name} is a config of another command: {_command(name)}")
        unknown = {key: value for key, value in values.items() if key not in kind.model_fields}
        command = _looks_like(unknown)
        if command:
            raise ConfigError(f"{name} looks like a config of `selfroute {command}`")
    return validate(kind, override({**defaults(kind), **values}, overrides), name)


def defaults(kind: type[BaseModel]) -> dict[str, Any]:
    """The choices by name that a config has where a file says nothing, so that overrides reach into them."""
    fields = kind.model_fields.items()
    return {name: field.default.model_dump() for name, field in fields if isinstance(field.default, Choice)}


def read(name: str) -> dict[str, Any]:
    """What stands in a config, by package name or path.

    Raises:
        ConfigError: no such config, or bad TOML.
    """
    try:
        return tomllib.loads(_text(name))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from error


def _text(name: str) -> str:
    if name in names():
        return (resources.files("selfroute") / "configs" / f"{name}.toml").read_text(encoding="utf-8")
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8", errors="replace")
    if name.endswith(".toml") or "/" in name:
        raise ConfigError(f"no such file: {name}")
    raise ConfigError(f"no such config: {name!r}{_near(name, names())} (a .toml file, or one of: {', '.join(names())})")


def _command(name: str) -> str:
    """The command that a config of the package states in its first lines."""
    text = _text(name).replace("\\\n#", "")
    found = re.search(rf"(selfroute \w+|accelerate launch .*?) {re.escape(name)}\b", text)
    assert found is not None
    return " ".join(found[0].split())


_SIGNS = {
    "stages": "train",
    **dict.fromkeys(("testbed", "methods"), "compare"),
    **dict.fromkeys(("hidden_size", "traces_per_problem", "attempts_max"), "warmstart"),
    **dict.fromkeys(("host", "port", "keys", "privacy", "policy", "bias"), "serve"),
    # Last: the configs of other commands have some of these too.
    **dict.fromkeys(("task", "steps", "sampling", "reward"), "train"),
}
"""Keys that tell a config's command, the first that it has."""


def _looks_like(unknown: Mapping[str, Any]) -> str:
    """The command that a config seems to be of, by the keys that another does not know; "" where they tell nothing.

    >>> _looks_like({"task": {}, "lr": 1e-3}), _looks_like({"stpes": 3})
    ('train', '')
    """
    command = next((command for key, command in _SIGNS.items() if key in unknown), "")
    return command or ("serve" if isinstance(unknown.get("budget"), Mapping) else "")


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `key=value` pairs; a value is read as TOML where it can be, else as text.

    Another choice by name begins without the settings of the one before.

    >>> override({"steps": 10, "cloud": {"name": "oracle"}}, ["steps=20", "cloud.accuracy=0.7"])
    {'steps': 20, 'cloud': {'name': 'oracle', 'accuracy': 0.7}}
    >>> override({"cloud": {"name": "oracle", "accuracy": 0.7}}, ["cloud.model=gpt-5", "cloud.name=openai"])
    {'cloud': {'model': 'gpt-5', 'name': 'openai'}}
    """
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    given: set[str] = set()
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"an override is key=value, such as steps=20; got {item!r}")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        *tables, last = key.split(".")
        place = result
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{key}: {table!r} is a value, not a table")
        if tables and last == "name" and place.get("name", value) != value:
            for other in [k for k in place if not _gave(given, ".".join([*tables, k]))]:
                del place[other]
        place[last] = value
        given.add(key)
    return result


def _gave(given: Iterable[str], key: str) -> bool:
    """Whether a key, or one inside its table, is among those given."""
    return any(one == key or one.startswith(f"{key}.") for one in given)
