r"""Which columns of a user's own rows hold what: `question = "{context}\n\n{prompt}"`, `answer = "gold"`.

    Columns (what the config says) + row -> Cells (what the row has in their place)

Left out on purpose: what an answer, options or cases mean (the verifiers').
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import field_validator

from selfroute.config import Config

Row = Mapping[str, Any]
"""A row as its file has it: a value for each column."""
Cells = Mapping[str, Any]
"""What a row has for each of the `Columns` that are named; its question is put together already."""

_WHOLE = 60
"""Characters of a bad value that are shown."""


class RowError(ValueError):
    """What is wrong with a row, beginning with the column."""


class Columns(Config):
    r"""The columns of a file by what they hold."""

    question: str
    r"""The text that the device gets: a column, or a template with columns in braces, such as
    `"{context}\n\n{prompt}"` (a brace that is meant as such is doubled)."""
    answer: str | None = None
    """The reference answer; a list means any of them. For `code` a program that is right, which also says what
    asserts judge; for `regex` and a function of your own an example, for `selfroute tasks check` alone."""
    options: str | tuple[str, ...] | None = None
    """`choice`: the column with the list of options, or a list of columns with one option each."""
    pattern: str | None = None
    """`regex`: the column with each problem's own pattern."""
    cases: str | None = None
    """`code`: an object (or its JSON) with the lists `inputs` and `outputs`; and `fn_name`, if a function is called."""
    tests: str | None = None
    """`code`: a list (or its JSON) of asserts."""

    @field_validator("question")
    @classmethod
    def _a_template(cls, question: str) -> str:
        try:
            parts = list(string.Formatter().parse(question))
        except ValueError as error:
            raise ValueError(f"not a template: {error}; a brace that is meant as such is doubled") from error
        if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
            raise ValueError("braces hold a column's name and nothing else, such as {prompt}")
        return question


def cells(columns: Columns, row: Row) -> dict[str, Any]:
    """What a row holds for each of the columns that are named.

    Raises:
        RowError: a column is not there, or the question is none.
    """
    named = {key: name for key, name in columns.model_dump().items() if name is not None and key != "question"}
    parts = _parts(columns.question)
    needed = [("question", name) for _, name in parts if name]
    for key, name in named.items():
        needed += [(key, one) for one in ([name] if isinstance(name, str) else name)]
    for key, name in needed:
        if name not in row:
            raise RowError(
                f"{name}: no such column (task.columns.{key}); there is {', '.join(map(str, row)) or 'none'}"
            )
    found = {
        key: row[name] if isinstance(name, str) else [text(row[one], one) for one in name]
        for key, name in named.items()
    }
    question = "".join(before + (_filled(row[name], name) if name else "") for before, name in parts).strip()
    if not question:
        raise RowError(f"{columns.question}: there is no question in it")
    return {"question": question, **found}


def text(value: object, column: str) -> str:
    """A value as text: text that is not empty, a number, or yes and no as `true` and `false`.

    Raises:
        RowError: it is none of these.
    """
    shown = _filled(value, column).strip()
    if not shown:
        raise RowError(f"{column} is empty")
    return shown


def texts(value: object, column: str) -> tuple[str, ...]:
    """One value, or each of a list of them, as text.

    Raises:
        RowError: there is none, or one is no text.
    """
    if not isinstance(value, list):
        return (text(value, column),)
    if not value:
        raise RowError(f"{column} is an empty list")
    return tuple(text(one, column) for one in value)


def structure(value: object, column: str) -> Any:
    """A list or an object, which CSV files hold as JSON.

    Raises:
        RowError: it is text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{column} is not JSON: {error}") from error


def show(value: object) -> str:
    """The beginning of a value, for an error."""
    return repr(value)[:_WHOLE]


def name_of(columns: Columns, key: str) -> str:
    """What the file calls a column, for an error."""
    name = getattr(columns, key)
    return name if isinstance(name, str) else ", ".join(name or (key,))


def _parts(question: str) -> Sequence[tuple[str, str | None]]:
    """Pairs of a text and the column that follows it; a question without braces is a column's name."""
    parts = [(before, name) for before, name, _, _ in string.Formatter().parse(question)]
    return parts if any(name for _, name in parts) else [("", question)]


def _filled(value: object, column: str) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    if missing or not isinstance(value, (str, int, float)):
        raise RowError(f"{column} must be text or a number, not {'missing' if missing else show(value)}")
    return str(value).lower() if isinstance(value, bool) else str(value)
