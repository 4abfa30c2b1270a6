"""`selfroute keys`: the virtual keys that clients show to the gateway."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from selfroute.errors import ConfigError, SelfrouteError
from selfroute.types import POLICIES

if TYPE_CHECKING:
    from selfroute.serve.keys import Key
    from selfroute.serve.store import Store

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke the keys that clients show to the gateway.")

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="SELFROUTE_STORE",
        show_default="runs/gateway.sqlite",
        help="The gateway's store: a file, or postgresql://user@host/database.",
    ),
]


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose it is, for people.", metavar="NAME")],
    share: Annotated[float | None, typer.Option(help="Share of its requests that may go to the cloud.")] = None,
    usd_per_day: Annotated[float | None, typer.Option(help="USD that its calls may cost a day (UTC).")] = None,
    calls_per_minute: Annotated[int | None, typer.Option(help="Its calls to the cloud in any 60 s.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Its requests in any 60 s.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="What may be asked for: auto, device-only or cloud-only; may be repeated. [default: all]"),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model that it may use; may be repeated. [default: all]")
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="May read /metrics, and everybody's requests on the dashboard.")
    ] = False,
    days: Annotated[float | None, typer.Option(min=0, help="How long it is valid. [default: for ever]")] = None,
    store: StoreOption = None,
) -> None:
    """Make a key. It goes to the standard output, this once; the store keeps a hash of it.

    A limit that is not given is none; those of the whole gateway hold all the same.
    """
    with _opened(store, new=True) as opened:
        from selfroute.config import validate
        from selfroute.serve import keys
        from selfroute.serve.account import Limits

        given = {
            "share": share,
            "usd_per_day": usd_per_day,
            "calls_per_minute": calls_per_minute,
            "requests_per_minute": requests_per_minute,
        }
        limits = validate(Limits, given, "the key's limits")
        chosen = [known for known in POLICIES.values() if known in (policy or POLICIES)]
        unknown = sorted(set(policy or ()) - set(POLICIES))
        if unknown:
            raise ConfigError(f"no such policy: {unknown[0]!r} (known: {', '.join(POLICIES)})")
        for text in (name, *(model or ())):
            # They are printed on terminals and pages.
            if not text.strip() or not text.isprintable() or len(text) > 100:
                raise ConfigError(f"a name is 1 to 100 printable characters, not {text[:100]!r}")
        if days == 0:
            raise ConfigError("a key of 0 days is valid for nothing: give --days more, or leave it out")
        expires_at = None if days is None else time.time() + days * 86_400
        with opened.begin() as connection:
            token, key = keys.new(
                connection, name, limits, policies=chosen, models=model, admin=admin, expires_at=expires_at
            )
    typer.echo(
        f"key {key.id} of {name} in {opened.name}, shown this once (revoke it: selfroute keys revoke {key.id}):",
        err=True,
    )
    typer.echo(token)


@app.command("list")
def list_(store: StoreOption = None) -> None:
    """List all keys: their first characters, limits and state."""
    with _opened(store) as opened:
        from selfroute.serve import keys

        with opened.begin(write=False) as connection:
            found = keys.everything(connection)
    if not found:
        typer.echo(f"no keys in {opened.name}: selfroute keys new NAME")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("id", "key", "name", "limits", "policies", "models", "made", "state"):
        table.add_column(heading, overflow="fold")
    for key in found:
        table.add_row(*(Text(cell) for cell in _cells(key)))
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Its id, as `list` prints it.", metavar="ID")], store: StoreOption = None
) -> None:
    """Make a key invalid for ever; running gateways hear of it within seconds."""
    with _opened(store) as opened:
        from selfroute.serve import keys

        with opened.begin() as connection:
            if not keys.revoke(connection, key_id):
                raise ConfigError(f"{opened.name} has no valid key {key_id!r}: selfroute keys list")
    typer.echo(f"key {key_id} is revoked")


def _cells(key: Key) -> tuple[str, ...]:
    limits = key.limits.model_dump(exclude_none=True, exclude={"window_s", "min_requests"})
    state = "revoked" if key.revoked_at else "valid" if key.valid(time.time()) else "expired"
    return (
        key.id,
        f"{key.prefix}...",
        f"{key.name} (admin)" if key.admin else key.name,
        ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in limits.items()) or "none",
        ", ".join(sorted(key.policies)),
        "all" if key.models is None else ", ".join(sorted(key.models)),
        _day(key.created_at),
        f"{state} until {_day(key.expires_at)}" if state == "valid" and key.expires_at else state,
    )


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


@contextmanager
def _opened(url: str | None, *, new: bool = False) -> Iterator[Store]:
    try:
        from selfroute.serve.database import DEFAULT, missing
        from selfroute.serve.store import Store
    except ModuleNotFoundError as error:
        raise SelfrouteError(
            f"this needs {error.name}: pip install 'selfroute[serve]' (in a checkout: pip install '.[serve]')"
        ) from error
    if not new and (path := missing(url or DEFAULT)):
        raise ConfigError(f"there is no store at {path} (--store names it; selfroute keys new NAME makes one)")
    store = Store(url or DEFAULT)
    try:
        yield store
    finally:
        store.close()
