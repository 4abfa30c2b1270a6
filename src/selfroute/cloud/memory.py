"""The cloud's memory: a persistent cache of answers and a ledger of every call, in one SQLite file.

An answer and its ledger line are written in one transaction as soon as the answer arrives, so that a crash, a kill or a
failure of a neighbour never pays for it twice. The answers of a judge stand in a file of their own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from selfroute.cloud import make_cloud
from selfroute.errors import CloudError
from selfroute.tasks import Task, judge_of
from selfroute.types import CloudAnswer, CloudClient, CloudRequest

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, request TEXT NOT NULL, answer TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, key TEXT NOT NULL, phase TEXT NOT NULL, step INTEGER NOT NULL,
    problem TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    cost_usd REAL NOT NULL, latency_s REAL NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a phase has paid: calls (cache hits are not calls), tokens, USD."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float


class Cloud:
    """A cloud client with a memory and a ledger; close it, or use it in a `with` block.


    Args:
        client: who is asked what is not remembered.
        path: the file.
        stage: where several runs share the file, a name for the calls of this one, which `spent` tells from theirs.
    """

    def __init__(self, client: CloudClient, path: Path, *, stage: str = "") -> None:
        self.client = client
        self.path = path
        self.stage = stage
        # One event loop for the client's life (its connections belong to it), off the caller's thread, which may
        # have a loop of its own.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="selfroute-cloud", daemon=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise CloudError(f"cannot open the cloud's cache and ledger {path}: {error}") from error
        client.carry(self.spent().cost_usd)
        self._thread.start()

    def __enter__(self) -> Cloud:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the client and the file."""
        asyncio.run_coroutine_threadsafe(self.client.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._db.close()

    def ask(self, questions: Sequence[tuple[str, CloudRequest]], *, phase: str, step: int = 0) -> list[CloudAnswer]:
        """Answers to (problem id, request) pairs, in order: from the cache, or bought and remembered.

        Raises:
            CloudError: some request failed; those that succeeded are in the cache and the ledger all the same.
        """
        work = self._begin(questions, phase, step)
        try:
            return work.result()
        except BaseException:
            work.cancel()
            raise

    async def answers(
        self, questions: Sequence[tuple[str, CloudRequest]], *, phase: str, step: int = 0
    ) -> list[CloudAnswer]:
        """`ask` for those in an event loop of their own; cancelling it cancels the requests."""
        return await asyncio.wrap_future(self._begin(questions, phase, step))

    def _begin(self, questions: Sequence[tuple[str, CloudRequest]], phase: str, step: int) -> Future[list[CloudAnswer]]:
        return asyncio.run_coroutine_threadsafe(self._ask(questions, self._named(phase), step), self._loop)

    async def _ask(self, questions: Sequence[tuple[str, CloudRequest]], phase: str, step: int) -> list[CloudAnswer]:
        gate = asyncio.Semaphore(self.client.concurrency)
        under_way: dict[str, asyncio.Task[CloudAnswer]] = {}
        stopped: CloudError | None = None

        async def buy(key: str, problem: str, request: CloudRequest) -> CloudAnswer:
            nonlocal stopped
            cached = self._find(key)
            if cached is not None:
                return cached
            async with gate:
                # What the client's own patience did not mend, or could not be written down, the next would meet too.
                if stopped:
                    raise stopped
                try:
                    try:
                        answer = await self.client.complete(request)
                    finally:
                        self._note_abandoned(problem, phase, step)
                    self._remember(key, problem, request, answer, phase, step)
                except CloudError as error:
                    stopped = stopped or error
                    raise
            return answer

        keys = []
        for problem, request in questions:
            key = self.key(request)
            keys.append(key)
            if key not in under_way:
                under_way[key] = asyncio.create_task(buy(key, problem, request))
        results = dict(zip(under_way, await asyncio.gather(*under_way.values(), return_exceptions=True), strict=True))
        failures = [r for r in results.values() if isinstance(r, BaseException)]
        if failures:
            kept = f" (answers that came are kept in {self.path.name} and will not be paid again)"
            raise CloudError(
                f"{len(failures)} of {len(results)} cloud requests failed or were not sent: {stopped or failures[0]}"
                + (kept if len(failures) < len(results) else "")
            ) from failures[0]
        return [answer for key in keys if isinstance(answer := results[key], CloudAnswer)]

    def key(self, request: CloudRequest) -> str:
        """SHA-256 of the canonical JSON of everything that affects the answer."""
        everything = {"client": dict(self.client.identity), "request": _written(request)}
        return hashlib.sha256(json.dumps(everything, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def spent(self, phase: str | None = None, *, until_step: int | None = None) -> Spent:
        """The ledger's totals: of one phase, or of all phases and runs; up to and including a step (the same after a
        resume), or all."""
        query = (
            "SELECT COUNT(NULLIF(key, '')), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0), "
            "COALESCE(SUM(cost_usd), 0.0) FROM calls WHERE (?1 IS NULL OR phase = ?1) AND (?2 IS NULL OR step <= ?2)"
        )
        return Spent(*self._read(query, (None if phase is None else self._named(phase), until_step)))

    def _named(self, phase: str) -> str:
        return f"{self.stage}/{phase}" if self.stage else phase

    def _find(self, key: str) -> CloudAnswer | None:
        row = self._read("SELECT answer FROM answers WHERE key = ?", (key,))
        return None if row is None else CloudAnswer(**json.loads(row[0]))

    def _read(self, query: str, values: tuple[str | int | None, ...]) -> Any:
        """The first row that a query gives, or None."""
        try:
            with closing(self._db.execute(query, values)) as rows:
                return rows.fetchone()
        except sqlite3.Error as error:
            raise CloudError(f"cannot read the cloud's cache and ledger {self.path}: {error}") from error

    def _note_abandoned(self, problem: str, phase: str, step: int) -> None:
        """A line without a key for attempts that broke off and may have been charged: money, and no call."""
        cost_usd = self.client.abandoned_usd()
        if cost_usd:
            self._write([self._line("", problem, phase, step, 0, 0, cost_usd, 0.0)])

    def _remember(
        self, key: str, problem: str, request: CloudRequest, answer: CloudAnswer, phase: str, step: int
    ) -> None:
        tokens = answer.prompt_tokens, answer.completion_tokens
        self._write(
            [
                (
                    "INSERT OR IGNORE INTO answers VALUES (?, ?, ?)",
                    (key, json.dumps(_written(request)), json.dumps(asdict(answer))),
                ),
                self._line(key, problem, phase, step, *tokens, answer.cost_usd, answer.latency_s),
            ]
        )

    def _line(self, *values: Any) -> tuple[str, tuple[Any, ...]]:
        return (
            "INSERT INTO calls (time, key, problem, phase, step, prompt_tokens, completion_tokens, cost_usd, "
            "latency_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (time.time(), *values),
        )

    def _write(self, statements: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """All of it, or nothing."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for statement, values in statements:
                self._db.execute(statement, values)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise CloudError(f"cannot write the cloud's cache and ledger {self.path}: {error}") from error


def open_judge(task: Task, path: Path, *, phase: str) -> AbstractContextManager[object]:
    """Give a task the judge that its settings name, with a memory in `path`, for the time of a `with` block.

    A task that needs none is left as it is. `phase` is what the ledger's lines are of.

    Raises:
        ConfigError: no such judge, or settings that it does not take.
    """
    choice = judge_of(task)
    if choice is None:
        return nullcontext()
    judge, judged = Cloud(make_cloud(choice), path), cast(Any, task)
    judged.ask = partial(judge.answers, phase=phase)
    return judge


def spent_by_phase(path: Path) -> dict[str, Spent]:
    """What a ledger says of each phase; nothing where there is none yet.

    Raises:
        CloudError: it cannot be read.
    """
    if not path.is_file():
        return {}
    query = (
        "SELECT phase, COUNT(NULLIF(key, '')), SUM(prompt_tokens), SUM(completion_tokens), SUM(cost_usd) FROM calls "
        "GROUP BY phase ORDER BY phase"
    )
    try:
        with closing(sqlite3.connect(path, timeout=30)) as db:
            return {phase: Spent(*totals) for phase, *totals in db.execute(query).fetchall()}
    except sqlite3.Error as error:
        raise CloudError(f"cannot read the ledger {path}: {error}") from error


def _written(request: CloudRequest) -> dict[str, Any]:
    """A request as it is kept; one without further fields is what it was before there were any."""
    fields = asdict(request)
    return fields if request.extra else {name: value for name, value in fields.items() if name != "extra"}
