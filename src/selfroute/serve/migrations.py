"""The store's schema, as numbered steps that are applied in order and recorded in the store itself.

A step that was released is never edited: a change is a new step at the end. The statements are of the SQL that SQLite
and PostgreSQL share. Left out on purpose: going back; a store that a newer selfroute wrote is refused.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlalchemy import Connection, text

from selfroute.errors import StoreError

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE requests (
            id TEXT PRIMARY KEY, at DOUBLE PRECISION NOT NULL, key_id TEXT NOT NULL, model TEXT NOT NULL,
            policy TEXT NOT NULL, route TEXT NOT NULL, score DOUBLE PRECISION, denied TEXT NOT NULL,
            status INTEGER NOT NULL, error TEXT NOT NULL, device_prompt_tokens BIGINT NOT NULL,
            device_completion_tokens BIGINT NOT NULL, cloud_prompt_tokens BIGINT NOT NULL,
            cloud_completion_tokens BIGINT NOT NULL, cost_nano BIGINT NOT NULL, first_ms DOUBLE PRECISION,
            device_ms DOUBLE PRECISION, cloud_ms DOUBLE PRECISION, total_ms DOUBLE PRECISION NOT NULL,
            request TEXT, response TEXT)
        """,
        "CREATE INDEX requests_at ON requests (at)",
        "CREATE INDEX requests_denied ON requests (at) WHERE denied <> ''",
        """
        CREATE TABLE usage (
            minute BIGINT NOT NULL, key_id TEXT NOT NULL, requests BIGINT NOT NULL, calls BIGINT NOT NULL,
            denied BIGINT NOT NULL, errors BIGINT NOT NULL, cost_nano BIGINT NOT NULL, device_tokens BIGINT NOT NULL,
            cloud_tokens BIGINT NOT NULL, PRIMARY KEY (minute, key_id))
        """,
        """
        CREATE TABLE accounts (
            scope TEXT PRIMARY KEY, day INTEGER NOT NULL, spent_nano BIGINT NOT NULL, held_nano BIGINT NOT NULL,
            minute_counts TEXT NOT NULL, window_s INTEGER NOT NULL, window_counts TEXT NOT NULL)
        """,
        """
        CREATE TABLE reservations (
            id TEXT PRIMARY KEY, at DOUBLE PRECISION NOT NULL, expires_at DOUBLE PRECISION NOT NULL,
            scope TEXT NOT NULL, day INTEGER NOT NULL, worst_nano BIGINT NOT NULL)
        """,
        "CREATE INDEX reservations_expires_at ON reservations (expires_at)",
        """
        CREATE TABLE keys (
            id TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, prefix TEXT NOT NULL, name TEXT NOT NULL,
            limits TEXT NOT NULL, policies TEXT NOT NULL, models TEXT NOT NULL, created_at DOUBLE PRECISION NOT NULL,
            expires_at DOUBLE PRECISION, revoked_at DOUBLE PRECISION)
        """,
    ),
    (
        "ALTER TABLE requests ADD COLUMN decision TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE keys ADD COLUMN admin INTEGER NOT NULL DEFAULT 0",
        # A page of one key's requests, and counts of denials, are read from an index alone.
        "CREATE INDEX requests_key ON requests (key_id, at)",
        "DROP INDEX requests_denied",
        "CREATE INDEX requests_denied ON requests (at, denied, key_id) WHERE denied <> ''",
        """
        CREATE TABLE usage_hours (
            minute BIGINT NOT NULL, key_id TEXT NOT NULL, requests BIGINT NOT NULL, calls BIGINT NOT NULL,
            denied BIGINT NOT NULL, errors BIGINT NOT NULL, cost_nano BIGINT NOT NULL, device_tokens BIGINT NOT NULL,
            cloud_tokens BIGINT NOT NULL, PRIMARY KEY (minute, key_id))
        """,
        """
        INSERT INTO usage_hours
        SELECT minute / 60 * 60 AS first, key_id, SUM(requests), SUM(calls), SUM(denied), SUM(errors),
            SUM(cost_nano), SUM(device_tokens), SUM(cloud_tokens)
        FROM usage GROUP BY first, key_id
        """,
        "CREATE TABLE sessions (hash TEXT PRIMARY KEY, key_id TEXT NOT NULL, expires_at DOUBLE PRECISION NOT NULL)",
    ),
    (
        "ALTER TABLE requests ADD COLUMN rule TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE requests ADD COLUMN redacted TEXT NOT NULL DEFAULT ''",
    ),
    (
        "ALTER TABLE usage ADD COLUMN failed_calls BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE usage_hours ADD COLUMN failed_calls BIGINT NOT NULL DEFAULT 0",
        # `errors` were all from 500 on, those whose call was denied among them.
        """
        UPDATE usage SET (errors, failed_calls) = (
            SELECT COUNT(*), COALESCE(SUM(CASE WHEN route = 'cloud' THEN 1 ELSE 0 END), 0) FROM requests
            WHERE requests.key_id = usage.key_id AND at >= 60.0 * minute AND at < 60.0 * (minute + 1)
            AND status >= 400 AND status <> 499 AND denied = '')
        """,
        """
        UPDATE usage_hours SET (errors, failed_calls) = (
            SELECT COUNT(*), COALESCE(SUM(CASE WHEN route = 'cloud' THEN 1 ELSE 0 END), 0) FROM requests
            WHERE requests.key_id = usage_hours.key_id AND at >= 60.0 * minute AND at < 60.0 * (minute + 60)
            AND status >= 400 AND status <> 499 AND denied = '')
        """,
    ),
)

_LOCK = 5_370_117
"""Names the advisory lock under which one of several starting workers migrates a PostgreSQL store."""


def migrate(connection: Connection, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """Bring the schema up to date within the caller's write transaction; several callers at once wait for each other.

    Raises:
        StoreError: the store is of a newer selfroute.
    """
    # SQLite has let one writer in already; PostgreSQL would let them all.
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    connection.exec_driver_sql(
        "CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, applied_at DOUBLE PRECISION NOT NULL)"
    )
    applied = connection.execute(text("SELECT MAX(version) FROM migrations")).scalar() or 0
    if applied > len(migrations):
        raise StoreError(
            f"the store has schema {applied} and this selfroute knows {len(migrations)}: update selfroute, or name "
            "another store"
        )
    for version, statements in enumerate(migrations[applied:], start=applied + 1):
        for statement in statements:
            connection.exec_driver_sql(statement)
        connection.execute(
            text("INSERT INTO migrations VALUES (:version, :applied_at)"),
            {"version": version, "applied_at": time.time()},
        )
