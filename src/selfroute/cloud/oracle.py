"""Exact solvers as a cloud provider: everything runs with no key and no network.

It is right on a stated share of problems, the same ones each time, with a stated latency and price. Left out on
purpose: tasks without an exact solver.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from pydantic import Field

from selfroute.config import Config
from selfroute.errors import CloudError
from selfroute.protocol import ANSWER_CLOSE, ANSWER_OPEN, SYSTEM, text_of
from selfroute.tasks import addition, countdown
from selfroute.types import Bill, CloudAnswer, CloudChunk, CloudRequest, Solved


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
        text = await asyncio.to_thread(self._text, text_of(request.messages[-1].get("content")))
        # It gives the tags to whom its system prompt asks for them.
        if not any(ANSWER_OPEN in text_of(m.get("content")) for m in request.messages if m["role"] in SYSTEM):
            text = text.removeprefix(ANSWER_OPEN).removesuffix(ANSWER_CLOSE)
        usd = self.worst_usd(request)
        return CloudAnswer(text, "", True, _prompt_tokens(request), c.completion_tokens, usd, c.latency_s)

    @staticmethod
    def check_question(question: str) -> None:
        """Raises CloudError: it cannot answer this one."""
        _solve(question, told=f", not {question[:80]!r}")

    def worst_usd(self, request: CloudRequest) -> float:
        """What every answer costs."""
        c = self.config
        micro_usd = _prompt_tokens(request) * c.usd_per_million_prompt_tokens
        micro_usd += c.completion_tokens * c.usd_per_million_completion_tokens
        return micro_usd / 1e6

    async def stream(
        self, request: CloudRequest, bill: Bill | None = None, *, whole: bool = False
    ) -> AsyncGenerator[CloudChunk]:
        """The same answer, in pieces of a few characters or in one."""
        answer = await self.complete(request)
        if bill:
            bill.usd, bill.called = bill.usd + answer.cost_usd, True
        size = max(8, len(answer.text)) if whole else 8
        for start in range(0, len(answer.text), size):
            yield CloudChunk(text=answer.text[start : start + size])
            await asyncio.sleep(0)
        yield CloudChunk(final=answer, finish_reason="stop")

    async def aclose(self) -> None:
        """Nothing is held open."""

    def _text(self, question: str) -> str:
        solved = _solve(question)
        digest = hashlib.sha256(f"{self.config.seed}/{solved.key}".encode()).digest()
        right = int.from_bytes(digest[:8], "big") / 2**64 < self.config.accuracy
        return f"{ANSWER_OPEN}{(solved.right() if right else None) or solved.wrong}{ANSWER_CLOSE}"


def _solve(question: str, told: str = "") -> Solved:
    solved = next((found for answer in SOLVERS if (found := answer(question))), None)
    if solved is None:
        raise CloudError(
            # In a gateway this comes into the log, where nothing is to stand that was asked.
            f"the oracle cloud answers Countdown and addition questions only{told}: name a real one "
            "in [cloud], such as cloud.name=openai cloud.base_url=URL cloud.model=MODEL",
            status=400,
            said="the oracle cloud answers Countdown and addition questions only",
        )
    return solved


def _prompt_tokens(request: CloudRequest) -> int:
    """About four characters make a token."""
    return sum(len(text_of(m.get("content"))) for m in request.messages) // 4


SOLVERS = (countdown.answer_question, addition.answer_question)
"""Each gives the answers to a question of its task, None for any other text."""
