"""A run directory: the resolved config with its origin, and versioned JSONL records that survive a kill.

RUN/run.json        command, config, seed, versions, git commit, where its problems came from and their SHA-256
RUN/metrics.jsonl   one line a training step
RUN/cloud.sqlite    the cloud's cache and ledger
RUN/judge.sqlite    the judge's, where a task has one
RUN/checkpoints/    step-000100/, ...
RUN/evaluations/    NAME/records.jsonl
RUN/best/           evaluations, calibration and report of the best checkpoint, where one is kept
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from selfroute.errors import RunError

SCHEMA = 2
"""Version of every record; a reader refuses others."""


def write_atomic(path: Path, text: str) -> None:
    """Write a whole text file or nothing: a kill leaves the old one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: a kill leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, readable by people."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"no such file: {path}") from None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole JSONL file atomically, each record stamped with the schema version."""
    write_atomic(path, "".join(_line(record) for record in records))


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add one record to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(record))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({"schema": SCHEMA, **record}, allow_nan=False) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file, the schema stamps taken off; a last line cut by a kill is left out.

    Raises:
        RunError: it is missing, damaged before its last line, or of another schema version.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise RunError(f"no such file: {path}") from None
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RunError(f"{path}:{number} is damaged: {error}") from error
        if not isinstance(record, dict):
            raise RunError(f"{path}:{number} is damaged: not an object")
        version = record.pop("schema", None)
        if version != SCHEMA:
            raise RunError(f"{path}:{number} has schema {version}; this version reads {SCHEMA}")
        records.append(record)
    return records


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if (p / "state.json").is_file())


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the best score that the newest one knows of, the first of equals; None where none is kept."""
    saved = checkpoints(run)
    scores: dict[str, float] = read_json(saved[-1] / "state.json").get("scores", {}) if saved else {}
    best = max(scores, key=lambda name: scores[name], default=None)
    return next((path for path in saved if path.name == best), None)


def results(run: Path, *, best: bool) -> Path:
    """Where what was found out about a run's checkpoint is: the newest one's in RUN, the best one's in RUN/best."""
    return run / "best" if best else run


@contextmanager
def lock_run(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep a run directory to one process at a time; the lock goes when the process does, however it ends.

    Raises:
        RunError: another process holds it, and it is not waited for.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, not a directory")
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            raise RunError(f"{path} is in use by another selfroute process") from None
        yield


def open_run(
    path: Path,
    command: str,
    config: Mapping[str, Any],
    *,
    resume: bool,
    free: Collection[str] = (),
    as_now: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Create a run directory, or open it again with `resume`. One in which nothing was done yet is made anew.

    `free` are keys, dots between tables, that may change on the way; the newest values stand in run.json. `as_now`
    reads a config that an earlier version wrote down. `data` is the provenance of the run's problems.

    Raises:
        RunError: it exists and `resume` is off, or was made with another config or on other problems.
    """
    file = path / "run.json"
    metrics = path / "metrics.jsonl"
    # Through TRL, `checkpoint-N` stands for the first two.
    begun = (
        bool(checkpoints(path))
        or (metrics.exists() and metrics.stat().st_size > 0)
        or any(path.glob("checkpoint-*"))
        or (path / "evaluations").exists()
    )
    if file.exists() and begun:
        if not resume:
            raise RunError(f"{path} already holds a run: continue it with --resume, or give another --out")
        known = read_json(file)
        before, now = (without(as_now(c), free) for c in (known.get("config", {}), config))
        changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        if changed:
            saved = checkpoints(path) if "steps" in changed else []
            more = (
                f"; for more steps, start from its last checkpoint: device.model={saved[-1]} --out NEW" if saved else ""
            )
            raise RunError(
                f"{path} was made with other settings ({', '.join(changed)}): "
                f"resume with the same config, or give another --out{more}"
            )
        check_problems(path, known.get("data", {}), data or {}, "give another --out")
        # A run that was evaluated first, or that an earlier version made, does not know its problems yet.
        now_known = {**known, "config": config, "data": known.get("data") or dict(data or {})}
        if known != now_known:
            write_json(file, now_known)
        return
    if begun:
        raise RunError(f"{path} holds results but no run.json, so it is not clear whose: give another --out")
    write_json(file, {"command": command, "config": config, "data": dict(data or {}), **origin()})


def known_data(run: Path) -> dict[str, Any]:
    """The provenance of a run's problems; {} where there is no run yet, or an earlier version made it."""
    file = run / "run.json"
    known = read_json(file) if file.is_file() else {}
    return dict(known.get("data", {})) if isinstance(known, dict) else {}


def check_problems(folder: Path, known: Mapping[str, Any], data: Mapping[str, Any], otherwise: str) -> None:
    """Stop where what is in a folder was made with other problems, those that `known` tells of, than those of `data`.

    A split that either does not tell of passes. `otherwise` is what to do if the problems are to stay as they are now.

    Raises:
        RunError: the problems of a split have changed.
    """
    for split in ("train", "calibration", "test"):
        then, now = known.get(split), data.get(split)
        if then and now and then["sha256"] != now["sha256"]:
            sources = [s.get("file") or f"{s.get('hub')} at {s.get('commit')}" for s in known.get("sources", [])]
            raise RunError(
                f"{folder} was made with other {split} problems ({then['problems']:,}, now {now['problems']:,}) from "
                f"{', '.join(sources) or 'its task'}: bring them back, or {otherwise}"
            )


def without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """A config without some keys, dots between tables.

    >>> without({"lr": 1, "cloud": {"name": "openai", "max_retries": 3}}, ["cloud.max_retries", "seed"])
    {'lr': 1, 'cloud': {'name': 'openai'}}
    """
    inner: dict[str, list[str]] = {}
    for key in keys:
        table, _, rest = key.partition(".")
        inner.setdefault(table, []).append(rest)
    return {
        k: without(v, inner[k]) if k in inner and isinstance(v, Mapping) else v
        for k, v in config.items()
        if "" not in inner.get(k, [])
    }


_PACKAGES = ("selfroute", "torch", "transformers", "accelerate", "numpy", "scikit-learn", "reasoning-gym")


def origin() -> dict[str, Any]:
    """What code made something: the git commit, and the versions that matter to its numbers."""
    return {
        "git": _git_commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that this code runs from; None where git does not track it, as in a wheel."""
    here = Path(__file__).resolve()

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *args], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() or None if done.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", here.name)
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if tracked else None
