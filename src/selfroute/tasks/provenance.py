"""What a run's problems were and where they came from, so that a later command can tell whether they still are.

    {"sources": [{"hub": "openai/gsm8k", "asked": null, "commit": "e53f048..."}],
     "train": {"problems": 6863, "sha256": "..."}, "calibration": ..., "test": ...}

It stands in run.json under `data`. Left out on purpose: how files and commits are read (`datasets`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfroute.config import Choice
from selfroute.errors import TaskError
from selfroute.records import check_problems, known_data
from selfroute.tasks import Task, make_task
from selfroute.tasks.datasets import Loader
from selfroute.types import Problem, Split


def provenance(task: Task, needed: Split, *others: Split) -> dict[str, Any]:
    """Where a task's problems come from, and the fingerprint of each split; one of the `others` may be missing.

    Raises:
        TaskError: the split that is needed cannot be loaded.
    """
    found: dict[str, Any] = {needed: fingerprint(task.load(needed))}
    for split in others:
        try:
            found[split] = fingerprint(task.load(split))
        except TaskError:
            continue
    data = getattr(task, "data", None)
    return {"sources": data.sources if isinstance(data, Loader) else [], **found}


def fingerprint(problems: Sequence[Problem]) -> dict[str, Any]:
    """How many problems there are, and the SHA-256 of their ids, questions and references, in their order."""
    content = hashlib.sha256()
    for p in problems:
        content.update(json.dumps([p.id, p.question, p.reference], skipkeys=True, default=_name).encode() + b"\n")
    return {"problems": len(problems), "sha256": content.hexdigest()}


def _name(value: object) -> str:
    return type(value).__name__


def task_of(run: Path, task: Choice, split: Split) -> Task:
    """A run's task, whose problems of a split are still those that the run was made with.

    Raises:
        RunError: they are not.
    """
    known = known_data(run)
    made = make_task(pinned(task, known))
    apart = f"evaluate the new ones apart: selfroute evaluate {run} task.path=FILE"
    check_problems(run, known, {split: fingerprint(made.load(split))}, apart)
    return made


def pinned(task: Choice, known: Mapping[str, Any]) -> Choice:
    """A task at the hub's commit that a run read, or at its files, so that it reads the same again whatever came later
    and from whatever folder.

    As it is where its files are there as they are named, or where another revision is asked for now.
    """
    sources = known.get("sources") or [{}]
    source, settings = sources[0], task.settings
    same = len(sources) == 1 and "revision" in settings and settings["revision"] == source.get("asked")
    if same and source.get("commit"):
        return Choice(name=task.name, **{**settings, "revision": source["commit"]})
    files = [Path(str(source["file"])) for source in sources if source.get("file")]
    places = {key: place for key in ("path", "data_dir") if (place := _recorded(settings.get(key), files))}
    return Choice(name=task.name, **{**settings, **places}) if places else task


def _recorded(named: Any, files: Sequence[Path]) -> str:
    """Where a file or folder is that is not found by its relative name: one of the files that a run read, or a folder
    around one; "" for none."""
    if not isinstance(named, str) or not named or Path(named).is_absolute() or Path(named).exists():
        return ""
    ends = tuple(part for part in Path(named).parts if part != "..")
    around = (place for file in files for place in (file, *file.parents))
    return next((str(p) for p in around if ends and p.parts[-len(ends) :] == ends and p.exists()), "")
