"""`selfroute serve`: the gateway."""

from __future__ import annotations

import json
import logging
from typing import Annotated

import typer


def serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="A gateway's .toml file, and changes to what --dry-run prints: port=9000, cloud.accuracy=0.7.",
            metavar="[CONFIG] [KEY=VALUE]...",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")] = False,
) -> None:
    """Serve the pair to any OpenAI client: the device answers, and hands over to the cloud when it asks.

    Without a config: the shipped Countdown model and the oracle cloud, on this machine alone.
    """
    from selfroute import api
    from selfroute.extras import needs

    given = list(arguments or [])
    config = api.load_gateway_config(given.pop(0) if given and "=" not in given[0] else None, given)
    if dry_run:
        from selfroute.serve.config import whole

        told = whole(config).model_dump(mode="json")
        # What is printed ends up in tickets.
        if "://" in config.store:
            with needs("serve"):
                from selfroute.serve.database import without_password
            told["store"] = without_password(config.store)
        typer.echo(json.dumps(told, indent=2))
        return
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def ready(url: str) -> None:
        typer.echo(f"serving {config.model} on {url} (Ctrl-C ends), dashboard on {url.removesuffix('/v1')}/dashboard")

    api.serve(config, ready)
