"""Where the gateway's store is, and how its database is opened: SQLite or PostgreSQL, and how patient with each.

Left out on purpose: who waits for what, and in which thread (`store`).
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError

from selfroute.errors import ConfigError, StoreError

DEFAULT = "runs/gateway.sqlite"
"""Where the store is, unless something else is said."""

_BUSY_MS = 5000
"""How long a transaction waits for another's lock."""

_PRAGMAS = (
    # Of a new file. A transaction logs whole pages: a reservation and its settlement take an eighth less time than with
    # the default of 4096, and a quarter of the log.
    "page_size = 1024",
    f"busy_timeout = {_BUSY_MS}",
    # Whoever commits then moves the log into the file and waits for the disk; before it is so long, the store has.
    "wal_autocheckpoint = 40000",
    "journal_mode = WAL",
    # With WAL this survives any crash of ours; a power cut may lose the last moments, and never the file.
    "synchronous = NORMAL",
    # What retention deletes is overwritten, not only forgotten.
    "secure_delete = ON",
)

# In the event loop's thread nobody waits, neither for a lock nor for the disk.
_AT_ONCE = ("busy_timeout = 0", "wal_autocheckpoint = 0")

# A worker that hangs with the budget's rows locked would stop all the others.
_POSTGRES = f"-c lock_timeout={_BUSY_MS} -c statement_timeout=30000 -c idle_in_transaction_session_timeout=10000"

# What nobody acknowledges any more is noticed by the system. Of a Unix socket they mean nothing.
_LINK = {"keepalives_idle": 4, "keepalives_interval": 2, "keepalives_count": 2, "tcp_user_timeout": 8000}

_SILENT_S = 35.0
"""A server stops a statement after 30 s and says so. One that is silent for longer never will, though the system
acknowledges what it is sent: a proxy before it does, and the system of a server that hangs."""


def without_password(text: str) -> str:
    """What a store's setting says, for people.

    Raises:
        ConfigError: it cannot be read.
    """
    url = parse(text)
    if url.get_backend_name() == "sqlite":
        return text
    secret = {name: "***" for name in url.query if "password" in name.lower()}
    told = url.set(drivername="postgresql").update_query_dict(secret).render_as_string(hide_password=True)
    return told.replace("%2A%2A%2A", "***")


def missing(url: str) -> str | None:
    """The path of an SQLite store that is not there; None: there is one, or it is a server's.

    Raises:
        ConfigError: a URL that cannot be used.
    """
    parsed = parse(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    return parsed.database if is_sqlite and not Path(parsed.database or "").exists() else None


def parse(text: str) -> URL:
    """The URL of a store, its driver named."""
    if "://" not in text:
        return URL.create("sqlite", database=text)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # The text may hold a password.
        raise ConfigError("the store's URL cannot be read: postgresql://user@host/database, or a file's path") from None
    backend = url.get_backend_name()
    if backend == "sqlite":
        return URL.create("sqlite", database=url.database)
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    raise ConfigError(f"a store is SQLite or PostgreSQL, not {backend}: postgresql://user@host/database, or a path")


def open_sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise ConfigError("the store needs a file: workers share it")
    path = Path(url.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        # SQLite gives the files beside it the same mode.
        path.chmod(0o600)
    except OSError as error:
        raise StoreError(f"cannot open the store {path}: {error.strerror}") from error
    # Transactions end before a connection goes back, so there is nothing to undo then.
    engine = create_engine(url, hide_parameters=True, pool_reset_on_return=None)

    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, _: Any) -> None:
        # Transactions begin where `begin` below says so, and not where the driver thinks fit.
        connection.isolation_level = None
        for pragma in _PRAGMAS:
            _set(connection, pragma)

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        # A writer that began by reading could be refused when it comes to write.
        driver: Any = connection.connection.driver_connection
        options = connection.get_execution_options()
        if not options.get("at_once"):
            driver.execute("BEGIN IMMEDIATE" if options.get("write") else "BEGIN")

    return engine


def kept(engine: Engine) -> Connection:
    """A connection for what is written in the event loop's thread: taken once, for that takes as long as a write."""
    connection = engine.connect()
    driver: Any = connection.connection.driver_connection
    for pragma in _AT_ONCE:
        _set(driver, pragma)
    return connection


@contextmanager
def transaction(connection: Connection) -> Iterator[Connection]:
    """A transaction that the driver begins and ends; SQLAlchemy is in it only where a statement is not `Prepared`."""
    driver: Any = connection.connection.driver_connection
    driver.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        driver.commit()
    except BaseException:
        driver.rollback()
        raise
    finally:
        # Its own has nothing left to end.
        connection.rollback()


def _set(connection: sqlite3.Connection, pragma: str) -> None:
    """Set a pragma. Of several processes that open a new file, the change to WAL refuses some at once, whatever the
    time-out, so it is tried again for that long."""
    by = time.monotonic() + _BUSY_MS / 1000
    while True:
        try:
            connection.execute(f"PRAGMA {pragma}")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > by:
                raise
        time.sleep(0.01)


def open_postgres(url: URL, connections: int) -> Engine:
    try:
        engine = create_engine(
            url,
            hide_parameters=True,
            pool_size=connections,
            max_overflow=0,
            pool_pre_ping=True,
            connect_args={"connect_timeout": 5, "options": _POSTGRES, **_LINK},
        )
        import psycopg
    except ModuleNotFoundError as error:
        raise ConfigError(
            "a PostgreSQL store needs psycopg: pip install 'selfroute[postgres]' (in a checkout: pip install "
            "'.[postgres]')"
        ) from error

    class Impatient(psycopg.Connection[Any]):
        """A connection that is closed when the server is silent, so that its thread gets free."""

        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            return super().wait(self._heard(gen), *args, **kwargs)

        def _heard(self, gen: Generator[Any, int, Any]) -> Generator[Any, int, Any]:
            # psycopg gives 0 ten times a second where there is nothing to read or to write.
            by = time.monotonic() + _SILENT_S
            try:
                wanted = next(gen)
                while True:
                    if ready := (yield wanted):
                        by = time.monotonic() + _SILENT_S
                    elif time.monotonic() > by:
                        self.pgconn.finish()
                        raise psycopg.OperationalError(f"the server is silent for {_SILENT_S:g} s")
                    wanted = gen.send(ready)
            except StopIteration as end:
                return end.value

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, record: Any, args: Any, settings: Any) -> Any:
        return Impatient.connect(*args, **settings)

    return engine
