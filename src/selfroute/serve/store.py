"""The store: one SQLite file, or a PostgreSQL database for several replicas, behind transactions.

Every transaction runs whole in a thread of the store's own, one hop there and one back, however many statements it
has. An asynchronous driver hops for each of them: with aiosqlite a reservation took three times as long. SQLite takes
one writer at a time, so one thread writes and another reads beside it, and what came in while it wrote shares the next
transaction; brief ones, which take about as long as the hop, are run at once where nobody else writes. PostgreSQL gets
a few threads of each, and a transaction for each work.

Left out on purpose: what is in the tables (`history`, `budget`, `keys`) and their schema (`tables`, `migrations`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from sqlalchemy import URL, ClauseElement, Connection, Engine, create_engine, event, make_url
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from selfroute.errors import ConfigError, StoreError
from selfroute.serve.migrations import migrate

DEFAULT = "runs/gateway.sqlite"
"""Where the store is, unless something else is said."""

_BUSY_MS = 5000
"""How long a transaction waits for another's lock."""

_PRAGMAS = (
    f"busy_timeout = {_BUSY_MS}",
    # Whoever commits then moves the log into the file and waits for the disk; before it is so long, `_move_log` has.
    "wal_autocheckpoint = 10000",
    "journal_mode = WAL",
    # With WAL this survives any crash of ours; a power cut may lose the last moments, and never the file.
    "synchronous = NORMAL",
    # What retention deletes is overwritten, not only forgotten.
    "secure_delete = ON",
)

# In the event loop's thread nobody waits, neither for a lock nor for the disk.
_AT_ONCE = ("busy_timeout = 0", "wal_autocheckpoint = 0")

_LOGGED = 200
"""After so many transactions the log is moved into the file: some 3 MB, for more would keep the disk, and with it
whoever writes, for longer."""

_LONG = 10_000
"""Pages of a log that has to begin anew, though others wait for that."""

# A worker that hangs with the budget's rows locked would stop all the others.
_POSTGRES = f"-c lock_timeout={_BUSY_MS} -c statement_timeout=30000 -c idle_in_transaction_session_timeout=10000"

_log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[Connection], Any]


class Prepared:
    """A statement that is put into words once and then given to the driver itself.

    What runs for every request goes this way: past the driver, SQLAlchemy takes several times as long as SQLite does.
    """

    def __init__(self, statement: ClauseElement) -> None:
        self._statement = statement
        self._texts: dict[str, str] = {}

    def run(self, connection: Connection, *rows: Mapping[str, Any]) -> Any:
        """The driver's cursor, after the statement was run for each row of parameters."""
        name = connection.dialect.name
        if name not in self._texts:
            dialect = sqlite.dialect(paramstyle="named") if name == "sqlite" else connection.dialect
            self._texts[name] = str(self._statement.compile(dialect=dialect, column_keys=list(rows[0])))
        cursor = connection.connection.cursor()
        if len(rows) == 1:
            cursor.execute(self._texts[name], rows[0])
        else:
            cursor.executemany(self._texts[name], rows)
        return cursor


class Store:
    """Transactions on the database at `url`: a path, `sqlite:///path` or `postgresql://user@host/database`.

    A new SQLite file is readable by its owner alone. The schema is brought up to date first.

    Raises:
        ConfigError: a URL that cannot be used.
        StoreError: the database cannot be opened, or is of a newer selfroute.
    """

    def __init__(self, url: str = DEFAULT) -> None:
        parsed = _parse(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        self.name = parsed.database if is_sqlite else f"{parsed.host or 'localhost'}/{parsed.database or ''}"
        """For messages: no password."""
        # Together, on PostgreSQL, works would lock rows in an order that another replica's may cross.
        self._most_writers, readers, self._most_together = (1, 1, 64) if is_sqlite else (8, 2, 1)
        self._engine = _sqlite(parsed) if is_sqlite else _postgres(parsed, self._most_writers + readers)
        self._errors = (SQLAlchemyError, sqlite3.Error, self._engine.dialect.loaded_dbapi.Error)
        self._reading = self._engine.execution_options(write=False)
        self._writing = self._engine.execution_options(write=True)
        self._at_once: Connection | None = None
        self._writers = ThreadPoolExecutor(self._most_writers, "selfroute-store-writer")
        self._readers = ThreadPoolExecutor(readers, "selfroute-store-reader")
        self._logged, self._moves_log = 0, is_sqlite
        self._waiting: deque[tuple[Work, asyncio.Future[Any]]] = deque()
        self._writers_busy = 0
        try:
            with self.begin() as connection:
                migrate(connection)
            if is_sqlite:
                self._at_once = _kept(self._engine.execution_options(at_once=True))
        except BaseException:
            self.close()
            raise

    @contextmanager
    def begin(self, *, write: bool = True) -> Iterator[Connection]:
        """A transaction in the caller's thread: all of it, or nothing.

        Raises:
            StoreError: the database refused, or could not be reached.
        """
        with self._told(), (self._writing if write else self._reading).begin() as connection:
            yield connection

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the database refuses, as a StoreError."""
        try:
            yield
        except self._errors as error:
            # The first line names the cause; below it, PostgreSQL repeats what was to be written.
            cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            raise StoreError(f"the store {self.name} failed: {cause}") from error

    async def write(self, work: Callable[[Connection], T], *, brief: bool = False) -> T:
        """What `work` returns, run in a transaction that may write; others' works may be run in the same one.

        Where another's fails, the transaction is undone, and `work` is run again in one of its own. One that is `brief`
        (a millisecond on SQLite) may be run in the event loop's thread. A transaction that has begun cannot
        be called back: a task that is cancelled meanwhile goes on to its end first, so that the caller can undo what it
        did.

        Raises:
            StoreError: as from `begin`; nothing was written, unless the connection broke just as it was.
        """
        if brief and self._at_once and not self._writers_busy and (done := self._together([work], self._at_once)):
            self._wrote()
            [(result, error)] = done
            if error:
                raise error
            return cast(T, result)
        written: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, written))
        self._write_on()
        return await _to_its_end(written)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, run in a transaction that only reads; on SQLite it waits for no writer.

        Raises:
            StoreError: as from `begin`.
        """

        def transact() -> T:
            with self.begin(write=False) as connection:
                return work(connection)

        return await _to_its_end(asyncio.get_running_loop().run_in_executor(self._readers, transact))

    def _write_on(self) -> None:
        """Give what waits to a writer that is idle."""
        if not self._waiting or self._writers_busy == self._most_writers:
            return
        group = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._most_together))]
        self._writers_busy += 1
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._writers, self._together, [work for work, _ in group])

        def written(running: asyncio.Future[list[tuple[Any, Exception | None]]]) -> None:
            self._writers_busy -= 1
            for (_, done), (result, error) in zip(group, running.result(), strict=True):
                if error is None:
                    done.set_result(result)
                else:
                    done.set_exception(error)
            self._write_on()
            self._wrote()

        running.add_done_callback(written)

    def _wrote(self) -> None:
        """Count a transaction, and move SQLite's log into its file when there were many."""
        self._logged += 1
        if self._moves_log and self._logged >= _LOGGED:
            self._logged = 0
            moving = asyncio.get_running_loop().run_in_executor(self._readers, self._move_log)
            moving.add_done_callback(_told_of)

    def _move_log(self) -> None:
        """Move what is in the log by now, beside the others' transactions.

        Where nothing came meanwhile, the next one begins it anew; a log that has grown long all the same is moved to
        its end while the others wait.
        """
        with self._told(), self._engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            [(_, pages, _)] = driver.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            if pages > _LONG:
                driver.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    def _together(self, works: list[Work], at_once: Connection | None = None) -> list[tuple[Any, Exception | None]]:
        """What each work returns, and how it failed: in one transaction, or, where one fails, one after the other.

        Nothing where it would have to wait for another writer, and does not (`at_once`).
        """
        results: list[Any] = []
        begun = False
        try:
            with self._told(), self._writing.begin() if at_once is None else _transaction(at_once) as connection:
                begun = True
                for work in works:
                    results.append(work(connection))
            return [(result, None) for result in results]
        except Exception as error:
            if at_once and not begun:
                return []
            if len(works) == 1 or not begun or len(results) == len(works):
                return [(None, error)] * len(works)
        return [outcome for work in works for outcome in self._together([work])]

    def close(self) -> None:
        """Finish what was asked for and let go of the database."""
        # Whoever is the last to let go moves the log.
        self._moves_log = False
        self._writers.shutdown()
        self._readers.shutdown()
        if self._at_once:
            self._at_once.close()
        self._engine.dispose()

    async def aclose(self) -> None:
        """`close`, without stopping the event loop meanwhile."""
        await asyncio.to_thread(self.close)


def _told_of(moving: asyncio.Future[None]) -> None:
    if not moving.cancelled() and (error := moving.exception()):
        _log.error("the store's log grows: %s", error)


async def _to_its_end(running: asyncio.Future[T]) -> T:
    """Its result; whoever is cancelled waits for it all the same."""
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        running.exception()
        raise


def missing(url: str) -> str | None:
    """The path of an SQLite store that is not there; None: there is one, or it is a server's.

    Raises:
        ConfigError: a URL that cannot be used.
    """
    parsed = _parse(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    return parsed.database if is_sqlite and not Path(parsed.database or "").exists() else None


def _parse(text: str) -> URL:
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


def _sqlite(url: URL) -> Engine:
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


def _kept(engine: Engine) -> Connection:
    """A connection for what is written in the event loop's thread: taken once, for that takes as long as a write."""
    connection = engine.connect()
    driver: Any = connection.connection.driver_connection
    for pragma in _AT_ONCE:
        _set(driver, pragma)
    return connection


@contextmanager
def _transaction(connection: Connection) -> Iterator[Connection]:
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


def _postgres(url: URL, connections: int) -> Engine:
    try:
        return create_engine(
            url,
            hide_parameters=True,
            pool_size=connections,
            max_overflow=0,
            pool_pre_ping=True,
            connect_args={"connect_timeout": 5, "options": _POSTGRES},
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            "a PostgreSQL store needs psycopg: pip install 'selfroute[postgres]' (in a checkout: pip install "
            "'.[postgres]')"
        ) from error
