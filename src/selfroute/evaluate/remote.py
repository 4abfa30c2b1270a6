"""An engine by URL, as evaluation asks a device model: several responses at a time, whole.

Left out on purpose: token ids, which such engines do not tell; a response's are -1 each, so that they can be counted.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType

from selfroute.device.base import Sampling
from selfroute.device.http import HTTPConfig, HTTPEngine
from selfroute.errors import ConfigError, DeviceError
from selfroute.protocol import ANSWER_OPEN, HELP_OPEN, parse, with_thoughts
from selfroute.types import DeviceRequest, Message, Response, Undecided


@dataclass(frozen=True, slots=True)
class Begun:
    """How a response begins, and about how many tokens of its limit that takes: engines do not tell which are where."""

    text: str = ""
    tokens: int = 0


AT_ONCE = 8
"""Responses that are under way together."""


class Remote:
    """The engine, in a `with` block; implements `evaluate.run.Engine`."""

    def __init__(self, config: HTTPConfig) -> None:
        self._engine = HTTPEngine(config)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Remote:
        try:
            self._runner.run(self._engine.ready())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._engine.aclose())
        self._runner.close()

    @property
    def name(self) -> str:
        """The model's name as part of a file's: its last part, without an ending."""
        return re.sub(r"[^A-Za-z0-9_.=+-]", "-", self._engine.model.rsplit("/", 1)[-1].removesuffix(".gguf"))[:60]

    def encode(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The conversation itself: the engine makes the prompt."""
        return tuple(messages)

    def before_the_call(self, response: Response, *, early_exit: bool) -> Begun:
        """A response's beginning where it answers in place of its help call."""
        before = response.text[: response.text.rfind(HELP_OPEN)]
        # In process the model stands behind what the tags share, where little but the answer can come.
        return Begun(before + ANSWER_OPEN[:-1], round(len(response.token_ids) * len(before) / len(response.text)))

    def generate(
        self,
        prompts: Sequence[tuple[Message, ...]],
        streams: Sequence[Sequence[str]],
        sampling: Sampling,
        *,
        starts: Sequence[Begun] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Response]]:
        """Ask for all responses; the first failure ends the others.

        Raises:
            ConfigError: the run asks early, which an engine by URL cannot do.
            DeviceError: the engine failed, or the dial is to be turned and it gives no log-probabilities.
        """
        if sampling.early_exit:
            raise ConfigError(
                "an engine by URL cannot take back a help call that comes before there is an answer (early_exit): "
                "evaluate this run in process"
            )
        return self._runner.run(self._all(prompts, streams, sampling, starts, progress))

    async def _all(
        self,
        prompts: Sequence[tuple[Message, ...]],
        streams: Sequence[Sequence[str]],
        sampling: Sampling,
        starts: Sequence[Begun] | None,
        progress: Callable[[int], None] | None,
    ) -> list[list[Response]]:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(messages: tuple[Message, ...], name: str, start: Begun) -> Response:
            async with gate:
                response = await self._one(messages, name, start, sampling)
            if progress:
                progress(1)
            return response

        begun = starts or [Begun()] * len(prompts)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    [group.create_task(one(messages, name, start)) for name in names]
                    for messages, names, start in zip(prompts, streams, begun, strict=True)
                ]
        except* (DeviceError, ConfigError) as failed:
            raise failed.exceptions[0] from None
        return [[task.result() for task in row] for row in tasks]

    async def _one(self, messages: tuple[Message, ...], name: str, start: Begun, sampling: Sampling) -> Response:
        request = DeviceRequest(
            messages=messages,
            max_tokens=max(1, sampling.max_tokens - start.tokens),
            temperature=sampling.temperature,
            seed=name,
            decide=sampling.decide,
            bias=sampling.bias,
            prefix=start.text,
            forbid_help=sampling.forbid_help,
        )
        thoughts, text = "", start.text
        async with aclosing(self._engine.stream(request)) as chunks:
            async for chunk in chunks:
                thoughts += chunk.reasoning
                text += chunk.text
        # Some engines tell a model's own thinking apart; the model wrote it in its response.
        text = with_thoughts(thoughts, text)
        finished = chunk.finish == "stop"
        decided = not isinstance(parse(text, finished=finished), Undecided)
        by_dial = sampling.decide == "threshold" and not sampling.forbid_help
        if by_dial and decided and chunk.score is None:
            raise DeviceError(
                f"{self._engine.where} gives no log-probabilities, so that the dial moves nothing and there is one "
                "operating point: evaluate without a budget"
            )
        return Response(text, (-1,) * chunk.completion_tokens, finished, chunk.score if decided else None)
