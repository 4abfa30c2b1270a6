"""Write docs/results.md from the committed results: the comparison's rows, and the model after quantisation.

python benchmarks/page.py
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfroute.compare.report import show, write_report
from selfroute.records import read_json, write_atomic

ROOT = Path(__file__).parents[1]
GONE = """Rows that name 3399a96, c85530c or cfd35e1 were made by code that lies between 4954e1c and 7761c07: those
three commits came to main as others ([log.md](log.md)).
"""
COLUMNS = {"accuracy": "accuracy", "call rate": "call_rate", "local accuracy": "local_accuracy"}


def page() -> str:
    """The page as the committed files have it."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "compare"
        shutil.copytree(ROOT / "benchmarks/results/compare", rows)
        write_report(rows)
        compared = (rows / "results.md").read_text()
    head, first, rest = compared.partition("\n## ")
    compared = head + "\n" + GONE + first + rest
    return compared + "\n" + quantised(read_json(ROOT / "benchmarks/results/quantisation.json"))


def quantised(found: Mapping[str, Any]) -> str:
    """The table of a model before and after quantisation."""
    at = f"at {100 * found['budget']:g} %"
    head = [*COLUMNS, *(f"{at}: {name}" for name in COLUMNS), "AUC of l"]
    text = [
        "## The model after quantisation",
        "",
        f"The main job's model (seed {found['seed']}, {found['checkpoint']}) on {found['problems']:,} test",
        "problems, in process in float32 and exported as GGUF on llama.cpp's server. First as its own odds decide,",
        "then with the dial at the budget, whose bias was found in process. Responses are sampled: rows differ by",
        "chance too. Made by `selfroute demo --out RUN` and `python benchmarks/quantisation.py RUN --out FILE`.",
        "",
        "| weights | " + " | ".join(head) + " |",
        "|---|" + "---|" * len(head),
    ]
    for name, row in found["rows"].items():
        own, dial = row["own_odds"], row["at_budget"]
        cells = [show(part, key) for part in (own, dial) for key in COLUMNS.values()]
        text.append(f"| {name} | " + " | ".join([*cells, show(own, "decision_auc")]) + " |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    write_atomic(ROOT / "docs/results.md", page())
