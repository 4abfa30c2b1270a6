"""Accuracy and call rate of a run's model in process, and exported on llama.cpp's server in 16, 8 and 4 bits.

    python benchmarks/quantisation.py RUN --out FILE [--budget 0.3]

RUN is trained and calibrated for the budget, as `selfroute demo` leaves it. Each export answers all test problems
twice: as its own odds decide, and with the dial at the budget, whose bias was found in process. Evaluations that are
already in RUN are kept. Responses are sampled, so rows differ by chance too, as their intervals say.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from llama_server import llama_server

from selfroute import api
from selfroute.device.http import HTTPConfig
from selfroute.evaluate.summary import key_of
from selfroute.export.gguf import Kind
from selfroute.records import checkpoints, write_json

MEASURES = ("accuracy", "call_rate", "local_accuracy", "decision_auc")


def evaluate(run: Path, budget: float, *, model: str = "", url: str | None = None) -> list[str]:
    """The summary's keys of a model's two evaluations, which are made where they are not there yet."""
    keys = []
    for dial in (None, budget):
        name = api.evaluation_name(dial, False) + (f"@{model}" if url else "")
        if not (run / "evaluations" / name / "records.jsonl").exists():
            engine = HTTPConfig(base_url=f"{url}/v1") if url else None
            api.evaluate(run, budget=dial, engine=engine, progress=lambda what, n, of: print(f"{what} {n}/{of}"))
        keys.append(key_of(name))
    return keys


def main() -> None:
    """Measure and write FILE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.3)
    options = parser.parse_args()
    run = options.run
    rows = {"in process": evaluate(run, options.budget)}
    checkpoint = checkpoints(run)[-1].name
    for kind in get_args(Kind):
        written = (run / "exports" / f"{checkpoint}-{kind}").glob("*.gguf")
        file = next(written, None) or api.export(run, "gguf", kind=kind)
        with llama_server(file) as url:
            rows[kind.upper()] = evaluate(run, options.budget, model=file.stem, url=url)
    summary = api.report(run)
    found: dict[str, Any] = {
        name: {
            "own_odds": {m: summary[own][m] for m in MEASURES},
            "at_budget": {m: summary[dialled][m] for m in MEASURES},
        }
        for name, (own, dialled) in rows.items()
    }
    config = api.run_config(run)
    about = {"checkpoint": checkpoint, "seed": config.seed, "problems": summary["after"]["problems"]}
    write_json(options.out, {**about, "budget": options.budget, "rows": found})
    print(options.out.read_text())


if __name__ == "__main__":
    main()
