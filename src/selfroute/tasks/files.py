"""Countdown problems in files: the public column layout (`nums`, `target`) as JSONL or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfroute.errors import TaskError


def read_rows(path: Path) -> Iterator[tuple[tuple[int, ...], int]]:
    """Rows of the public column layout (`nums`: list of int, `target`: int) from a .jsonl or .parquet file.

    Raises:
        TaskError: no such file, another format, or bad rows (all of them are named, up to ten).
    """
    if not path.is_file():
        raise TaskError(f"no such file: {path} (a .jsonl or .parquet file with columns `nums` and `target`)")
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    elif path.suffix == ".jsonl":
        rows = jsonl_rows(path)
    else:
        raise TaskError(f"cannot read {path.name}: give a .jsonl or .parquet file")
    bad: list[str] = []
    good: list[tuple[tuple[int, ...], int]] = []
    for place, row in rows:
        fault = _fault(row)
        if fault:
            bad.append(f"{path.name}:{place}: {fault}")
        else:
            assert isinstance(row, dict)
            good.append((tuple(row["nums"]), row["target"]))
    if bad:
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise TaskError(f"{len(bad)} bad rows:\n  " + "\n  ".join(bad[:10]) + more)
    yield from good


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _fault(row: object) -> str | None:
    if isinstance(row, NotJSON):
        return f"is not JSON: {row.args[0]}"
    if not isinstance(row, dict) or "nums" not in row or "target" not in row:
        return "needs the columns `nums` and `target`"
    numbers, target = row["nums"], row["target"]

    def whole(n: object) -> bool:
        return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**9

    if not isinstance(numbers, list) or not 2 <= len(numbers) <= 6 or not all(map(whole, numbers)):
        return f"`nums` must be 2 to 6 whole numbers, not {str(numbers)[:60]}"
    if not whole(target):
        return f"`target` must be a whole number, not {str(target)[:60]}"
    return None


class NotJSON(Exception):  # noqa: N818
    """Stands for a line that cannot be read."""


def jsonl_rows(path: Path) -> Iterator[tuple[int, object]]:
    # A byte-order mark, as some editors write, is not part of the first line.
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, NotJSON(error)


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise TaskError("reading Parquet needs pyarrow: pip install 'selfroute[train]'") from error
    try:
        table = parquet.ParquetFile(path)
        missing = {"nums", "target"} - set(table.schema_arrow.names)
        if missing:
            raise TaskError(f"{path.name} has no column {' and '.join(sorted(missing))}")
        for name, kind, fits in (
            ("nums", "a list of integers", lambda t: _is_list(t) and pyarrow.types.is_integer(t.value_type)),
            ("target", "integers", pyarrow.types.is_integer),
        ):
            found = table.schema_arrow.field(name).type
            if not fits(found):
                raise TaskError(f"{path.name}: column {name!r} must hold {kind}, not {found}")
        number = 0
        for batch in table.iter_batches(columns=["nums", "target"]):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise TaskError(f"cannot read {path.name} as Parquet: {error}") from error
