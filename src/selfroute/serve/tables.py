"""The store's tables, as SQLAlchemy sees them; `migrations` makes them, and a test holds the two together.

Money is whole nano-USD (1e-9 USD), so that sums are exact; times are seconds since 1970. `key_id` is a virtual key's
id, empty where no keys are asked for.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Integer, MetaData, Table, Text
from sqlalchemy.dialects import postgresql, sqlite

METADATA = MetaData()


def upsert(dialect: str, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An insert that can say what to do `on_conflict`, in a dialect."""
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)


REQUESTS = Table(
    "requests",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("at", Double),
    Column("key_id", Text),
    Column("model", Text),
    Column("policy", Text),
    Column("route", Text),
    Column("score", Double),
    Column("denied", Text),
    Column("status", Integer),
    Column("error", Text),
    Column("device_prompt_tokens", BigInteger),
    Column("device_completion_tokens", BigInteger),
    Column("cloud_prompt_tokens", BigInteger),
    Column("cloud_completion_tokens", BigInteger),
    Column("cost_nano", BigInteger),
    Column("first_ms", Double),
    Column("device_ms", Double),
    Column("cloud_ms", Double),
    Column("total_ms", Double),
    Column("request", Text),
    Column("response", Text),
    Column("decision", Text),
    Column("rule", Text),
    Column("redacted", Text),
)

USAGE = Table(
    "usage",
    METADATA,
    Column("minute", BigInteger, primary_key=True, autoincrement=False),
    Column("key_id", Text, primary_key=True),
    Column("requests", BigInteger),
    Column("calls", BigInteger),
    Column("denied", BigInteger),
    Column("errors", BigInteger),
    Column("cost_nano", BigInteger),
    Column("device_tokens", BigInteger),
    Column("cloud_tokens", BigInteger),
    Column("failed_calls", BigInteger),
)
"""Sums of requests by the minute (since 1970) and key: what pages of hours are drawn from."""

USAGE_HOURS = Table(
    "usage_hours", METADATA, *(Column(c.name, c.type, primary_key=c.primary_key, autoincrement=False) for c in USAGE.c)
)
"""The same by the hour, for pages of weeks; its `minute` is the hour's first."""

ACCOUNTS = Table(
    "accounts",
    METADATA,
    Column("scope", Text, primary_key=True),
    Column("day", Integer),
    Column("spent_nano", BigInteger),
    Column("held_nano", BigInteger),
    Column("minute_counts", Text),
    Column("window_s", Integer),
    Column("window_counts", Text),
)
"""One row a scope, which a transaction locks before it decides; see `account.Account`."""

RESERVATIONS = Table(
    "reservations",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("at", Double),
    Column("expires_at", Double),
    Column("scope", Text),
    Column("day", Integer),
    Column("worst_nano", BigInteger),
)
"""Money that is held back for calls under way. `scope` is the key's; the whole gateway's is always meant too."""

KEYS = Table(
    "keys",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("hash", Text),
    Column("prefix", Text),
    Column("name", Text),
    Column("limits", Text),
    Column("policies", Text),
    Column("models", Text),
    Column("created_at", Double),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("admin", Integer),
)

SESSIONS = Table(
    "sessions",
    METADATA,
    Column("hash", Text, primary_key=True),
    Column("key_id", Text),
    Column("expires_at", Double),
)
"""Browsers that signed in with a key; see `sessions`."""
