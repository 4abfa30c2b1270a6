"""The hard budget: money is held back before the cloud is asked, and settled once when it has answered.

    arrive                 a request is counted
    reserve                every limit of every scope is checked and the worst case held back, in one transaction
      -> settle(cost)      the call's real cost takes the place of the worst case, once
      -> release           the cloud was never asked: as if nothing had been
      -> settle_later      either, in the worker's next transaction
      -> sweep             a worker died: spent at the worst case

A transaction that grants locks the accounts of its scopes first, the whole gateway's always among them, so that workers
and replicas on one store decide one after the other and together never pass a limit. Where the store fails, nothing is
granted: `StoreError` is to be taken as a denial. Left out on purpose: prices, and what happens to a request that is
denied.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pydantic_core import from_json, to_json
from sqlalchemy import Connection, bindparam, delete, insert, or_, select, update

from selfroute.errors import StoreError
from selfroute.serve import keys
from selfroute.serve.account import DAY_S, Account, Denied, Limits, Scope, Window, nano
from selfroute.serve.store import Prepared, Store
from selfroute.serve.tables import ACCOUNTS, RESERVATIONS, upsert

GATEWAY = "gateway"
"""The scope of all requests. It sorts before the keys' (`key:ID`), so every transaction locks it first."""

FLUSH_S = 0.5

FEW = 20
"""With fewer accounts and reservations than this a transaction is brief."""

SWEEP_S = 30.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Nano-USD held back for one call, for the gateway and, unless it is empty, the key's `scope`."""

    id: str
    at: float
    expires_at: float
    scope: str
    day: int
    worst_nano: int


@dataclass(frozen=True, slots=True)
class _Ended:
    """A reservation whose call has ended, at `cost` nano-USD; it was not `called` if the cloud was never asked."""

    reservation: Reservation
    cost: int
    called: bool = True


@dataclass(frozen=True, slots=True)
class Usage:
    """What a scope has used: counts in its share's window and in the last minute, money today."""

    requests: int
    calls: int
    requests_minute: int
    calls_minute: int
    spent_usd: float
    held_usd: float

    def meters(self, limits: Limits) -> dict[str, tuple[float, float | None]]:
        """What is used of each limit, and the limit itself (None: there is none), by the limit's name."""
        return {
            "share": (self.calls / max(self.requests, limits.min_requests), limits.share),
            "usd_per_day": (self.spent_usd + self.held_usd, limits.usd_per_day),
            "calls_per_minute": (self.calls_minute, limits.calls_per_minute),
            "requests_per_minute": (self.requests_minute, limits.requests_per_minute),
        }


class Budget:
    """The budget on a store.

    `limits` are the whole gateway's; a key's are given with each request. A reservation that is neither settled nor
    released within `hold_s` is taken for lost: longer than any call may take.
    """

    def __init__(
        self, store: Store, limits: Limits, *, hold_s: float = 900.0, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._hold_s, self._clock = store, hold_s, clock
        self._gateway = Scope(GATEWAY, limits)
        # Requests that the store does not know yet, by scope. What is lost of them with a failed write or a dead
        # worker makes shares smaller, never larger.
        self._arrived: dict[str, tuple[Scope, int]] = {}
        # Until the store knows of their end, they are held back at their worst case.
        self._ended: list[_Ended] = []

    async def arrive(self, key: Scope | None = None) -> Denied | None:
        """Count a request, or deny it; one that is denied does not count.

        Where requests a minute are limited, that takes a transaction; else the count is kept here until the next
        `reserve` or `flush`.

        Raises:
            StoreError: requests are limited and the store failed.
        """
        scopes = self._scopes(key)
        if all(scope.limits.requests_per_minute is None for scope in scopes):
            for scope in scopes:
                _, before = self._arrived.get(scope.name, (scope, 0))
                self._arrived[scope.name] = scope, before + 1
            return None

        def work(connection: Connection) -> Denied | None:
            accounts, now = self._locked(connection, scopes)
            refused = _first(accounts[scope.name].refuses_request(scope, now) for scope in scopes)
            if not refused:
                _save(connection, {name: account.arrive(now, 1) for name, account in accounts.items()})
            return refused

        return await self._store.write(work, brief=True)

    async def reserve(self, worst_usd: float, key: Scope | None = None) -> Reservation | Denied:
        """Hold back the most that a call may cost, if no limit is passed by it; what is to be settled goes first.

        A task that is cancelled here has reserved nothing.

        Raises:
            StoreError: the store failed; what may have been reserved is swept in time.
        """
        worst = nano(worst_usd)
        reserved: list[Reservation] = []
        scopes = self._scopes(key)
        arrived = [self._arrived.pop(scope.name, (scope, 0))[1] for scope in scopes]
        ended, self._ended = self._ended, []

        def work(connection: Connection) -> Reservation | Denied:
            accounts, now = self._locked(connection, scopes)
            _end(connection, ended, accounts)
            for scope, requests in zip(scopes, arrived, strict=True):
                accounts[scope.name] = accounts[scope.name].arrive(now, requests)
            refused = _first(accounts[scope.name].refuses_call(scope, now, worst) for scope in scopes)
            if refused:
                _save(connection, accounts)
                return refused
            day, of = accounts[GATEWAY].day, key.name if key else ""
            held = Reservation(secrets.token_hex(16), now, now + self._hold_s, of, day, worst)
            for scope in scopes:
                accounts[scope.name] = accounts[scope.name].hold(now, worst)
            _save(connection, accounts)
            _HOLD.run(connection, {name: getattr(held, name) for name in Reservation.__slots__})
            reserved.append(held)
            return held

        try:
            return await self._store.write(work, brief=True)
        except asyncio.CancelledError:
            # What was ended all the same is not ended twice.
            self._ended += ended
            if reserved:
                with suppress(StoreError):
                    await self.release(reserved[-1])
            raise
        except StoreError:
            self._ended += ended
            raise

    async def settle(self, reservation: Reservation, cost_usd: float) -> bool:
        """Put a call's cost in the place of its worst case; False when that was done before, or it was swept.

        A cost above the worst case counts as it is.

        Raises:
            StoreError: the store failed; the worst case stays held back, and is swept in time.
        """
        return bool(await self._close(_Ended(reservation, nano(cost_usd))))

    async def release(self, reservation: Reservation) -> bool:
        """Give a reservation back whose call was never made; False when it was settled, released or swept before.

        Raises:
            StoreError: as from `settle`.
        """
        return bool(await self._close(_Ended(reservation, 0, called=False)))

    def settle_later(self, reservation: Reservation, cost_usd: float | None) -> None:
        """`settle`, or `release` where there is no cost, in the transaction of the next `reserve` or `flush` here.

        Until then other workers see the worst case held back. Where the store fails, it is tried again.
        """
        self._ended.append(_Ended(reservation, nano(cost_usd or 0), called=cost_usd is not None))

    async def sweep(self) -> int:
        """Count reservations that nobody settled in time as spent, at their worst case; how many there were.

        Raises:
            StoreError: the store failed.
        """
        expired = await self._store.read(lambda c: c.execute(_EXPIRED, {"now": self._clock()}).all())
        lost = [Reservation(**row._mapping) for row in expired]
        swept = await self._close(*(_Ended(reservation, reservation.worst_nano) for reservation in lost)) if lost else 0
        if swept:
            _log.warning("%d reservations were never settled (a worker died?): spent at their worst case", swept)
        return swept

    async def flush(self) -> None:
        """Write down the requests that were counted here, and what was to be settled.

        Raises:
            StoreError: the store failed.
        """
        arrived, self._arrived = self._arrived, {}
        ended, self._ended = self._ended, []
        if not (arrived or ended):
            return

        def work(connection: Connection) -> None:
            _close_all(connection, ended)
            for name, (scope, requests) in sorted(arrived.items()):
                accounts, now = self._locked(connection, self._scopes(scope if name != GATEWAY else None))
                _save(connection, {name: accounts[name].arrive(now, requests)})

        try:
            await self._store.write(work, brief=len(arrived) + len(ended) < FEW)
        except (StoreError, asyncio.CancelledError):
            self._ended += ended
            raise

    async def usage(self, key: Scope | None = None) -> Usage:
        """What the gateway has used, or a key.

        Raises:
            StoreError: the store failed.
        """
        [usage] = await self._store.read(lambda c: usages(c, [key or self._gateway], self._clock()))
        return usage

    async def run(self, flush_s: float = FLUSH_S) -> None:
        """Flush and sweep until the task is cancelled; flushes once more then."""
        swept_at = float("-inf")
        try:
            while True:
                try:
                    await self.flush()
                    if time.monotonic() - swept_at >= SWEEP_S:
                        swept_at = time.monotonic()
                        await self.sweep()
                except StoreError as error:
                    _log.error("counts of requests or lost reservations were not written down: %s", error)
                await asyncio.sleep(flush_s)
        finally:
            with suppress(StoreError):
                await self.flush()

    def _scopes(self, key: Scope | None) -> list[Scope]:
        return [self._gateway, key] if key else [self._gateway]

    def _locked(self, connection: Connection, scopes: Sequence[Scope]) -> tuple[dict[str, Account], float]:
        """The accounts of the gateway and of a key by name, which nobody else changes meanwhile, and the time."""
        names = [scope.name for scope in scopes]
        accounts = _accounts(connection, names[-1], lock=True)
        if len(accounts) < len(names):
            opened = [{"scope": name, **_row(Account())} for name in names if name not in accounts]
            connection.execute(upsert(connection.dialect.name, ACCOUNTS).on_conflict_do_nothing(), opened)
            accounts = _accounts(connection, names[-1], lock=True)
        now = self._clock()
        # By a clock that is behind, it is the day that another's has seen.
        day = max(int(now // DAY_S), *(account.day for account in accounts.values()))
        return {scope.name: accounts[scope.name].on(day, scope.limits.window_s, now) for scope in scopes}, now

    async def _close(self, *ended: _Ended) -> int:
        return await self._store.write(lambda connection: _close_all(connection, ended), brief=len(ended) < FEW)


def _close_all(connection: Connection, ended: Sequence[_Ended]) -> int:
    """End these reservations; how many were still there."""
    accounts: dict[str, Account] = {}
    found = _end(connection, ended, accounts)
    _save(connection, accounts)
    return found


def _end(connection: Connection, ended: Sequence[_Ended], accounts: dict[str, Account]) -> int:
    """Remove these reservations, and count their calls in the accounts, or take them back; how many were still there.

    `accounts` are those that are locked by now; others are locked and added, and the caller saves them all.
    """
    found = 0
    for end in ended:
        reservation = end.reservation
        scopes = [GATEWAY, reservation.scope] if reservation.scope else [GATEWAY]
        # Before the reservation, which whoever sweeps may be removing: the gateway's account comes first everywhere.
        if not accounts.keys() >= set(scopes):
            accounts |= _accounts(connection, reservation.scope, lock=True) | accounts
        if _REMOVE.run(connection, {"id": reservation.id}).rowcount == 0:
            continue
        found += 1
        for scope in accounts.keys() & set(scopes):
            account = accounts[scope].pay(reservation.day, reservation.worst_nano, end.cost)
            accounts[scope] = account if end.called else account.take_back(reservation.at)
    return found


def usages(connection: Connection, scopes: Sequence[Scope], now: float) -> list[Usage]:
    """What each of these has used."""
    rows = connection.execute(select(ACCOUNTS).where(ACCOUNTS.c.scope.in_([scope.name for scope in scopes])))
    accounts = {scope: _account(*rest) for scope, *rest in rows}
    found = []
    for scope in scopes:
        account = accounts.get(scope.name, Account())
        account = account.on(max(account.day, int(now // DAY_S)), scope.limits.window_s, now)
        counts = *account.window.totals(now), *account.minute.totals(now)
        found.append(Usage(*counts, account.spent / 1e9, account.held / 1e9))
    return found


def usage_of_all(connection: Connection, limits: Limits) -> list[tuple[Scope, Usage]]:
    """What the gateway, under these limits, and each valid key has used."""
    now = time.time()
    scopes = [Scope(GATEWAY, limits), *(key.scope for key in keys.everything(connection) if key.valid(now))]
    return list(zip(scopes, usages(connection, scopes, now), strict=True))


def _first(refusals: Iterable[Denied | None]) -> Denied | None:
    return next((refused for refused in refusals if refused), None)


_OF = select(ACCOUNTS).where(or_(ACCOUNTS.c.scope == bindparam("gateway"), ACCOUNTS.c.scope == bindparam("key")))
_READ = Prepared(_OF)
_LOCK = Prepared(_OF.order_by(ACCOUNTS.c.scope).with_for_update())
_SAVE = Prepared(update(ACCOUNTS).where(ACCOUNTS.c.scope == bindparam("of")))
_HOLD = Prepared(insert(RESERVATIONS))
_REMOVE = Prepared(delete(RESERVATIONS).where(RESERVATIONS.c.id == bindparam("id")))
_EXPIRED = select(RESERVATIONS).where(RESERVATIONS.c.expires_at <= bindparam("now"))


def _accounts(connection: Connection, key: str, *, lock: bool) -> dict[str, Account]:
    """The gateway's account and a key's, where they are there; locked in this order, so nobody waits in a circle."""
    rows = (_LOCK if lock else _READ).run(connection, {"gateway": GATEWAY, "key": key}).fetchall()
    return {scope: _account(*rest) for scope, *rest in rows}


def _account(day: int, spent: int, held: int, minute: str, window_s: int, window: str) -> Account:
    return Account(day, spent, held, Window(60, _slots(minute)), Window(window_s, _slots(window)))


def _save(connection: Connection, accounts: Mapping[str, Account]) -> None:
    if accounts:
        _SAVE.run(connection, *({"of": scope, **_row(account)} for scope, account in accounts.items()))


def _row(account: Account) -> dict[str, str | int]:
    return {
        "day": account.day,
        "spent_nano": account.spent,
        "held_nano": account.held,
        "minute_counts": to_json(account.minute.slots).decode(),
        "window_s": account.window.length_s,
        "window_counts": to_json(account.window.slots).decode(),
    }


def _slots(written: str) -> tuple[tuple[int, int, int], ...]:
    return tuple(map(tuple, from_json(written)))
