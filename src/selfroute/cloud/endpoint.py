"""An OpenAI-compatible endpoint as a config states it: where it is, what a request says, how patient to be."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator

from selfroute.config import Config
from selfroute.errors import ConfigError

_NOT_EXTRA = {
    *("model", "models", "route", "messages", "temperature", "max_tokens", "max_completion_tokens", "n", "stream"),
    *("stream_options", "service_tier", "tools", "plugins", "web_search_options"),
}
"""Fields that selfroute sets itself, or that would change the price."""


def _plain(base_url: str) -> str:
    if not base_url.isprintable() or " " in base_url:
        raise ValueError("holds characters that no URL has")
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("must begin with https:// or http:// and name a host")
    # Reading the port raises what is wrong with it.
    if url.port == 0 or url.username is not None or url.query or url.fragment:
        raise ValueError("must hold no user, password, query or fragment; a key goes by api_key_var")
    base_url = base_url.rstrip("/")
    if base_url.endswith("/chat/completions"):
        raise ValueError(f"leave off /chat/completions: {base_url.removesuffix('/chat/completions')}")
    return base_url


BaseURL = Annotated[str, AfterValidator(_plain)]
"""Where an endpoint is, with nothing secret in it."""


class OpenAIConfig(Config):
    """An OpenAI-compatible endpoint, and how patient to be with it."""

    base_url: BaseURL
    """Such as `https://api.deepseek.com/v1`; `/chat/completions` is added."""
    model: str = Field(min_length=1)
    """The model's name there."""
    api_key_var: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the key; None for a server that wants none."""
    extra: dict[str, Any] = Field({})
    """More fields of the request, such as `{reasoning_effort = "low"}`."""
    max_tokens: int | None = Field(8192, ge=1)
    """Tokens of an answer, its reasoning included; None: what each request says."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls it; OpenAI's reasoning models want the second."""
    send_temperature: bool = True
    """Whether to send a temperature; OpenAI's reasoning models refuse one."""
    send_reasoning: bool = False
    """Whether the reasoning that a client of the gateway sends back goes with it: DeepSeek's thinking models want
    theirs before a tool's call, others refuse the field."""
    concurrency: int = Field(16, ge=1)
    """Requests at a time."""
    connect_timeout_s: float = Field(10.0, gt=0)
    """Seconds to connect."""
    first_byte_timeout_s: float = Field(300.0, gt=0)
    """Seconds from the request to the first byte of an answer that is streamed."""
    whole_timeout_s: float = Field(300.0, gt=0)
    """Seconds from the request to the first byte of one that is not: all of its thinking and writing goes before it."""
    idle_timeout_s: float = Field(60.0, gt=0)
    """Seconds between two pieces of an answer."""
    total_timeout_s: float = Field(900.0, gt=0)
    """Seconds for an attempt in all."""
    max_retries: int = Field(5, ge=0)
    """Further attempts after a time-out, a broken connection, or a status of 408, 409, 429 or 5xx."""
    backoff_s: float = Field(0.5, gt=0)
    """Seconds before the first further attempt; each one doubles it, and a random part of it is added."""
    breaker_failures: int = Field(8, ge=1)
    """Failures in a row after which the provider is left alone."""
    breaker_cooldown_s: float = Field(20.0, gt=0)
    """Seconds for which it is."""
    breaker_waits: bool = True
    """Whether requests wait as long, or fail at once."""
    spend_limit_usd: float | None = Field(None, ge=0)
    """USD that a run may spend in all, by its ledger; a call that could pass it is not made."""
    usd_per_million_prompt_tokens: float | None = Field(None, ge=0)
    """Price of prompt tokens; None: as in the package's price file."""
    usd_per_million_completion_tokens: float | None = Field(None, ge=0)
    """Price of completion tokens, reasoning included; None: as in the package's price file."""

    @property
    def where(self) -> str:
        """The endpoint, in words."""
        return f"the cloud at {self.base_url}"

    @field_validator("extra")
    @classmethod
    def _beside(cls, extra: dict[str, Any]) -> dict[str, Any]:
        ours = sorted(_NOT_EXTRA & set(extra))
        if ours:
            raise ValueError(f"{', '.join(ours)}: not here, so that what is asked, and what it may cost, is known")
        return extra


def read_key(variable: str | None) -> str:
    """The key in an environment variable; "" where none is named.

    Raises:
        ConfigError: it holds none, or something that is none.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {variable}, which api_key_var names, holds no key")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the environment variable {variable} holds characters that no key has")
    return key
