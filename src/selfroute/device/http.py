"""A device model behind an OpenAI-compatible engine, by URL: llama.cpp, vLLM, Ollama, LM Studio.

The engine is asked for one streamed chat completion, with log-probabilities if it has them. Where the dial or a ban on
help calls has the response go another way, the stream is closed, which stops the generation, and the response is made
to go on from there: the same conversation, with the assistant's message begun. So nothing is asked of an engine but
that it can go on with a message. Left out on purpose: starting engines, retries (the gateway asks the cloud instead),
and help calls that are taken back (`early_exit`), which take the engine's own logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from selfroute.cloud.endpoint import BaseURL, read_key
from selfroute.config import Config
from selfroute.device.fork import Guide
from selfroute.device.pieces import Piece, Streamed
from selfroute.device.wire import Patience, Wire
from selfroute.errors import DeviceError
from selfroute.protocol import with_thoughts
from selfroute.types import DeviceChunk, DeviceRequest, Message

Kind = Literal["llama.cpp", "vllm", "ollama", "other"]

PASSED_ON = frozenset(
    {"top_p", "top_k", "min_p", "typical_p", "frequency_penalty", "presence_penalty"}
    | {"repeat_penalty", "repetition_penalty"}
)
"""A client's fields that an engine gets. All others stay here: among what engines take are fields that lift the token
limit, name files, or change what comes back."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one kind of engine wants.

    Args:
        whole: fields for the model's own distribution, which engines cut by default.
        go_on: fields with which it goes on with an assistant's message that comes last; None where it cannot.
        template: whether it takes settings of the chat template.
        health: where it says that its model is loaded, if its list of models comes earlier.
    """

    whole: Mapping[str, Any]
    go_on: Mapping[str, Any] | None
    template: bool = False
    health: str = ""


DIALECTS: Mapping[Kind, Dialect] = {
    "llama.cpp": Dialect(
        whole={"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0},
        go_on={},
        template=True,
        health="/health",
    ),
    "vllm": Dialect(
        whole={"top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0},
        go_on={"continue_final_message": True, "add_generation_prompt": False},
        template=True,
    ),
    "ollama": Dialect(whole={"top_p": 1.0}, go_on={}),
    "other": Dialect(whole={"top_p": 1.0}, go_on=None),
}

_OWNERS: Mapping[str, Kind] = {"llamacpp": "llama.cpp", "vllm": "vllm", "library": "ollama"}
"""Kinds by who owns a model, as the engine's list has it."""


class HTTPConfig(Config):
    """An engine by URL, and how patient to be with it."""

    base_url: BaseURL
    """Such as `http://127.0.0.1:8080/v1`; `/chat/completions` is added."""
    model: str = Field("", max_length=200)
    """The model's name there; empty for an engine that serves one."""
    api_key_var: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the engine's key; None for one that wants none."""
    kind: Literal["auto", "llama.cpp", "vllm", "ollama", "other"] = "auto"
    """Whose engine it is; `auto` goes by its list of models. `other` cannot go on with a message that is begun; for one
    that can without being told, `ollama` does."""
    top_logprobs: int = Field(20, ge=0, le=20)
    """Tokens whose log-probabilities it is asked for, to read l; 0 for an engine that refuses."""
    thinking: bool = False
    """Whether a model whose chat template can think before it answers does (llama.cpp and vLLM)."""
    extra: dict[str, Any] = Field({})
    """More fields of each request, below the client's and selfroute's own."""
    connect_timeout_s: float = Field(5.0, gt=0)
    """Seconds to connect."""
    first_byte_timeout_s: float = Field(120.0, gt=0)
    """Seconds from the request to the first byte: waiting for a place, and reading the prompt."""
    idle_timeout_s: float = Field(60.0, gt=0)
    """Seconds between two pieces of a response."""


class HTTPEngine:
    """The engine; implements `types.DeviceEngine`."""

    Config = HTTPConfig

    def __init__(self, config: HTTPConfig) -> None:
        self.config = config
        patience = Patience(config.connect_timeout_s, config.first_byte_timeout_s, config.idle_timeout_s)
        self._wire = Wire(config.base_url, read_key(config.api_key_var), patience)
        self._known: tuple[str, Dialect] | None = None

    @property
    def where(self) -> str:
        """The engine, in words."""
        return self._wire.where

    @property
    def model(self) -> str:
        """What the engine calls its model; empty until it was asked."""
        return self._known[0] if self._known else self.config.model

    @property
    def honours(self) -> frozenset[str]:
        return frozenset({"top_p", "frequency_penalty", "presence_penalty"})

    async def aclose(self) -> None:
        await self._wire.aclose()

    async def ready(self) -> None:
        """Return once the engine serves the model.

        Raises:
            DeviceError: it cannot be reached, or does not.
        """
        self._known = await self._look()

    async def stream(self, request: DeviceRequest) -> AsyncGenerator[DeviceChunk]:
        """The response as it comes; closing the generator closes the connection, at which engines stop.

        The last chunk's `score` is None where the engine gives no log-probabilities: then the dial moves nothing. Its
        `prompt_tokens` are 0 where the engine does not count, or was stopped for a help call of the dial's.

        Raises:
            ContextError: the conversation is longer than the engine's context; before the first chunk.
            DeviceError: the engine failed, or cannot go on with a message where it has to.
        """
        by_dial = request.decide == "threshold"
        guide = Guide(request.prefix, forbid_help=request.forbid_help, by_dial=by_dial, bias=request.bias)
        thoughts, written = "", request.prefix
        tokens = prompt_tokens = turns = 0
        finish: Literal["stop", "length"] | None = None
        while finish is None:
            begun, before, turned = with_thoughts(thoughts, written), tokens, False
            async with aclosing(self._completion(request, begun, request.max_tokens - tokens, turns)) as pieces:
                async for piece in pieces:
                    step = guide.feed(piece.text, piece.others)
                    tokens += piece.tokens
                    thoughts += piece.reasoning
                    written += step.text
                    if step.text or piece.reasoning:
                        yield DeviceChunk(text=step.text, reasoning=piece.reasoning)
                    if step.turn:
                        turned = step.turn == "answer"
                        finish = None if turned else "stop"
                        break
                    if piece.finish:
                        finish = "length" if piece.finish == "length" else "stop"
                        # What it was given to go on from counts as prompt there.
                        prompt_tokens = max(0, piece.prompt_tokens - before)
                        tokens = before + piece.completion_tokens if piece.completion_tokens else tokens
            if turned:
                turns += 1
                finish = "length" if tokens >= request.max_tokens else None
        if rest := guide.end():
            yield DeviceChunk(text=rest)
        yield DeviceChunk(finish=finish, score=guide.score, prompt_tokens=prompt_tokens, completion_tokens=tokens)

    async def _completion(
        self, request: DeviceRequest, begun: str, max_tokens: int, turn: int
    ) -> AsyncGenerator[Piece]:
        """One chat completion; the last piece has its finish, and the usage if the engine counts.

        Args:
            request: what is asked.
            begun: how the assistant's message begins.
            max_tokens: limit of what is added to it.
            turn: how often the response has been led another way; each has draws of its own.
        """
        model, dialect = self._known = self._known or await self._look()
        streamed = Streamed()
        body = self._body(model, dialect, request, begun, max_tokens, turn)
        async with aclosing(self._wire.events("/chat/completions", body)) as events:
            async for event in events:
                try:
                    made = [*streamed.add(event)]
                except (AttributeError, KeyError, TypeError, ValueError):
                    raise DeviceError(f"{self.where} sent an event of an unknown form: {event!r:.200}") from None
                for piece in made:
                    yield piece
        if not streamed.finish:
            raise DeviceError(f"{self.where} broke off in the middle of a response")
        yield streamed.last()

    def _body(
        self, model: str, dialect: Dialect, request: DeviceRequest, begun: str, max_tokens: int, turn: int
    ) -> dict[str, Any]:
        messages: list[Message] = [dict(message) for message in request.messages]
        body: dict[str, Any] = {
            **dialect.whole,
            **self.config.extra,
            **{name: value for name, value in request.extra.items() if name in PASSED_ON and value is not None},
            "model": model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": request.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.seed:
            # What goes on draws anew: an engine begins its stream again with each call.
            name = f"{request.seed}/on" if request.prefix else request.seed
            body["seed"] = number(f"{name}/{turn}" if turn else name)
        if self.config.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self.config.top_logprobs}
        if dialect.template:
            body["chat_template_kwargs"] = {"enable_thinking": self.config.thinking}
        if begun:
            if dialect.go_on is None:
                raise DeviceError(
                    f"{self.where} cannot go on with a message that is begun, as a declined help call must: use "
                    "llama.cpp, vLLM or Ollama (where it can without being told: kind=ollama)"
                )
            messages.append({"role": "assistant", "content": begun})
            body |= dialect.go_on
        return body

    async def _look(self) -> tuple[str, Dialect]:
        """The model's name, and what kind of engine serves it."""
        read = await self._wire.get("/models")
        listed = read.get("data") if isinstance(read, dict) else None
        entries = [m for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        models = {str(m.get("id")): str(m.get("owned_by")) for m in entries}
        there = ", ".join(sorted(models)) or "none"
        wanted = self.config.model or (next(iter(models)) if len(models) == 1 else "")
        if not wanted:
            raise DeviceError(f"{self.where} serves these models: {there}; say which by `model`")
        # Ollama calls a model without a tag its latest.
        owner = models.get(wanted) or models.get(f"{wanted}:latest")
        if owner is None:
            raise DeviceError(f"{self.where} serves no model {wanted!r}, but these: {there}")
        dialect = DIALECTS[_OWNERS.get(owner, "other") if self.config.kind == "auto" else self.config.kind]
        if dialect.health:
            await self._wire.get(dialect.health)
        return wanted, dialect


def number(name: str) -> int:
    """A seed for an engine from the name of a random stream; 31 bits, which every engine takes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) >> 1
