"""`selfroute export`: a run's model for other engines."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class To(StrEnum):
    """What is written."""

    HF = "hf"
    GGUF = "gguf"


class Type(StrEnum):
    """How a GGUF keeps the matrices."""

    F16 = "f16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


def export(
    run: Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")],
    to: Annotated[
        To, typer.Option("--to", help="A Hugging Face folder, or a GGUF file (llama.cpp, Ollama, LM Studio).")
    ],
    kind: Annotated[
        Type,
        typer.Option("--type", help="Of a GGUF: 16 bits a weight, 8.5 or 4.5. Fewer can shift the decision to ask."),
    ] = Type.F16,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint in place of the newest.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; default RUN/exports/CHECKPOINT-hf, -f16 or the like.")
    ] = None,
) -> None:
    """Write a run's model for other engines: merged weights, tokenizer, chat template, settings, and a model card."""
    from selfroute import api

    written = api.export(run, to.value, kind=kind.value, best=best, out=out)
    typer.echo(f"exported: {written}")
    if to is To.GGUF:
        typer.echo(f"next: serve it (llama-server -m {written}), then selfroute evaluate {run} --engine URL")
