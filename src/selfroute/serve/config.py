"""The gateway's config, and what is built from it by name."""

from __future__ import annotations

import ipaddress
from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

from pydantic import Field, field_validator, model_validator

from selfroute.cloud import CLOUDS
from selfroute.config import Choice, Config, build, resolve
from selfroute.errors import ConfigError
from selfroute.serve.account import Limits
from selfroute.serve.privacy import Privacy
from selfroute.types import CloudClient, DeviceEngine, Handoff, Policy

DEVICES = {"live": "selfroute.device.live:LiveEngine", "http": "selfroute.device.http:HTTPEngine"}

_IMPATIENT = {
    "openai": {"max_retries": 2, "first_byte_timeout_s": 60.0, "breaker_waits": False, "concurrency": 256},
}
"""Settings of clouds where somebody waits for the answer, unless the config says otherwise."""

_LOCAL = ("torch", "transformers", "peft", "safetensors", "tokenizers")


class GatewayConfig(Config):
    """`selfroute serve`."""

    model: str = Field("selfroute", pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,99}$")
    """What clients call the pair; with `-device` or `-cloud` behind it, one of the two alone."""
    device: Choice = Choice(name="live")
    """The device engine: `live` (in process) or `http` (llama.cpp, Ollama, vLLM or LM Studio by URL)."""
    cloud: Choice = Choice(name="oracle")
    """The cloud, as in training."""
    budget: Limits = Limits()
    """What all requests together may ask of the cloud."""
    privacy: Privacy = Privacy()
    """What may leave the machine, and in which form."""
    policy: Policy = "auto"
    """Who answers the pair's requests, unless a request says: `auto`, `device-only` or `cloud-only`."""
    undecided: Literal["cloud", "device"] = "cloud"
    """Who answers where the device reached no decision: the cloud, or the device with what it wrote."""
    handoff: Handoff = "problem"
    """What the cloud is given: the conversation alone (`problem`), or the device's reasoning too (`reasoning`)."""
    decide: Literal["sample", "threshold"] = "threshold"
    """At the decision point: draw from the model's odds, or ask exactly when l + bias > 0."""
    bias: float = 0.0
    """The dial, in nats, as `selfroute calibrate` finds it for a budget; used under `threshold`."""
    max_tokens: int = Field(512, ge=1)
    """Token limit of a device response, reasoning included; it has to fit the model's context with the conversation."""
    device_idle_s: float = Field(60.0, gt=0)
    """Seconds that the device may take for its next piece of text, the first one too; then the cloud is asked."""
    host: str = "127.0.0.1"
    """Address to listen on; other than loopback it takes `keys`."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0: any that is free."""
    hosts: tuple[str, ...] = ()
    """Names by which clients may call the gateway (the Host header), beside `localhost` and the loopback addresses."""
    keys: bool = False
    """Whether a request needs a key, as `selfroute keys new` makes them."""
    store: str = "runs/gateway.sqlite"
    """Where requests, budgets and keys are kept: a file, or a `postgresql://` URL for several replicas."""
    log_content: bool = False
    """Whether the store keeps what was asked and answered."""
    retention_days: float = Field(30.0, gt=0)
    """Days after which the store forgets a request."""
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    """Bytes of a request's body."""
    max_concurrent: int = Field(256, ge=1)
    """Requests at a time, in each worker; further ones are refused with 429."""
    max_concurrent_per_key: int | None = Field(None, ge=1)
    """The same of each key, so that none takes all places; None: as many as there are."""
    workers: int = Field(1, ge=1, le=256)
    """Processes that serve, for engines by URL; about one a core."""
    drain_s: float = Field(30.0, ge=0)
    """Seconds that requests under way have to end after SIGTERM."""

    @field_validator("hosts")
    @classmethod
    def _names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not host or any(c in host for c in "/@ ") or host != host.lower():
                raise ValueError(f"{host!r} is no host name in lower case, such as gateway.example.org")
        return hosts

    @model_validator(mode="after")
    def _one_model(self) -> GatewayConfig:
        if self.workers > 1 and self.device.name == "live":
            raise ValueError(
                f"each of {self.workers} workers would load the model, where one batches the requests of all: leave "
                "workers=1, or name an engine by URL (device.name=http device.base_url=http://127.0.0.1:8080/v1)"
            )
        return self

    @model_validator(mode="after")
    def _keys_to_limit(self) -> GatewayConfig:
        if self.max_concurrent_per_key is not None and not self.keys:
            raise ValueError("max_concurrent_per_key is of keys, and none are asked for: set keys=true")
        return self

    @field_validator("cloud")
    @classmethod
    def _spends_by_the_budget(cls, cloud: Choice) -> Choice:
        if "spend_limit_usd" in cloud.settings:
            raise ValueError("spend_limit_usd is of a training run; a gateway's limits are in [budget], usd_per_day")
        return cloud

    @model_validator(mode="after")
    def _open_to_nobody(self) -> GatewayConfig:
        if not self.keys and not loopback(self.host):
            raise ValueError(
                f"host {self.host!r} can be reached from other machines: set keys=true and make keys with "
                "`selfroute keys new`, or listen on 127.0.0.1"
            )
        return self


def loopback(host: str) -> bool:
    """Whether an address is this machine's alone.

    >>> [loopback(h) for h in ("localhost", "127.0.0.53", "::1", "0.0.0.0", "example.org", "")]
    [True, True, True, False, False, False]
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def whole(config: GatewayConfig) -> GatewayConfig:
    """A gateway with every setting of its device and its cloud written out.

    Raises:
        ConfigError: no such device or cloud, settings that it does not take, or what it needs is not installed.
    """
    with _installed():
        device = resolve(config.device, DEVICES, "device")
    return config.model_copy(update={"device": device, "cloud": resolve(_impatient(config.cloud), CLOUDS, "cloud")})


def make_device(choice: Choice) -> DeviceEngine:
    """The device engine that a config names.

    Raises:
        ConfigError: an unknown name or setting, or what it needs is not installed.
        DeviceError: its model cannot be loaded.
    """
    with _installed():
        engine: DeviceEngine = build(choice, DEVICES, "device")
    return engine


def make_serving_cloud(choice: Choice) -> CloudClient:
    """The cloud that a config names, with less patience than training has."""
    client: CloudClient = build(_impatient(choice), CLOUDS, "cloud")
    return client


def _impatient(cloud: Choice) -> Choice:
    return Choice(name=cloud.name, **{**_IMPATIENT.get(cloud.name, {}), **cloud.settings})


@contextmanager
def _installed() -> Generator[None]:
    """Says which extra a model in process needs, and what does without."""
    try:
        yield
    except ConfigError as error:
        missing = getattr(error.__cause__, "name", None) or ""
        if missing.split(".")[0] in _LOCAL:
            raise ConfigError(
                f"a model in process needs {missing}: pip install 'selfroute[local]' (in a checkout: pip install "
                "'.[local]'), or name an engine by URL: device.name=http device.base_url=http://127.0.0.1:8080/v1"
            ) from error
        raise
