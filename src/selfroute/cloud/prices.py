"""What cloud models cost: a dated file in the package, and what a config says instead."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources

from selfroute.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Price:
    """USD per million tokens; `cached` is that of prompt tokens which the provider had in its cache."""

    prompt: float
    cached: float
    completion: float

    def of(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
        """USD for a call; the cached tokens are among the prompt's.

        >>> Price(prompt=2.0, cached=0.5, completion=8.0).of(1000, 100, cached_tokens=400)
        0.0022
        """
        fresh = prompt_tokens - min(cached_tokens, prompt_tokens)
        cached = prompt_tokens - fresh
        return (fresh * self.prompt + cached * self.cached + completion_tokens * self.completion) / 1e6


def price_of(model: str, prompt: float | None, completion: float | None) -> Price:
    """The price of a model: as the config says (USD per million tokens), else as the package's file does.

    Raises:
        ConfigError: neither knows it; what the cloud costs is never guessed.
    """
    if prompt is not None and completion is not None:
        return Price(prompt, prompt, completion)
    known = tomllib.loads(resources.files("selfroute.cloud").joinpath("prices.toml").read_text(encoding="utf-8"))
    if model not in known["models"]:
        raise ConfigError(
            f"the price of the cloud model {model!r} is not known: set usd_per_million_prompt_tokens and "
            f"usd_per_million_completion_tokens (0 for a server of your own; known on {known['checked']}: "
            f"{', '.join(sorted(known['models']))})"
        )
    listed = Price(**known["models"][model])
    if prompt is not None or completion is not None:
        raise ConfigError("set both usd_per_million_prompt_tokens and usd_per_million_completion_tokens, or neither")
    return listed
