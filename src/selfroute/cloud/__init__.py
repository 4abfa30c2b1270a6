"""Clouds: providers of the cloud LLM, and the memory in front of them."""

from __future__ import annotations

from selfroute.config import Choice, build, chosen
from selfroute.types import CloudClient

CLOUDS = {"oracle": "selfroute.cloud.oracle:Oracle", "openai": "selfroute.cloud.client:OpenAICloud"}

SERVES = {"oracle": ("countdown", "addition")}
"""Clouds that answer some of the tasks that come with selfroute, and which; the others answer anything."""


def make_cloud(choice: Choice) -> CloudClient:
    """The cloud that a config names."""
    client: CloudClient = build(choice, CLOUDS)
    return client


def free_settings(choice: Choice) -> list[str]:
    """Keys of a cloud's settings that change no answer, such as time-outs and limits: a run may go on with others."""
    return [f"cloud.{key}" for key in getattr(chosen(choice, CLOUDS), "FREE", ())]
