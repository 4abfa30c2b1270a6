"""Clouds: providers of the cloud LLM, and the memory in front of them."""

from __future__ import annotations

from selfroute.config import Choice, build
from selfroute.types import CloudClient

CLOUDS = {"oracle": "selfroute.cloud.oracle:Oracle", "openai": "selfroute.cloud.client:OpenAICloud"}


def make_cloud(choice: Choice) -> CloudClient:
    """The cloud that a config names."""
    client: CloudClient = build(choice, CLOUDS)
    return client
