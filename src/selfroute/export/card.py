"""The model card: what a model is, how it was made, and what it was measured to do, from the run directory alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from selfroute.config import Choice, chosen
from selfroute.errors import ConfigError
from selfroute.measures import Measure, proportion
from selfroute.protocol import HELP_CALL, INSTRUCTION
from selfroute.records import read_json, read_records, results
from selfroute.tasks import TASKS


def card(run: Path, checkpoint: str, settings: Mapping[str, Any], name: str, *, file: str, best: bool) -> str:
    """The card of a run's checkpoint, in Markdown.

    Args:
        run: the run directory.
        checkpoint: its name there.
        settings: the run's, whole.
        name: the model's.
        file: the GGUF's name; "" for a Hugging Face folder.
        best: whether the checkpoint is the best one.
    """
    # It is Markdown, in which escapes for HTML would show.
    pages = Environment(loader=PackageLoader("selfroute.export", "."), undefined=StrictUndefined, trim_blocks=True)  # noqa: S701
    template = pages.get_template("card.md.jinja")
    made: Mapping[str, Any] = read_json(run / "run.json")
    return template.render(
        name=name,
        file=file,
        checkpoint=checkpoint,
        run=run.resolve().name,
        made=made,
        config=settings,
        data=described(settings["task"]),
        measured=measured(run, checkpoint, best=best),
        instruction=INSTRUCTION,
        help_call=HELP_CALL,
    )


def described(choice: Mapping[str, Any]) -> str:
    """A task by name with those of its settings that are not at their defaults, in a line, written as overrides.

    >>> described({"name": "countdown", "num_numbers": 4, "number_min": 1, "path": None})
    'countdown (num_numbers=4)'
    """
    try:
        usual = _flat(chosen(Choice(**choice), TASKS).Config.model_construct().model_dump(mode="json"))
    except ConfigError:
        # A class of the user's own, which need not be at hand where the model is exported.
        usual = {}
    settings = _flat({key: value for key, value in choice.items() if key != "name"})
    told = [f"{key}={json.dumps(value)}" for key, value in settings.items() if value != usual.get(key)]
    # It stands in a table.
    return f"{choice['name']} ({', '.join(told)})".replace("|", "\\|") if told else str(choice["name"])


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with dots between tables, without what is not set; of a provider, its name and its model.

    >>> _flat({"columns": {"question": "ask", "options": None}, "parts": {}})
    {'columns.question': 'ask'}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            told = {name: value[name] for name in ("name", "model") if name in value} if "name" in value else value
            flat |= {f"{key}.{name}": setting for name, setting in _flat(told).items()}
        elif value not in (None, [], ""):
            flat[key] = value
    return flat


def measured(run: Path, checkpoint: str, *, best: bool) -> list[tuple[str, list[str]]]:
    """Each evaluation of this checkpoint: the command that made it; accuracy, call rate, and accuracy alone."""
    rows = []
    for path in sorted(results(run, best=best).glob("evaluations/*/evaluation.json")):
        about = read_json(path)
        if about["checkpoint"] != checkpoint:
            continue
        records = read_records(path.parent / "records.jsonl")
        shares = (
            [r["correct"] for r in records],
            [r["route"] == "cloud" for r in records],
            [r["device_correct"] for r in records],
        )
        command = command_of(path.parent.name, run.resolve().name, best=best)
        rows.append((command, [_percent(proportion(np.array(share, dtype=float))) for share in shares]))
    return rows


def command_of(evaluation: str, run: str, *, best: bool = False) -> str:
    """The command line that made an evaluation, by the evaluation's name.

    >>> command_of("budget-0.3", "runs/demo"), command_of("after@demo-q8_0", "runs/demo")
    ('selfroute evaluate runs/demo --budget 0.3', 'selfroute evaluate runs/demo --engine URL (demo-q8_0)')
    """
    kind, _, engine = evaluation.partition("@")
    budget = kind.removeprefix("budget-") if kind.startswith("budget-") else ""
    parts = [f"selfroute evaluate {run}", f"--budget {budget}" if budget else "", "--best" if best else ""]
    return " ".join(part for part in (*parts, f"--engine URL ({engine})" if engine else "") if part)


def _percent(share: Measure) -> str:
    low, value, high = (f"{100 * part:.1f}" for part in (share.low, share.value, share.high))
    return f"{value} [{low}, {high}]"
