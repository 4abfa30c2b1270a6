"""The gateway's config: what is refused before anything is opened."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
from tests.commands import selfroute

from selfroute import api
from selfroute.cloud.client import OpenAICloud
from selfroute.config import Choice
from selfroute.device.live import LiveConfig
from selfroute.errors import ConfigError, SelfrouteError
from selfroute.serve.config import GatewayConfig, make_device, make_serving_cloud, whole
from selfroute.serve.server import listening


def test_no_config_is_the_shipped_model_on_this_machine_alone() -> None:
    config = api.load_gateway_config()
    assert (config.device.name, config.cloud.name, config.host, config.keys) == ("live", "oracle", "127.0.0.1", False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "gateway.example.org"])
def test_other_machines_are_served_with_keys_only(host: str) -> None:
    with pytest.raises(ConfigError, match="selfroute keys new"):
        api.load_gateway_config(None, [f"host={host}"])
    assert api.load_gateway_config(None, [f"host={host}", "keys=true"]).host == host


@pytest.mark.parametrize(
    "change", ["hosts=['a/b']", "hosts=['A.org']", "model=a b", "port=70000", "drain_s=-1", "prot=1"]
)
def test_settings_that_cannot_be(change: str) -> None:
    with pytest.raises(ConfigError):
        api.load_gateway_config(None, [change])


def test_a_limit_of_keys_takes_keys() -> None:
    with pytest.raises(ConfigError, match="set keys=true"):
        api.load_gateway_config(None, ["max_concurrent_per_key=2"])
    assert api.load_gateway_config(None, ["max_concurrent_per_key=2", "keys=true"]).max_concurrent_per_key == 2


def test_a_spend_limit_of_training_is_refused() -> None:
    # Each worker would count from 0 at every start.
    with pytest.raises(ConfigError, match="usd_per_day"):
        api.load_gateway_config(None, ["cloud.name=openai", "cloud.spend_limit_usd=5"])


@pytest.mark.parametrize(
    ("store", "printed"),
    [
        ("postgresql://me:canary@db/x", "postgresql://me:***@db/x"),
        ("postgresql://me:can/ary@db/x", "postgresql://me:***@db/x"),
        ("postgresql://me@tenant:canary@db/x", "postgresql://me%40tenant:***@db/x"),
        ("postgresql://db/x?user=me&password=canary", "postgresql://db/x?password=***&user=me"),
        ("postgresql://db/x?pass%77ord=canary", "postgresql://db/x?password=***"),
        ("runs/a.sqlite", "runs/a.sqlite"),
    ],
)
def test_what_would_run_is_printed_without_a_password(store: str, printed: str) -> None:
    engine = ("device.name=http", "device.base_url=http://localhost:1/v1")
    assert json.loads(selfroute("serve", *engine, f"store={store}", "--dry-run"))["store"] == printed


def test_what_would_run_is_printed_without_the_stores_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    monkeypatch.delitem(sys.modules, "selfroute.serve.database")
    assert json.loads(selfroute("serve", "--dry-run"))["store"] == "runs/gateway.sqlite"
    with pytest.raises(SelfrouteError, match=r"pip install 'selfroute\[serve\]'"):
        selfroute("serve", "store=postgresql://me@db/x", "--dry-run")


def test_a_model_in_process_is_loaded_once() -> None:
    with pytest.raises(ConfigError, match=r"leave workers=1, or name an engine by URL \(device.name=http"):
        api.load_gateway_config(None, ["workers=2"])
    assert api.load_gateway_config(None, ["workers=2", "device.name=http", "device.base_url=http://a/v1"]).workers == 2


def test_a_device_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="no such choice: 'lvie'"):
        make_device(Choice(name="lvie"))


def test_a_cloud_that_somebody_waits_for() -> None:
    cloud = make_serving_cloud(Choice(name="openai", base_url="http://127.0.0.1:9/v1", model="gpt-4.1", max_retries=7))
    assert isinstance(cloud, OpenAICloud)
    assert (cloud.config.max_retries, cloud.config.breaker_waits, cloud.config.concurrency) == (7, False, 256)


def test_every_setting_of_the_device_and_the_cloud_is_written_out() -> None:
    changes = ["cloud.name=openai", "cloud.base_url=http://a/v1", "cloud.model=gpt-4.1"]
    config = whole(api.load_gateway_config(None, changes))
    assert config.device.settings["max_streams"] == LiveConfig().max_streams
    # As the gateway makes it, with less patience than training has.
    assert (config.cloud.settings["max_retries"], config.cloud.settings["breaker_waits"]) == (2, False)


def test_a_setting_of_the_device_or_the_cloud_that_is_there_by_default(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text("port = 9000")
    for name in (None, str(file)):
        config = whole(api.load_gateway_config(name, ["cloud.accuracy=0.7", "device.max_streams=3"]))
        assert (config.cloud.name, config.cloud.settings["accuracy"]) == ("oracle", 0.7)
        assert (config.device.name, config.device.settings["max_streams"]) == ("live", 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["device.name=http"], r"^device 'http' cannot be used:\n  device.base_url: Field required$"),
        (
            ["cloud.name=opnai"],
            r"^cloud.name: no such choice: 'opnai'; did you mean openai\? \(known: openai, oracle; ",
        ),
        (["device=http"], r"\n  device: a table, whose values are written device.KEY=VALUE \(got 'http'\)$"),
        (["budget=0.3"], r"\n  budget: a table, whose values are written budget.KEY=VALUE \(got 0.3\)$"),
        (["hosts=a.org"], r"""\n  hosts: a list, such as 'hosts=\["a", "b"\]' .*\(got 'a.org'\)$"""),
        (["cloud.name=openai", "cloud.api_key=sk-1"], r"cloud.api_key: Extra (?!.*sk-1).* mean cloud.api_key_var\?$"),
    ],
)
def test_faults_say_where_they_are_and_what_goes_there(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        whole(api.load_gateway_config(None, changes))


def test_a_port_that_is_taken() -> None:
    with (
        listening("127.0.0.1", 0) as first,
        pytest.raises(ConfigError, match=r"^cannot listen on 127\.0\.0\.1 port \d+: Address already in use \(others: "),
        listening("127.0.0.1", first.getsockname()[1]),
    ):
        pass


def test_no_packet_waits_for_an_acknowledgement() -> None:
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_at_most_25_settings() -> None:
    assert len(GatewayConfig.model_fields) <= 25


@pytest.mark.parametrize(
    ("given", "says"), [("budget.shar=1", "did you mean budget.share"), ("privacy.x=1", "known: redact")]
)
def test_a_key_inside_a_table_is_suggested(given: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        api.load_gateway_config(None, [given])


def test_a_config_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"no such file: nosuch \(a gateway's \.toml file"):
        api.load_gateway_config("nosuch")
