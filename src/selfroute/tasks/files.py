"""Countdown problems in files: the public column layout (`nums`, `target`) as JSONL or Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selfroute.errors import TaskError
from selfroute.tasks.sources import parquet_schema, read_files, refuse


def read_rows(path: Path) -> Iterator[tuple[tuple[int, ...], int]]:
    """Rows of the public column layout (`nums`: list of int, `target`: int) from a .jsonl or .parquet file.

    Raises:
        TaskError: no such file, another format, or bad rows (all of them are named, up to ten).
    """
    if not path.is_file():
        raise TaskError(f"no such file: {path} (a .jsonl or .parquet file with columns `nums` and `target`)")
    if path.suffix not in (".jsonl", ".parquet"):
        raise TaskError(f"cannot read {path.name}: give a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        _check_columns(path)
    good: list[tuple[tuple[int, ...], int]] = []
    faults: list[str] = []
    for row in read_files([path]):
        fault = row.fault or _fault(row.values)
        if fault:
            faults.append(f"{row.place}: {fault}")
        else:
            good.append((tuple(row.values["nums"]), row.values["target"]))
    refuse(faults)
    yield from good


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _fault(row: Mapping[str, Any]) -> str:
    if "nums" not in row or "target" not in row:
        return "needs the columns `nums` and `target`"
    numbers, target = row["nums"], row["target"]

    def whole(n: object) -> bool:
        return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**9

    if not isinstance(numbers, list) or not 2 <= len(numbers) <= 6 or not all(map(whole, numbers)):
        return f"`nums` must be 2 to 6 whole numbers, not {str(numbers)[:60]}"
    if not whole(target):
        return f"`target` must be a whole number, not {str(target)[:60]}"
    return ""


def _check_columns(path: Path) -> None:
    schema = parquet_schema(path)
    missing = {"nums", "target"} - set(schema.names)
    if missing:
        raise TaskError(f"{path.name} has no column {' and '.join(sorted(missing))}")
    from pyarrow import types

    for name, kind, fits in (
        ("nums", "a list of integers", lambda t: _is_list(t) and types.is_integer(t.value_type)),
        ("target", "integers", types.is_integer),
    ):
        found = schema.field(name).type
        if not fits(found):
            raise TaskError(f"{path.name}: column {name!r} must hold {kind}, not {found}")
