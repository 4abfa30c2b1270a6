"""What is in a comparison's folder already must be of the settings and of the models that it goes on with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfroute.compare.config import CompareConfig
from selfroute.compare.methods import METHODS, TASK_TUNED
from selfroute.compare.rows import Row, methods_of, read_row, row_info, seeds_of
from selfroute.errors import RunError


def check_trained(config: CompareConfig, path: Path, method: str, trained: Mapping[str, Any]) -> None:
    """Stop where something was trained with other settings, those apart that change no answer.

    Raises:
        RunError: naming the settings.
    """
    if changed := config.changed(method, trained):
        raise RunError(f"{path} was made with other settings ({', '.join(changed)}): give another --out, or remove it")


def check_tried(config: CompareConfig, search: Path, method: str, tried: Mapping[str, Any]) -> None:
    """Stop where a learning rate was tried with other settings. An earlier version kept none, but in the method's rows.

    Raises:
        RunError: as from `check_trained`; or nothing says with which settings.
    """
    if "config" in tried:
        check_trained(config, search, method, tried["config"])
        return
    testbed = search.parent.parent
    finished = seeds_of(testbed, method)
    info = row_info(testbed, method, finished[0]) if finished else None
    if info is None:
        raise RunError(f"{search} does not say with which settings: remove it")
    check_trained(config, testbed / "rows" / method, method, info["config"])


def check_weights(testbed: Path, base: str, seed: int, checkpoint: Path) -> None:
    """Stop where routers would stand on another model than the row's, which may have been trained elsewhere.

    Raises:
        RunError: naming the row.
    """
    row = row_info(testbed, base, seed)
    if row and row.get("weights_sha256") not in (None, weights(checkpoint)):
        raise _other_model(testbed, base, seed)


def check_answers(testbed: Path, seed: int, answers: Sequence[str | None]) -> None:
    """The same by the task-tuned model's answers, which are all that a row of an earlier version has.

    Raises:
        RunError: naming the row.
    """
    if [r.answer for r in read_row(testbed, TASK_TUNED, seed).records] != list(answers):
        raise _other_model(testbed, TASK_TUNED, seed)


def base_of(row: Row) -> str | None:
    """The method whose model a row stands on; None: its own."""
    if row.method in METHODS:
        return METHODS[row.method].on
    swapped, at, _ = row.method.partition("@")
    return row.info.get("same_as") or (swapped if at else None)


def check_base(testbed: Path, row: Row, base: Row) -> None:
    """Stop where a row stands on another model than the one whose row is there now.

    Raises:
        RunError: naming the row.
    """
    votes = row.method in METHODS and METHODS[row.method].votes
    same = votes or [r.answer for r in row.records] == [r.answer for r in base.records]
    if not same or not _agree(row.info.get("config"), base.info.get("config")):
        raise RunError(
            f"the row {row.method}, seed {row.seed}, in {testbed} stands on another model than that of {base.method}, "
            f"which was made anew: remove {testbed / 'rows' / row.method}"
        )


def check_bases(testbed: Path, seed: int) -> None:
    """`check_base` of all rows of a seed that are there, with what they stand on.

    Raises:
        RunError: naming the row.
    """
    rows = {method: read_row(testbed, method, seed) for method in methods_of(testbed)
            if row_info(testbed, method, seed) is not None}  # fmt: skip
    for row in rows.values():
        if base := rows.get(base_of(row) or ""):
            check_base(testbed, row, base)


def _agree(one: Any, other: Any) -> bool:
    """Whether two configs are of the same settings, as far as both have them: later versions have more."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_agree(one[key], other[key]) for key in one.keys() & other.keys())
    return bool(one == other)


def check_place(testbed: Path, row: Row) -> None:
    """Stop where a row's file stands in another row's place.

    Raises:
        RunError: naming both.
    """
    said = row.info.get("method"), row.info.get("seed")
    if said != (row.method, row.seed):
        raise RunError(f"{testbed / 'rows' / row.method}, seed {row.seed}, is the row {said[0]}, seed {said[1]}")


def _other_model(testbed: Path, base: str, seed: int) -> RunError:
    return RunError(
        f"the model of {base}, seed {seed}, trained again, is not that of the row that is there (another processor or "
        f"thread count?): remove {testbed / 'rows' / base} and its routers' rows"
    )


def weights(folder: str | Path) -> str | None:
    """SHA-256 of a model's weights; None for one that is not a folder here (a hub id)."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest() if files else None
