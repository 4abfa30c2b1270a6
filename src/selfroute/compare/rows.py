"""What is kept of a finished row: its settings, its ledger, and a compressed record of each test problem.

OUT/TESTBED/testbed.json                           settings that all rows share
OUT/TESTBED/search/METHOD.json                     the learning rates that were tried, and the one chosen
OUT/TESTBED/rows/METHOD/seed-0.json                settings, ledger, calibration
OUT/TESTBED/rows/METHOD/seed-0.records.jsonl.gz    one record a test problem
OUT/TESTBED/rows/METHOD/seed-0.metrics.jsonl.gz    one record a training step
OUT/TESTBED/runs/...                               the run directories, with checkpoints; may be deleted

A row is finished when its .json is there, which is written last. Nothing else is needed for the report, so finished
rows can be moved, committed and added to.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfroute.errors import RunError
from selfroute.measures import Columns
from selfroute.records import SCHEMA, origin, read_json, write_bytes, write_json
from selfroute.routers.base import chance


@dataclass(frozen=True, slots=True)
class Record:
    """One test problem of one row.

    `score` orders the problems for the cloud. A response without a readable answer, where the method sees it
    (`undecided`), is asked first; None, where it has no score although it has an answer, is asked last. `asked` is the
    method's own decision, None where it makes none. `response` is what the device wrote; None in a router's row, whose
    responses are those of the model that it stands on. `device_*` is the answer without help (`answer` None where
    there is no readable one); `cloud_*` is the cloud's, whether it was asked or not. `solve_share` is the share of
    further samples that solve the problem, where the method asked about it. A `*_grade` is the verdict's, where the
    task is graded.
    """

    problem: str
    score: float | None
    undecided: bool
    asked: bool | None
    response: str | None
    answer: str | None
    device_correct: bool
    device_tokens: int
    cloud_correct: bool
    cloud_tokens: int
    cloud_cost_usd: float
    solve_share: float | None
    device_grade: float | None = None
    cloud_grade: float | None = None


ASK_FIRST = 1e3
"""A response without a readable answer scores at least this, above any other; its negative is below any other."""


def ordering(problem: str, score: float | None, undecided: bool) -> float:
    """A score that orders all responses, those without one too.

    Among those, the problem's name decides, which is chance: where more of them are first than a budget can pay for, a
    threshold takes as many as it can, and not none.
    """
    if score is not None and not undecided:
        return score
    place = ASK_FIRST + chance(problem)
    return place if undecided else -place


@dataclass(frozen=True, slots=True)
class Row:
    """A finished row of one seed."""

    method: str
    seed: int
    info: dict[str, Any]
    records: tuple[Record, ...]
    metrics: tuple[dict[str, Any], ...]

    def columns(self, threshold: float | None) -> Columns:
        """Arrays for the measures; asked is what lies above the threshold, or (None) the method's own decision."""
        score = np.array([ordering(r.problem, r.score, r.undecided) for r in self.records])
        if threshold is None:
            asked = np.array([float(bool(r.asked)) for r in self.records])
        else:
            asked = (score > threshold).astype(float)
        return Columns(
            score=score,
            asked=asked,
            device=np.array([float(r.device_correct) for r in self.records]),
            cloud=np.array([float(r.cloud_correct) for r in self.records]),
        ).graded([r.device_grade for r in self.records], [r.cloud_grade for r in self.records])


def write_row(
    testbed: Path,
    method: str,
    seed: int,
    info: dict[str, Any],
    records: Iterable[Record],
    metrics: Iterable[dict[str, Any]] = (),
) -> None:
    """Write a finished row, its .json last."""
    base = testbed / "rows" / method
    write_gzip(base / f"seed-{seed}.records.jsonl.gz", (asdict(r) for r in records))
    steps = list(metrics)
    if steps:
        write_gzip(base / f"seed-{seed}.metrics.jsonl.gz", steps)
    write_json(base / f"seed-{seed}.json", {"schema": SCHEMA, "method": method, "seed": seed, **info, **origin()})


VERSION = 1
"""Of what rows mean: raised where a change of the code would give another row for the same settings."""


def write_gzip(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Compressed JSONL, the same bytes for the same records."""
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    write_bytes(path, gzip.compress(text.encode(), mtime=0))


def read_gzip(path: Path) -> list[dict[str, Any]]:
    """Read compressed JSONL.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    except FileNotFoundError:
        raise RunError(f"no such file: {path} (remove the row's .json beside it to make it anew)") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RunError(f"{path} is damaged: {error} (remove the row's .json beside it to make it anew)") from error


def row_info(testbed: Path, method: str, seed: int) -> dict[str, Any] | None:
    """What is known of a row, or None where it is not finished."""
    file = testbed / "rows" / method / f"seed-{seed}.json"
    if not file.is_file():
        return None
    info = read_json(file)
    if not isinstance(info, dict) or info.get("schema") != SCHEMA:
        raise RunError(f"{file} is not a row of this version (schema {SCHEMA}): remove it, or give another --out")
    return info


def read_row(testbed: Path, method: str, seed: int) -> Row:
    """A finished row.

    Raises:
        RunError: it is not finished, or damaged.
    """
    base = testbed / "rows" / method
    info = row_info(testbed, method, seed)
    if info is None:
        raise RunError(f"{base / f'seed-{seed}.json'} is not there: the row is not finished")
    metrics = base / f"seed-{seed}.metrics.jsonl.gz"
    try:
        records = tuple(Record(**r) for r in read_gzip(base / f"seed-{seed}.records.jsonl.gz"))
    except TypeError as error:
        raise RunError(f"{base / f'seed-{seed}.records.jsonl.gz'} is not a row's records: {error}") from error
    return Row(method, seed, info, records, tuple(read_gzip(metrics)) if metrics.is_file() else ())


def check_names(testbed: Path, problems: Sequence[str]) -> None:
    """Stop where a row of an earlier version, which kept no hash of its problems, is of others than the test problems
    of these names.

    Raises:
        RunError: naming the row.
    """
    for method in methods_of(testbed):
        records = read_row(testbed, method, seeds_of(testbed, method)[0]).records
        if [r.problem for r in records] != list(problems):
            raise RunError(
                f"the row {method} in {testbed} is of other test problems ({len(records):,}, now {len(problems):,}): "
                "bring them back, or give another --out"
            )


def seeds_of(testbed: Path, method: str) -> list[int]:
    """The seeds of a method's finished rows."""
    files = (testbed / "rows" / method).glob("seed-*.json")
    return sorted(int(match[1]) for f in files if (match := re.fullmatch(r"seed-(-?\d+)\.json", f.name)))


def methods_of(testbed: Path) -> Sequence[str]:
    """The methods with a finished row."""
    return sorted(folder.name for folder in (testbed / "rows").glob("*") if seeds_of(testbed, folder.name))
