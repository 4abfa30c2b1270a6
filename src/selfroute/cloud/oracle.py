"""Exact solvers as a cloud provider: everything runs with no key and no network.

It is right on a stated share of problems, the same ones each time, with a stated latency and price. Left out on
purpose: tasks without an exact solver.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from pydantic import Field

from selfroute.config import Config
from selfroute.errors import CloudError
from selfroute.protocol import ANSWER_CLOSE, ANSWER_OPEN
from selfroute.tasks import addition, countdown
from selfroute.types import CloudAnswer, CloudChunk, CloudRequest


class OracleConfig(Config):
    """What the oracle pretends to be."""

    accuracy: float = Field(0.95, ge=0, le=1)
    """Share of problems that it answers correctly."""
    latency_s: float = Field(2.0, ge=0)
    """Stated latency of an answer, in seconds; reported, and waited for only with `wait`."""
    wait: bool = False
    """Really take `latency_s` seconds."""
    completion_tokens: int = Field(500, ge=0)
    """Stated length of an answer, reasoning included, in tokens."""
    usd_per_million_prompt_tokens: float = Field(0.55, ge=0)
    """Price of prompt tokens."""
    usd_per_million_completion_tokens: float = Field(2.19, ge=0)
    """Price of completion tokens."""
    seed: int = 0
    """Which problems it gets wrong."""


class Oracle:
    """The provider; implements `types.CloudClient`."""

    Config = OracleConfig

    def __init__(self, config: OracleConfig) -> None:
        self.config = config

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"provider": "oracle", **self.config.model_dump()}

    concurrency = 16

    def carry(self, spent_usd: float) -> None:
        """It has no limit."""

    def abandoned_usd(self) -> float:
        """Nothing: its answers never break off."""
        return 0.0

    async def complete(self, request: CloudRequest) -> CloudAnswer:
        """The answer to the last message's question.

        Raises:
            CloudError: the message holds no question of a task that it can solve.
        """
        if self.config.wait:
            await asyncio.sleep(self.config.latency_s)
        c = self.config
        # Six numbers can take seconds to solve; the event loop goes on meanwhile.
        text = await asyncio.to_thread(self._text, request.messages[-1]["content"])
        # About four characters make a token.
        prompt_tokens = sum(len(m["content"]) for m in request.messages) // 4
        micro_usd = prompt_tokens * c.usd_per_million_prompt_tokens
        micro_usd += c.completion_tokens * c.usd_per_million_completion_tokens
        return CloudAnswer(text, "", True, prompt_tokens, c.completion_tokens, micro_usd / 1e6, c.latency_s)

    async def stream(self, request: CloudRequest) -> AsyncIterator[CloudChunk]:
        """The same answer in pieces of a few characters."""
        answer = await self.complete(request)
        for start in range(0, len(answer.text), 8):
            yield CloudChunk(text=answer.text[start : start + 8])
            await asyncio.sleep(0)
        yield CloudChunk(final=answer)

    async def aclose(self) -> None:
        """Nothing is held open."""

    def _text(self, question: str) -> str:
        solved = next((found for answer in SOLVERS if (found := answer(question))), None)
        if solved is None:
            raise CloudError(
                f"the oracle cloud answers Countdown and addition questions only, not {question[:80]!r}: name a real "
                "one, such as cloud.name=openai cloud.base_url=URL cloud.model=MODEL"
            )
        digest = hashlib.sha256(f"{self.config.seed}/{solved.key}".encode()).digest()
        right = int.from_bytes(digest[:8], "big") / 2**64 < self.config.accuracy
        return f"{ANSWER_OPEN}{(solved.right() if right else None) or solved.wrong}{ANSWER_CLOSE}"


SOLVERS = (countdown.answer_question, addition.answer_question)
"""Each gives the answers to a question of its task, None for any other text."""
