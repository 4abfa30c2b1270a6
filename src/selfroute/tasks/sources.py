"""Rows of problems: from JSONL, JSON, CSV and Parquet files, from folders of them, or from the Hugging Face hub.

Local files come first; without a network the hub is given up at once, with a word on how to fetch what is missing.
Left out on purpose: what the columns mean.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfroute.errors import TaskError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PARTS = ("train", "calibration", "test")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` reads a byte as that is no UTF-8, so that one such row costs no other."""
_WIDEST_CELL = 2**31 - 1
FAULTS_SHOWN = 100
"""Bad rows that an error names; of more it says how many."""
PROBE_S = 10.0
"""A hub that says nothing for so many seconds is out of reach."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row and where it stands, such as `test.jsonl:7`; `fault` says why it cannot be read ("" where it can)."""

    place: str
    values: Mapping[str, Any]
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Hub:
    """A data set on the hub: its id, what it calls each of the `PARTS` that it has, its configs (all are read), and the
    commit that is read where no other is asked for; "" for the newest."""

    id: str
    parts: Mapping[str, str]
    configs: tuple[str | None, ...] = (None,)
    commit: str = ""


@dataclass(frozen=True, slots=True)
class Files:
    """Local files by the part that they hold; those of the part `all` are not divided."""

    parts: Mapping[str, list[Path]] = field(default_factory=dict)


def find_files(place: Path, names: Mapping[str, Collection[str]]) -> Files:
    """The files of a data set at a place: one file, or a folder.

    In a folder, `part_of` says which part a file is (those of none are left alone); of a data set without `names`,
    which is not divided, it is every file.

    Raises:
        TaskError: there is nothing, or nothing that can be read, or a file could be of two parts.
    """
    if place.is_file():
        if place.suffix not in SUFFIXES:
            raise TaskError(f"cannot read {place.name}: give a {', '.join(SUFFIXES)} file")
        return Files({"all": [place]})
    if not place.is_dir():
        raise TaskError(f"no such file or folder: {place}")
    found = sorted(file for suffix in SUFFIXES for file in place.rglob(f"*{suffix}"))
    if not names:
        parts = {"all": found} if found else {}
    else:
        part = {file: part_of(file.relative_to(place), names) for file in found}
        parts = {name: [file for file in found if part[file] == name] for name in names if name in part.values()}
    if not parts:
        wanted = (
            f"{listed([f'{part}.jsonl' for part in names])}, or the like" if names else f"a {', '.join(SUFFIXES)} file"
        )
        raise TaskError(f"nothing to read in {place}: it needs {wanted}")
    return Files(parts)


def part_of(file: Path, names: Mapping[str, Collection[str]]) -> str | None:
    """The part that a file is of: that with a name which its own begins with, the longest such name; or else that which
    one of its folders is called after. None where there is none.

    >>> part_of(Path("testbed/train-0.jsonl"), {"train": ["train"], "test": ["test"]})
    'train'

    Raises:
        TaskError: it could be of two.
    """
    known = [(name.lower(), part) for part, called in names.items() for name in called]
    own = [(len(name), part) for name, part in known if file.name.lower().startswith(name)]
    folders = [folder.lower() for folder in file.parts[:-1]]
    # Called after it: train_data or test-v1, but no testbed.
    called = {part for name, part in known if any(re.match(rf"{re.escape(name)}(?![a-z])", f) for f in folders)}
    parts = {part for length, part in own if length == max(own)[0]} or called
    if len(parts) > 1:
        raise TaskError(f"{file} could be of {listed(sorted(parts))}: begin its name with one of them")
    return parts.pop() if parts else None


def find_named(folder: Path, name: str) -> Path | None:
    """`folder/name` with one of the known endings, or a folder of that name; None where there is neither."""
    for place in (folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)):
        if place.is_file() or place.is_dir():
            return place
    return None


def read_files(files: Sequence[Path]) -> Iterator[Row]:
    """All rows of some files, one after the other.

    Raises:
        TaskError: a file as a whole cannot be read.
    """
    for file in files:
        yield from _READERS[file.suffix](file)


def _jsonl(file: Path) -> Iterator[Row]:
    # A byte-order mark, as some editors write, is not part of the first line.
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{file.name}:{number}"
                if fault := _encoding_fault(line):
                    yield Row(place, {}, fault)
                    continue
                try:
                    yield _row(place, json.loads(line))
                except (ValueError, RecursionError) as error:
                    yield Row(place, {}, f"is not JSON: {error}")


def _encoding_fault(text: str) -> str:
    bad = _NOT_UTF8.search(text)
    return f"is not UTF-8: it holds the byte 0x{ord(bad[0]) - 0xDC00:02x}" if bad else ""


def _json(file: Path) -> Iterator[Row]:
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{file} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise TaskError(f"{file} must hold a list of objects, not {type(rows).__name__}")
    whole = not _NOT_UTF8.search(text)
    for number, values in enumerate(rows, 1):
        fault = "" if whole else _encoding_fault(json.dumps(values, ensure_ascii=False))
        yield Row(f"{file.name}:{number}", {}, fault) if fault else _row(f"{file.name}:{number}", values)


def _row(place: str, values: object) -> Row:
    if isinstance(values, dict):
        return Row(place, values)
    return Row(place, {}, f"must be an object with columns, not {type(values).__name__}")


def _csv(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader, number = csv.reader(lines, strict=True), 0
        try:
            columns = _next_cells(reader) or []
            if fault := _encoding_fault("".join(columns)):
                raise TaskError(f"{file.name}: its first line {fault}")
            twice = sorted({name for name in columns if name and columns.count(name) > 1})
            if twice:
                raise TaskError(f"{file.name} has several columns called {listed(twice)}: give each a name of its own")
            number = reader.line_num
            while (cells := _next_cells(reader)) is not None:
                number = reader.line_num
                if cells:
                    fault = _encoding_fault("".join(cells))
                    if len(cells) != len(columns):
                        fault = "has another number of cells than the first line"
                    yield Row(f"{file.name}:{number}", dict(zip(columns, cells, strict=False)), fault)
        except csv.Error as error:
            raise TaskError(f"{file.name} is not CSV after line {number}: {error}") from error


def _next_cells(reader: Iterator[list[str]]) -> list[str] | None:
    """The next line's cells, of any width; None at the end. The limit on it is of all readers, so it is put back."""
    before = csv.field_size_limit(_WIDEST_CELL)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _parquet(file: Path) -> Iterator[Row]:
    with _opened(file) as table:
        number = 0
        for batch in table.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{file.name}:{number}", values)


def parquet_schema(file: Path) -> Any:
    """The columns of a Parquet file and their types, as pyarrow's schema.

    Raises:
        TaskError: it is none.
    """
    with _opened(file) as table:
        return table.schema_arrow


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise TaskError("reading Parquet needs pyarrow: pip install 'selfroute[tasks]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            yield table
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise TaskError(f"cannot read {file.name} as Parquet: {error}") from error


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


@dataclass(frozen=True, slots=True)
class HubRows:
    """Rows of the data set `hub` at a commit (None where it cannot be told)."""

    hub: str
    commit: str | None
    rows: Iterator[Row]


def read_hub(hubs: Sequence[Hub], part: str, *, revision: str | None, advice: str) -> HubRows:
    """All rows of a part from the first of some hub data sets that is there, at one commit.

    Args:
        hubs: the data set and its mirrors, the best first; a `revision` that is not a commit is one of the first alone.
        part: one of `PARTS`.
        revision: a commit, branch or tag; None for the data set's own `commit`.
        advice: what to do where the hub cannot be reached.

    Raises:
        TaskError: no network, offline, or none of them is there; says what to fetch, and how.
    """
    try:
        import datasets
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise TaskError(f"the hub needs datasets: pip install 'selfroute[tasks]'. {advice}") from error
    refused = []
    for hub in hubs if revision is None or _COMMIT.fullmatch(revision) else hubs[:1]:
        what, wanted = describe(hub, part, revision), revision or hub.commit or None
        try:
            # Asked first, since loading tries a dead network for half a minute; and so that all is of one commit.
            if not _offline():
                wanted = HfApi().dataset_info(hub.id, revision=wanted, timeout=PROBE_S).sha
            loaded = [
                datasets.load_dataset(hub.id, config, split=hub.parts[part], revision=wanted) for config in hub.configs
            ]
            commit = _commit(loaded)
            if commit and wanted and _COMMIT.fullmatch(wanted) and commit != wanted:
                raise ValueError(f"the cache holds commit {commit} alone")
        except (HfHubHTTPError, FileNotFoundError, ValueError) as error:
            # Not there, not for everybody, or of another layout.
            refused.append(f"{what}: {_first_line(error)}")
        except Exception as error:
            # No network has many names. Offline the cache may hold a mirror.
            refused.append(f"{what}: {_first_line(error)}")
            if not _offline():
                break
        else:
            return HubRows(hub.id, commit, _hub_rows(hub, loaded))
    raise TaskError("cannot load from the hub:\n  " + "\n  ".join(refused) + f"\n{advice}")


def _commit(loaded: Sequence[Any]) -> str | None:
    """The commit that loaded rows are of: their folder in the cache is called by it, also where there is no network."""
    folders = {Path(file["filename"]).parent.name for rows in loaded for file in rows.cache_files}
    [commit] = folders if len(folders) == 1 else [""]
    return commit if _COMMIT.fullmatch(commit) else None


def _hub_rows(hub: Hub, loaded: Sequence[Any]) -> Iterator[Row]:
    for config, rows in zip(hub.configs, loaded, strict=True):
        for number, values in enumerate(rows, 1):
            yield Row(f"{hub.id}{f'/{config}' if config else ''}:{number}", values)


def describe(hub: Hub, part: str, revision: str | None) -> str:
    """A part of a hub data set, in full."""
    configs = ", ".join(config or "default" for config in hub.configs)
    return f"{hub.id} (config {configs}, split {hub.parts[part]}, revision {revision or hub.commit or 'newest'})"


def export_command(hub: Hub, part: str, revision: str | None, file: str) -> str:
    """A command for a machine with a network, which writes a part of a data set into a file."""
    revision = revision or hub.commit
    loads = [
        f"load_dataset({', '.join(map(repr, [hub.id, *([config] if config else [])]))}, split={hub.parts[part]!r}"
        + (f", revision={revision!r})" if revision else ")")
        for config in hub.configs
    ]
    rows = loads[0] if len(loads) == 1 else f"concatenate_datasets([{', '.join(loads)}])"
    return f'python -c "from datasets import *; {rows}.to_json({file!r})"'


def listed(names: Sequence[str]) -> str:
    """Names in a row, the last one after `and`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE) or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def refuse(faults: Sequence[str]) -> None:
    """Stop, naming all bad rows.

    Raises:
        TaskError: there is one.
    """
    if faults:
        more = f"\n  and {len(faults) - FAULTS_SHOWN:,} more" if len(faults) > FAULTS_SHOWN else ""
        rows = "1 bad row" if len(faults) == 1 else f"{len(faults):,} bad rows"
        raise TaskError(f"{rows}:\n  " + "\n  ".join(faults[:FAULTS_SHOWN]) + more)
