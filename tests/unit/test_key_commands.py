"""`selfroute keys`, as a user types it."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest
from tests.commands import selfroute
from typer.testing import CliRunner

from selfroute.cli import app
from selfroute.errors import ConfigError, SelfrouteError
from selfroute.serve.account import Limits
from selfroute.serve.keys import Key, Keyring
from selfroute.serve.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = str(tmp_path / "gateway.sqlite")
    monkeypatch.setenv("SELFROUTE_STORE", path)
    return path


def check(store: str, token: str) -> Key | None:
    opened = Store(store)
    try:
        return asyncio.run(Keyring(opened).check(f"Bearer {token}"))
    finally:
        opened.close()


def test_a_key_is_shown_once_listed_without_it_and_revoked(store: str) -> None:
    made = CliRunner().invoke(
        app,
        ["keys", "new", "my laptop", "--share", "0.3", "--usd-per-day", "2.5", "--calls-per-minute", "10",
         "--requests-per-minute", "60", "--policy", "auto", "--model", "pair", "--days", "30"],
        catch_exceptions=False,
    )  # fmt: skip
    token = made.stdout.strip()
    assert re.fullmatch(r"sr-[\w-]{43}", token)
    key = check(store, token)
    assert key
    assert key.limits == Limits(share=0.3, usd_per_day=2.5, calls_per_minute=10, requests_per_minute=60)
    assert (key.name, key.policies, key.models) == ("my laptop", {"auto"}, {"pair"})
    assert f"selfroute keys revoke {key.id}" in made.stderr

    listed = selfroute("keys", "list")
    assert token not in listed
    for part in (key.id, f"{token[:10]}...", "my laptop", "share 0.3, usd per day 2.5", "auto", "pair", "valid until"):
        assert part in listed

    assert "is revoked" in selfroute("keys", "revoke", key.id)
    assert check(store, token) is None
    assert "revoked" in selfroute("keys", "list")
    with pytest.raises(ConfigError, match="no valid key"):
        selfroute("keys", "revoke", key.id)


def test_a_key_without_limits_may_do_everything(store: str) -> None:
    key = check(store, selfroute("keys", "new", "x").splitlines()[-1])
    assert key
    assert (key.limits, key.models, len(key.policies), key.expires_at) == (Limits(), None, 3, None)
    # But for what others do.
    assert not key.admin


def test_an_admins_key_is_made_and_listed_as_such(store: str) -> None:
    key = check(store, selfroute("keys", "new", "operations", "--admin").splitlines()[-1])
    assert key
    assert key.admin
    assert "operations (admin)" in selfroute("keys", "list")


def test_a_store_without_keys_is_named(store: str) -> None:
    Store(store).close()
    assert f"no keys in {store}" in selfroute("keys", "list")


@pytest.mark.parametrize("args", [["list"], ["revoke", "k1"]])
def test_a_store_that_is_not_there_is_not_made(store: str, args: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"no store at .*gateway\.sqlite"):
        selfroute("keys", *args)
    assert not Path(store).exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--share", "2"], "less than or equal to 1"),
        (["--usd-per-day", "-1"], "greater than or equal to 0"),
        (["--policy", "all"], "known: auto, device-only, cloud-only"),
        (["--model", "\x1b[31m"], "printable"),
        (["--model", ""], "printable"),
        (["--days", "0"], "valid for nothing"),
    ],
)
def test_what_makes_no_key_says_why(store: str, args: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        selfroute("keys", "new", "x", *args)
    Store(store).close()
    assert "no keys" in selfroute("keys", "list")


def test_without_its_extra_it_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    monkeypatch.delitem(sys.modules, "selfroute.serve.database")
    with pytest.raises(SelfrouteError, match=r"sqlalchemy: pip install 'selfroute\[serve\]'"):
        selfroute("keys", "list")
