"""The store: one SQLite file, or a PostgreSQL database for several replicas, behind transactions.

Every transaction runs whole in a thread of the store's own, one hop there and one back, however many statements it
has. An asynchronous driver hops for each of them: with aiosqlite a reservation took three times as long. SQLite takes
one writer at a time, so one thread writes and another reads beside it, and what came in while it wrote shares the next
transaction; brief ones, which take about as long as the hop, are run at once where nobody else writes. PostgreSQL gets
a few threads of each, and a transaction for each work.

A database may also say nothing at all: its machine hangs, or the network drops what is sent. Whoever waits for it is
told so after `ANSWER_S`, though the thread that asked it cannot be called back and waits on.

Left out on purpose: how the database is opened (`database`), what is in the tables (`history`, `budget`, `keys`) and
their schema (`tables`, `migrations`).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, TypeVar, cast

from sqlalchemy import ClauseElement, Connection
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import SQLAlchemyError

from selfroute.errors import SilentStoreError, StoreError
from selfroute.serve.database import DEFAULT, kept, open_postgres, open_sqlite, parse, transaction
from selfroute.serve.migrations import migrate

ANSWER_S = 10.0
"""The longest that a caller waits for the database. A lock or a connection is waited for 5 s, a dead link noticed after
8: what is merely busy or gone is told with its cause. And a client hears of it before it gives up by itself."""

_LOGGED = 200
"""After so many transactions the log is moved into the file: about 1 MB, for more would keep the disk, and with it
whoever writes, for longer."""

_LONG = 40_000
"""Pages of a log that has to begin anew, though others wait for that."""

_log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[Connection], Any]


class _LateError(StoreError):
    """Who asked was told that it failed, and may do it again: so it is undone."""

    def __init__(self) -> None:
        super().__init__("the store failed: it took too long")


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
        parsed = parse(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        self.name = parsed.database if is_sqlite else f"{parsed.host or 'localhost'}/{parsed.database or ''}"
        """For messages: no password."""
        # Together, on PostgreSQL, works would lock rows in an order that another replica's may cross.
        self._most_writers, readers, self._most_together = (1, 1, 64) if is_sqlite else (8, 2, 1)
        self._engine = open_sqlite(parsed) if is_sqlite else open_postgres(parsed, self._most_writers + readers)
        self._errors = (SQLAlchemyError, sqlite3.Error, self._engine.dialect.loaded_dbapi.Error)
        self._reading = self._engine.execution_options(write=False)
        self._writing = self._engine.execution_options(write=True)
        self._at_once: Connection | None = None
        self._writers = _Threads(self._most_writers, "selfroute-store-writer")
        self._readers = _Threads(readers, "selfroute-store-reader")
        self._logged, self._moves_log = 0, is_sqlite
        self.answer_s = ANSWER_S
        """The longest that a caller waits, from now on."""
        self._waiting: deque[tuple[Work, asyncio.Future[Any]]] = deque()
        self._writers_busy = 0
        try:
            with self.begin() as connection:
                migrate(connection)
            if is_sqlite:
                self._at_once = kept(self._engine.execution_options(at_once=True))
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
            StoreError: as from `begin`, or there was no answer in time; nothing was written and nothing will be, unless
                the connection broke, or the time was up, just as it was.
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
        return await self._to_its_end(written)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, run in a transaction that only reads; on SQLite it waits for no writer.

        Raises:
            StoreError: as from `begin`, or there was no answer in time.
        """

        def transact() -> T:
            with self.begin(write=False) as connection:
                return work(connection)

        return await self._to_its_end(self._readers.run(transact))

    async def _to_its_end(self, asked: asyncio.Future[T]) -> T:
        """Its result, in time; whoever is cancelled waits for it all the same."""
        giving_up = asked.get_loop().call_later(self.answer_s, self._give_up, asked)
        asked.add_done_callback(_heard)
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            await asyncio.wait({asked})
            raise
        finally:
            # Whoever is cancelled twice leaves it behind, and then it ends by itself.
            if asked.done():
                giving_up.cancel()

    def _give_up(self, asked: asyncio.Future[Any]) -> None:
        """Wait no longer; what has not begun never will."""
        if not asked.done():
            asked.set_exception(SilentStoreError(f"the store {self.name} failed: no answer in {self.answer_s:g} s"))
        # They wait equally long, so that the first is given up first.
        while self._waiting and self._waiting[0][1].done():
            self._waiting.popleft()

    def _write_on(self) -> None:
        """Give what waits to a writer that is idle."""
        if not self._waiting or self._writers_busy == self._most_writers:
            return
        group = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._most_together))]
        self._writers_busy += 1
        works, asked = [work for work, _ in group], [future for _, future in group]

        def written(running: asyncio.Future[list[tuple[Any, Exception | None]]]) -> None:
            self._writers_busy -= 1
            for future, (result, error) in zip(asked, running.result(), strict=True):
                _tell(future, result, error)
            self._write_on()
            self._wrote()

        self._writers.run(lambda: self._together(works, asked=asked)).add_done_callback(written)

    def _wrote(self) -> None:
        """Count a transaction, and move SQLite's log into its file when there were many."""
        self._logged += 1
        if self._moves_log and self._logged >= _LOGGED:
            self._logged = 0
            self._readers.run(self._move_log).add_done_callback(_told_of)

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

    async def empty_log(self) -> None:
        """Move all of SQLite's log into its file, and cut it off: what was deleted still stands in it.

        Raises:
            StoreError: as from `begin`, or others held it up for too long.
        """
        if self._at_once:
            await self._to_its_end(self._readers.run(self._empty_log))

    def _empty_log(self) -> None:
        # Most of it beside the others' transactions, which wait for the rest.
        self._move_log()
        with self._told(), self._engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            [(busy, _, _)] = driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if busy:
            raise StoreError(f"the store {self.name} failed: its log is in use")

    def _together(
        self, works: list[Work], at_once: Connection | None = None, asked: Sequence[asyncio.Future[Any]] = ()
    ) -> list[tuple[Any, Exception | None]]:
        """What each work returns, and how it failed: in one transaction, or, where one fails, one after the other.

        Nothing where it would have to wait for another writer, and does not (`at_once`). Whoever `asked` and was told
        that it failed, for it took too long, may do it again: so it is undone.
        """
        results: list[Any] = []
        begun = False
        try:
            with self._told(), self._writing.begin() if at_once is None else transaction(at_once) as connection:
                begun = True
                for work in works:
                    results.append(work(connection))
                if any(future.done() for future in asked):
                    raise _LateError
            return [(result, None) for result in results]
        except _LateError as error:
            if len(works) == 1:
                return [(None, error)]
        except Exception as error:
            if at_once and not begun:
                return []
            if len(works) == 1 or not begun or len(results) == len(works):
                return [(None, error)] * len(works)
        if not asked:
            return [self._together([work])[0] for work in works]
        return [self._alone(work, future) for work, future in zip(works, asked, strict=True)]

    def _alone(self, work: Work, asked: asyncio.Future[Any]) -> tuple[Any, Exception | None]:
        """A work of several in a transaction of its own, told at once: those that come after may take long."""
        if asked.done():
            return None, _LateError()
        [(result, error)] = self._together([work], asked=[asked])
        with suppress(RuntimeError):
            asked.get_loop().call_soon_threadsafe(_tell, asked, result, error)
        return result, error

    def close(self) -> None:
        """Finish what was asked for, if that is possible in time, and let go of the database."""
        # Whoever is the last to let go moves the log.
        self._moves_log = False
        by = time.monotonic() + self.answer_s
        if left := self._writers.end(by) + self._readers.end(by):
            _log.error("the store %s does not answer; transactions left to themselves: %d", self.name, left)
        if self._at_once:
            self._at_once.close()
        self._engine.dispose()

    async def aclose(self) -> None:
        """`close`, without stopping the event loop meanwhile."""
        await asyncio.to_thread(self.close)


def _told_of(moving: asyncio.Future[None]) -> None:
    if not moving.cancelled() and (error := moving.exception()):
        _log.error("the store's log grows: %s", error)


class _Threads:
    """Up to `most` threads that run what an event loop gives them.

    They are daemons: a ThreadPoolExecutor's would keep the process from ending while one waits for a database.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._calls: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._ended = False

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """What `call` returns; it is not begun where that is told before."""
        if self._ended:
            raise StoreError("the store is closed")
        asked: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.put((call, asked))
        if len(self._threads) < self._most:
            self._threads.append(threading.Thread(target=self._work, name=self._name, daemon=True))
            self._threads[-1].start()
        return asked

    def end(self, by: float) -> int:
        """Run what was given, until a time of the monotonic clock; how many threads are not done then."""
        self._ended = True
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(max(0.0, by - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        for call, asked in iter(self._calls.get, None):
            if not asked.done():
                _run(call, asked)
            # Nothing of it is kept until the next comes.
            del call, asked


def _run(call: Callable[[], Any], asked: asyncio.Future[Any]) -> None:
    result, error = None, None
    try:
        result = call()
    except BaseException as raised:
        error = raised
    # The loop may be closed by now: then nobody waits.
    with suppress(RuntimeError):
        asked.get_loop().call_soon_threadsafe(_tell, asked, result, error)


def _heard(asked: asyncio.Future[Any]) -> None:
    """Who asked may be gone: then nobody else looks at how it failed."""
    if not asked.cancelled():
        asked.exception()


def _tell(asked: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """The outcome, to whoever still waits for it."""
    if asked.done():
        return
    if error is None:
        asked.set_result(result)
    else:
        asked.set_exception(error)
