"""The processes in which hand-offs are searched (see `finding`), started with the gateway and stopped with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from queue import Empty, Queue
from typing import Any

from selfroute.errors import ConfigError, TaskError
from selfroute.serve.border import Border
from selfroute.serve.privacy import Privacy
from selfroute.serve.rules import INSTALL, read_rules
from selfroute.tasks.pool import Pool

PROCESSES = 2
"""Workers of a gateway process: one that is stopped for being late leaves another."""

_MEMORY_BYTES = 4 * 2**30
_START_S = 120.0


class Search:
    """Finds in worker processes; implements `border.Finder`.

    Raises:
        ConfigError: what it needs is not installed, or the config or the rule file cannot be used.
    """

    def __init__(self, privacy: Privacy) -> None:
        if privacy.redact != "never":
            _need("presidio_analyzer", f"privacy.redact={privacy.redact}")
        rules = read_rules(privacy.rules, lambda: _known_entities(privacy)) if privacy.rules else ()
        self._settings = json.dumps(
            {
                "wanted": privacy.entities if privacy.redact != "never" else [],
                "rules": [rule.model_dump(mode="json") for rule in rules],
                "language": privacy.language,
                "model": privacy.model,
                "min_score": privacy.min_score,
            }
        )
        self._limit_s = privacy.timeout_s
        # A first text, so that what is made at its first use is made before a client waits.
        first = (self._settings, ["Call 212-555-0100."], True)
        path = "selfroute.serve.finding:find"
        self._pools = [Pool(path, size=1, memory_bytes=_MEMORY_BYTES, first=first) for _ in range(PROCESSES)]
        self._idle: Queue[Pool] = Queue()
        self._finding, self._starting = ThreadPoolExecutor(PROCESSES), ThreadPoolExecutor(PROCESSES)
        try:
            # What cannot be used, the first one says; the others need not be waited for.
            self._start(self._pools[0])
        except TaskError as error:
            self.close()
            # Of what `finding` says itself, the words alone.
            why = str(error).rpartition("undecided: ValueError: ")[2]
            raise ConfigError(f"hand-offs cannot be checked: {why}") from error
        for pool in self._pools[1:]:
            self._starting.submit(self._start, pool)

    async def find(self, texts: Sequence[str], redact: bool) -> Mapping[str, Any]:
        """As `finding.find`.

        Raises:
            TaskError: it failed, or took too long.
        """
        return await asyncio.get_running_loop().run_in_executor(self._finding, self._find, list(texts), redact)

    def _find(self, texts: list[str], redact: bool) -> Mapping[str, Any]:
        try:
            pool = self._idle.get(timeout=self._limit_s)
        except Empty:
            raise TaskError("no worker is ready") from None
        failure = "the worker does not start"
        try:
            done = pool.call(self._settings, texts, redact, limit_s=self._limit_s)
            failure = done.failure
        finally:
            # A new worker starts behind the next request's back.
            if failure:
                self._starting.submit(self._start, pool)
            else:
                self._idle.put(pool)
        if failure:
            raise TaskError(failure)
        found: Mapping[str, Any] = done.result
        return found

    def _start(self, pool: Pool) -> None:
        try:
            pool.start()
        finally:
            self._idle.put(pool)

    def close(self) -> None:
        """Stop the workers."""
        for threads in (self._finding, self._starting):
            threads.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools:
            pool.close()


def open_border(privacy: Privacy) -> tuple[Border, Search | None]:
    """The way out that a config describes, and what finds for it, to be closed in the end.

    Raises:
        ConfigError: as from `Search`.
    """
    if privacy.redact == "never" and not privacy.rules:
        return Border(privacy), None
    search = Search(privacy)
    return Border(privacy, search), search


def _known_entities(privacy: Privacy) -> list[str]:
    _need("presidio_analyzer", "a rule with an entity")
    asking = Pool("selfroute.serve.finding:entities", size=1, memory_bytes=_MEMORY_BYTES)
    try:
        done = asking.call(privacy.language, privacy.model, limit_s=_START_S)
    except TaskError as error:
        raise ConfigError(f"hand-offs cannot be checked: {error}") from error
    finally:
        asking.close()
    if done.failure:
        raise ConfigError(f"hand-offs cannot be checked: {done.failure.rpartition('undecided: ValueError: ')[2]}")
    return list(done.result)


def _need(module: str, what: str) -> None:
    if find_spec(module) is None:
        raise ConfigError(f"{what} needs {module}: {INSTALL}")
