"""Transactions, migrations and the file itself, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, Engine, create_engine, inspect, make_url, select, text
from tests.store_worker import at_once

from selfroute.errors import ConfigError, SilentStoreError, StoreError
from selfroute.serve.account import Limits
from selfroute.serve.budget import Budget, Reservation
from selfroute.serve.keys import Keyring
from selfroute.serve.migrations import MIGRATIONS, migrate
from selfroute.serve.store import Store
from selfroute.serve.tables import METADATA, RESERVATIONS


def names(connection: Connection) -> list[str]:
    return list(connection.execute(text("SELECT name FROM keys ORDER BY name")).scalars())


def insert(connection: Connection, name: str) -> None:
    connection.execute(
        text(
            "INSERT INTO keys (id, hash, prefix, name, limits, policies, models, created_at) "
            "VALUES (:name, :name, '', :name, '{}', '[]', 'null', 0)"
        ),
        {"name": name},
    )


def test_the_schema_is_that_of_the_tables(store: Store) -> None:
    with store.begin() as connection:
        inspector = inspect(connection)
        assert set(inspector.get_table_names()) == {*METADATA.tables, "migrations"}
        for table in METADATA.sorted_tables:
            found = [(c["name"], c["type"].python_type) for c in inspector.get_columns(table.name)]
            assert found == [(c.name, c.type.python_type) for c in table.columns]
            assert inspector.get_pk_constraint(table.name)["constrained_columns"] == list(
                table.primary_key.columns.keys()
            )


def test_opening_again_changes_nothing(url: str, store: Store) -> None:
    with store.begin() as connection:
        insert(connection, "a")
    again = Store(url)
    with again.begin(write=False) as connection:
        assert names(connection) == ["a"]
    again.close()


def test_an_older_schema_is_brought_up_to_date(store: Store) -> None:
    longer = (*MIGRATIONS, ("ALTER TABLE keys ADD COLUMN note TEXT", "UPDATE keys SET note = name"))
    with store.begin() as connection:
        insert(connection, "a")
        migrate(connection, longer)
        assert connection.execute(text("SELECT note FROM keys")).scalar() == "a"
        versions = connection.execute(text("SELECT version FROM migrations ORDER BY version")).scalars().all()
        assert versions == [*range(1, len(longer) + 1)]


def _begin(url: str) -> Engine:
    """An empty database, which no store has opened yet."""
    if "://" not in url:
        Path(url).parent.mkdir()
    return create_engine(url.replace("postgresql:", "postgresql+psycopg:") if "://" in url else f"sqlite:///{url}")


def test_sums_by_the_hour_are_made_of_those_by_the_minute(url: str) -> None:
    engine = _begin(url)
    with engine.begin() as connection:
        migrate(connection, MIGRATIONS[:1])
        for minute in (59, 60, 119):
            connection.execute(text(f"INSERT INTO usage VALUES ({minute}, 'k', 1, 0, 0, 0, 5, 0, 0)"))
    engine.dispose()
    store = Store(url)
    with store.begin(write=False) as connection:
        rows = connection.execute(text("SELECT minute, requests, cost_nano FROM usage_hours ORDER BY minute")).all()
    store.close()
    assert [tuple(row) for row in rows] == [(0, 1, 5), (60, 2, 10)]


def test_errors_are_counted_anew(url: str) -> None:
    engine = _begin(url)
    with engine.begin() as connection:
        migrate(connection, MIGRATIONS[:3])
        for i, (at, status, route, denied) in enumerate(
            [
                *((3540, 503, "", ""), (3599.5, 400, "", ""), (3541, 502, "cloud", ""), (3542, 429, "", "share")),
                *((3543, 499, "", ""), (3544, 200, "device", ""), (3600, 503, "", "")),
            ]
        ):
            connection.execute(
                text(
                    "INSERT INTO requests (cost_nano, id, at, status, route, denied, key_id, model, policy, error, "
                    "total_ms, device_prompt_tokens, device_completion_tokens, cloud_prompt_tokens, "
                    "cloud_completion_tokens) VALUES "
                    f"(0, '{i}', {at}, {status}, '{route}', '{denied}', 'k', '', '', '', 1, 0, 0, 0, 0)"
                )
            )
        for table, minute in (("usage", 59), ("usage", 60), ("usage_hours", 0), ("usage_hours", 60)):
            connection.execute(text(f"INSERT INTO {table} VALUES ({minute}, 'k', 7, 0, 0, 9, 0, 0, 0)"))
    engine.dispose()
    store = Store(url)
    with store.begin(write=False) as connection:
        found = {
            table: connection.execute(text(f"SELECT minute, errors, failed_calls FROM {table} ORDER BY minute")).all()
            for table in ("usage", "usage_hours")
        }
    store.close()
    assert found == {"usage": [(59, 3, 1), (60, 1, 0)], "usage_hours": [(0, 3, 1), (60, 1, 0)]}


def test_a_migration_that_fails_leaves_nothing_behind(store: Store) -> None:
    with pytest.raises(StoreError), store.begin() as connection:
        migrate(connection, (*MIGRATIONS, ("ALTER TABLE keys ADD COLUMN note TEXT", "UPDATE nothing SET note = 1")))
    with store.begin() as connection:
        assert "note" not in {c["name"] for c in inspect(connection).get_columns("keys")}
        assert connection.execute(text("SELECT MAX(version) FROM migrations")).scalar() == len(MIGRATIONS)


def test_a_store_of_a_newer_selfroute_is_refused(url: str, store: Store) -> None:
    with store.begin() as connection:
        connection.execute(text("INSERT INTO migrations VALUES (:version, 0)"), {"version": len(MIGRATIONS) + 1})
    with pytest.raises(StoreError, match="update selfroute"):
        Store(url)


def test_a_new_store_may_be_opened_by_several_workers_at_once(url: str) -> None:
    work = {"limits": {}, "worst_usd": 0.01, "settle": [1.0], "requests": 1, "seed": 0}
    said = at_once(url, *[work] * 4)
    assert [s["outcomes"] for s in said] == [{"settled": 1}] * 4


def test_a_transaction_is_written_whole_or_not_at_all(store: Store) -> None:
    def work(connection: Connection) -> None:
        insert(connection, "a")
        insert(connection, "a")

    with pytest.raises(StoreError, match="keys"):
        asyncio.run(store.write(work))
    assert asyncio.run(store.read(names)) == []


def test_an_error_does_not_repeat_what_was_to_be_written(store: Store) -> None:
    with pytest.raises(StoreError) as failed, store.begin() as connection:
        connection.execute(text("INSERT INTO keys (id, name) VALUES ('a', :name)"), {"name": "canary-4410"})
    assert "failed: " in str(failed.value)
    assert "canary" not in str(failed.value)


def test_connections_that_were_cut_are_replaced(postgres: str) -> None:
    store = Store(postgres)
    with store.begin(write=False) as connection:
        assert names(connection) == []
    with psycopg.connect(postgres) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    assert asyncio.run(store.read(names)) == []
    store.close()


def test_one_who_is_cancelled_learns_how_the_transaction_ended(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work(connection: Connection) -> None:
        insert(connection, "a")
        begun.set()
        assert go_on.wait(10)

    async def run() -> list[str]:
        writing = asyncio.create_task(store.write(work))
        await asyncio.to_thread(begun.wait, 10)
        writing.cancel()
        await asyncio.sleep(0)
        assert not writing.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await writing
        return await store.read(names)

    assert asyncio.run(run()) == ["a"]


def test_a_reader_does_not_wait_for_a_writer(store: Store) -> None:
    def write_slowly(connection: Connection) -> None:
        insert(connection, "a")
        assert read.wait(10)

    async def run() -> None:
        writing = asyncio.create_task(store.write(write_slowly))
        assert await store.read(names) == []
        read.set()
        await writing
        assert await store.read(names) == ["a"]

    read = threading.Event()
    asyncio.run(run())


def test_sqlite_is_the_owners_alone_and_keeps_a_write_ahead_log(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gateway.sqlite"
    store = Store(f"sqlite:///{path}")
    kept = ("journal_mode", "secure_delete", "page_size")
    with store.begin() as connection:
        insert(connection, "a")
        pragmas = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in kept]
    assert pragmas == ["wal", 1, 1024]
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()} == dict.fromkeys(
        ("gateway.sqlite", "gateway.sqlite-wal", "gateway.sqlite-shm"), 0o600
    )
    store.close()
    path.chmod(0o644)
    Store(str(path)).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("brief", [True, False])
def test_sqlites_log_begins_anew_while_others_write(
    brief: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfroute.serve.store._LOGGED", 20)
    monkeypatch.setattr("selfroute.serve.store._LONG", 150)
    store = Store(str(tmp_path / "gateway.sqlite"))
    sizes = []

    async def main() -> None:
        for n in range(1000):
            await store.write(lambda connection, n=n: insert(connection, str(n)), brief=brief)  # type: ignore[misc]
            await asyncio.sleep(0.0005)
            sizes.append((tmp_path / "gateway.sqlite-wal").stat().st_size)
            if sizes[-1] > 400 * 1024:
                # Waits for its turn behind whoever moves the log, however slow the disk is.
                await store.read(lambda connection: None)
        assert len(await store.read(names)) == 1000

    asyncio.run(main())
    store.close()
    # Each transaction writes one page of 1 KB or more, and the log begins anew after 20 of them at the earliest; all
    # 1000 in one log would be 3 MB.
    assert 20 * 1024 < max(sizes) < 600 * 1024, max(sizes)


def test_a_file_that_is_no_store_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, and long enough to be read as one" * 20)
    with pytest.raises(StoreError, match=r"notes\.txt failed: file is not a database"):
        Store(str(path))
    with pytest.raises(StoreError, match="cannot open the store"):
        Store(str(path / "below"))


def test_a_password_is_in_no_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(StoreError) as refused:
        Store("postgresql://me:s3cret@127.0.0.1:1/gateway?password=s3cret")
    with pytest.raises(ConfigError) as unreadable:
        Store("postgresql://me:s3cret@[::1/gateway")
    for caught in (refused, unreadable):
        assert "s3cret" not in str(caught.value)
    assert "127.0.0.1/gateway" in str(refused.value)
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("bad", ["mysql://host/db", "sqlite://", "sqlite:///:memory:", "://"])
def test_urls_that_cannot_be_stores(bad: str) -> None:
    with pytest.raises(ConfigError):
        Store(bad)


def test_of_works_that_wait_for_a_writer_one_that_fails_spoils_no_other(store: Store) -> None:
    """On SQLite those that wait share a transaction, which is undone with the one that fails."""
    begun, go_on = threading.Event(), threading.Event()

    def first(connection: Connection) -> None:
        begun.set()
        assert go_on.wait(10)

    def fails(connection: Connection) -> None:
        insert(connection, "c")
        raise ValueError("a fault of its own")

    async def run() -> list[object]:
        writing = [asyncio.create_task(store.write(first))]
        await asyncio.to_thread(begun.wait, 10)
        works = [lambda c, name=name: insert(c, name) for name in ("a", "b")]
        writing += [asyncio.create_task(store.write(work)) for work in (works[0], fails, works[1], works[0])]
        await asyncio.sleep(0)
        go_on.set()
        return await asyncio.gather(*writing, return_exceptions=True)

    results = asyncio.run(run())
    assert sorted(type(r).__name__ for r in results if r is not None) == ["StoreError", "ValueError"]
    assert asyncio.run(store.read(names)) == ["a", "b"]


def test_a_brief_transaction_waits_for_no_thread_and_stops_no_event_loop(tmp_path: Path) -> None:
    """On SQLite it is run at once, where nobody else writes; else the writer's thread waits for it."""
    path = str(tmp_path / "gateway.sqlite")
    ours, other = Store(path), Store(path)
    threads: list[int] = []

    def work(name: str) -> Callable[[Connection], None]:
        def insert_it(connection: Connection) -> None:
            threads.append(threading.get_ident())
            insert(connection, name)

        return insert_it

    async def run() -> list[str]:
        await ours.write(work("a"), brief=True)
        assert threads == [threading.get_ident()]
        with pytest.raises(StoreError):
            await ours.write(work("a"), brief=True)
        with other.begin() as connection:
            insert(connection, "b")
            writing = asyncio.create_task(ours.write(work("c"), brief=True))
            await asyncio.sleep(0.05)
            assert not writing.done()
        await writing
        assert threads[-1] != threading.get_ident()
        return await ours.read(names)

    assert asyncio.run(run()) == ["a", "b", "c"]
    ours.close()
    other.close()


class Link:
    """A TCP proxy before a PostgreSQL server on a Unix socket; while it is frozen, it takes everything and passes
    nothing on, so that the system notices nothing."""

    def __init__(self, server: str, listener: socket.socket) -> None:
        self._server, self._listener = server, listener
        self._flows = threading.Event()
        self._flows.set()
        self._last = b""
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        self._flows.clear()

    def freeze_after(self, last: bytes) -> None:
        """Once that was asked, the server hears of it, and is not heard."""
        self._last = last

    def thaw(self) -> None:
        self._last = b""
        self._flows.set()

    def leave_frozen(self) -> None:
        """Only new connections flow from now on."""
        self._flows.clear()
        self._flows = threading.Event()
        self._flows.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server)
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(*ends, self._flows), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, flows: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self._last and self._last in data:
                    flows.clear()
                else:
                    flows.wait()
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def linked(url: str) -> Iterator[tuple[str, Link]]:
    """The URL of a PostgreSQL database behind a link, and the link."""
    parsed = make_url(url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        link = Link(f"{parsed.query['host']}/.s.PGSQL.5432", listener)
        yield f"postgresql://selfroute@127.0.0.1:{listener.getsockname()[1]}/{parsed.database}", link
        link.thaw()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr("selfroute.serve.store.ANSWER_S", 0.5)
    return 0.5


@contextmanager
def in_time(at_most_s: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < at_most_s


@pytest.fixture
def database(postgres: str) -> str:
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS silent WITH (FORCE)")
        connection.execute("CREATE DATABASE silent")
    return postgres.replace("/postgres?", "/silent?")


def test_a_database_that_falls_silent_is_a_failure_and_works_again_after_it(database: str, impatient: float) -> None:
    async def main(store: Store, link: Link) -> None:
        ring, works = Keyring(store, fresh_s=0), [lambda c, n=n: insert(c, f"lost{n:02}") for n in range(20)]
        assert await store.read(names) == []
        link.freeze()
        with in_time(impatient + 1):
            # More than there are threads: what has not begun by then never will.
            asked = [*(store.write(work) for work in works), *(store.read(names) for _ in range(5))]
            failed = await asyncio.gather(*asked, *(ring.check(None) for _ in range(50)), return_exceptions=True)
        assert [str(error).partition("failed: ")[2] for error in failed] == ["no answer in 0.5 s"] * 75
        assert {type(error) for error in failed} == {SilentStoreError}
        with in_time(impatient + 1):
            asking = asyncio.create_task(store.write(works[0]))
            await asyncio.sleep(0.1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        link.thaw()
        for _ in range(50):
            with suppress(StoreError):
                await store.write(lambda c: insert(c, "a"))
                break
        assert await store.read(names) == ["a"]
        assert await ring.check(None) is None

    with linked(database) as (url, link):
        store = Store(url)
        asyncio.run(main(store, link))
        link.freeze()
        with in_time(impatient + 1):
            store.close()


def test_a_connection_that_stays_silent_is_given_up_for_another(
    database: str, impatient: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("selfroute.serve.database._SILENT_S", 1.0)

    async def main(store: Store, link: Link) -> None:
        assert await store.read(names) == []
        link.leave_frozen()
        asked = [store.read(names), store.read(names), *(store.write(lambda c: insert(c, "a")) for _ in range(8))]
        failed = await asyncio.gather(*asked, return_exceptions=True)
        assert any(isinstance(error, StoreError) for error in failed)
        await asyncio.sleep(1.0)
        await store.write(lambda c: insert(c, "b"))
        assert "b" in await store.read(names)

    with linked(database) as (url, link):
        store = Store(url)
        asyncio.run(main(store, link))
        store.close()
    # The thread that had the silent connection is free again.
    assert "left to themselves" not in caplog.text


def test_one_who_was_told_that_it_took_too_long_wrote_nothing(store: Store, impatient: float) -> None:
    store.answer_s = impatient
    go_on = threading.Event()

    def slow(connection: Connection) -> None:
        insert(connection, "slow")
        go_on.wait(10)

    async def main() -> None:
        asked = [store.write(slow) for _ in range(8)]
        with in_time(impatient + 1):
            failed = await asyncio.gather(
                *asked, store.write(lambda c: insert(c, "queued"), brief=True), return_exceptions=True
            )
        assert {type(error) for error in failed} == {SilentStoreError}
        go_on.set()
        await store.write(lambda c: insert(c, "a"))
        assert await store.read(names) == ["a"]

    asyncio.run(main())


def test_one_that_takes_too_long_costs_the_others_nothing(tmp_path: Path) -> None:
    """SQLite writes what waits together: whoever came later has its own time."""
    store = Store(str(tmp_path / "a.sqlite"))
    go_on, holding = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        holding.set()
        go_on.wait(10)

    async def main() -> None:
        store.answer_s = 0.5
        first = asyncio.create_task(store.write(hold))
        early = asyncio.create_task(store.write(lambda c: insert(c, "early")))
        await asyncio.sleep(0.1)
        assert holding.is_set()
        store.answer_s = 5
        group = [asyncio.create_task(store.write(lambda c, n=n: insert(c, f"late {n}"))) for n in range(3)]
        results = await asyncio.gather(first, early, return_exceptions=True)
        assert [type(r) for r in results] == [SilentStoreError, SilentStoreError]
        go_on.set()
        await asyncio.gather(*group)
        assert sorted(await store.read(names)) == ["late 0", "late 1", "late 2"]

    asyncio.run(main())
    store.close()


def test_what_is_told_in_time_is_written_though_the_next_is_late(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "a.sqlite"))
    go_on = threading.Event()

    def fails(connection: Connection) -> None:
        raise ValueError("so that each goes alone")

    def slow(connection: Connection) -> None:
        insert(connection, "slow")
        go_on.wait(10)

    async def main() -> None:
        store.answer_s = 0.5
        busy = threading.Event()
        first = asyncio.create_task(store.write(lambda c: busy.wait(10)))
        await asyncio.sleep(0.05)
        group = [asyncio.create_task(store.write(w)) for w in (lambda c: insert(c, "a"), fails, slow)]
        await asyncio.sleep(0)
        busy.set()
        results = await asyncio.gather(*group, return_exceptions=True)
        assert [type(r) for r in results] == [type(None), ValueError, SilentStoreError]
        go_on.set()
        await first
        store.answer_s = 5
        await store.write(lambda c: insert(c, "b"))
        assert sorted(await store.read(names)) == ["a", "b"]

    asyncio.run(main())
    store.close()


def test_a_reader_that_takes_too_long_is_not_waited_for(store: Store, impatient: float) -> None:
    store.answer_s = impatient
    go_on = threading.Event()
    begun: list[int] = []

    def slow(connection: Connection) -> list[str]:
        begun.append(1)
        go_on.wait(10)
        return names(connection)

    async def main() -> None:
        with in_time(impatient + 1):
            failed = await asyncio.gather(*(store.read(slow) for _ in range(5)), return_exceptions=True)
        assert {type(error) for error in failed} == {SilentStoreError}
        go_on.set()
        assert await store.read(names) == []
        assert len(begun) <= 2

    asyncio.run(main())


def test_the_books_are_right_after_the_database_was_silent_as_it_committed(database: str, impatient: float) -> None:
    """A reservation that was written though nobody heard of it is swept; a settlement told again counts once."""
    now = [1_000_000.0]

    async def main(store: Store, link: Link) -> None:
        budget = Budget(store, Limits(usd_per_day=10), hold_s=100, clock=lambda: now[0])
        first = await budget.reserve(1.0)
        assert isinstance(first, Reservation)
        budget.settle_later(first, 0.25)
        # The server says the word too, in its answer.
        link.freeze_after(b"Q\0\0\0\x0bCOMMIT")
        with pytest.raises(StoreError):
            await budget.reserve(2.0)
        link.thaw()
        while True:
            with suppress(StoreError):
                await budget.flush()
                break
        usage = await budget.usage()
        assert (usage.spent_usd, usage.held_usd) == (0.25, 2.0)
        assert len(await store.read(lambda c: c.execute(select(RESERVATIONS)).all())) == 1
        now[0] += 101
        assert await budget.sweep() == 1
        usage = await budget.usage()
        assert (usage.spent_usd, usage.held_usd) == (2.25, 0.0)

    with linked(database) as (url, link):
        store = Store(url)
        asyncio.run(main(store, link))
        store.close()


def test_a_process_ends_though_a_transaction_does_not(tmp_path: Path) -> None:
    program = """
import asyncio, sys, time
from selfroute.errors import StoreError
from selfroute.serve import store
store.ANSWER_S = 0.3
ours = store.Store(sys.argv[1])
try:
    asyncio.run(ours.write(lambda connection: time.sleep(300)))
except StoreError as error:
    print(error)
ours.close()
"""
    path = str(tmp_path / "gateway.sqlite")
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"the store {path} failed: no answer in 0.3 s\n")
    assert "left to themselves: 1" in done.stderr
