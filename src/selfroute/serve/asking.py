"""What a client asks: a chat completion's request, checked as far as selfroute must understand it.

Fields that it does not know are kept for whichever upstream answers. Those that would change what a call costs, beyond
what the budget can hold back for it, are refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, ValidationError

from selfroute.serve.account import Scope
from selfroute.serve.refusal import RefusedError
from selfroute.types import Handoff, Message, Policy, Redact

_PRICED = (
    *("models", "route", "provider", "preset", "service_tier", "plugins", "web_search_options", "search_parameters"),
    *("enable_search", "prediction", "audio", "best_of"),
    *("fallbacks", "context_window_fallbacks", "content_policy_fallbacks", "num_retries", "max_retries"),
    *("n_predict", "num_predict", "max_new_tokens", "max_output_tokens", "max_length"),
    *("max_tokens_to_sample", "candidate_count", "options", "generation_config", "generationconfig", "extra_body"),
    *("additional_drop_params", "drop_params", "allowed_openai_params"),
    *("enable_thinking", "thinking_budget", "cache_control"),
)
"""Fields of providers and of proxies that choose another model, provider, tier or paid tool, more answers or calls than
one, another limit than the two that the budget knows, or none; all names in small letters."""

_OF_UPSTREAMS = (
    *("api_base", "api_key", "api_version", "base_url", "custom_llm_provider", "extra_headers", "headers"),
    *("extra_query", "organization", "proxy", "user_config", "mock_response", "mock_tool_calls", "model_list"),
    *("litellm_params", "litellm_credential_name", "deployment_id", "prompt_id"),
)
_UPSTREAMS = ("aws_", "azure_", "vertex_", "watsonx_", "oci_", "s3_")
"""Fields, and how more of them begin, by which a client would choose where a proxy behind the gateway sends its
request, and with which key."""

_COSTS = "it changes what a call costs, and is not passed on"

_PARTS = ("text", "image_url", "input_audio", "refusal")
"""Parts of a message whose tokens can be bounded."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "logit_bias": (None, {}),
    "top_p": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "modalities": (None, ["text"]),
}
"""Fields that ask for nothing when they have one of these values, and else for what a device may not honour."""


class Options(BaseModel):
    """The request's `selfroute` field: what the gateway's settings are for this request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Policy | None = None
    undecided: Literal["cloud", "device"] | None = None
    handoff: Handoff | None = None
    bias: StrictFloat | None = Field(None, ge=-100, le=100)
    redact: StrictBool | None = None


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > len(Options.model_fields):
        # Each unknown field would become an error of a thousand bytes.
        raise ValueError(f"has {len(value)} fields, and no more than {len(Options.model_fields)} are known")
    return value


class ChatRequest(BaseModel):
    """The body of a chat completion's request. Of a list's members the first that is wrong ends the reading: each would
    become an error of a thousand bytes."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=200)
    messages: list[dict[str, Any]] = Field(min_length=1, fail_fast=True)
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = None
    n: Literal[1] | None = None
    max_tokens: StrictInt | None = Field(None, ge=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    temperature: StrictFloat | None = Field(None, ge=0, le=2)
    top_p: StrictFloat | None = Field(None, ge=0, le=1)
    frequency_penalty: StrictFloat | None = Field(None, ge=-2, le=2)
    presence_penalty: StrictFloat | None = Field(None, ge=-2, le=2)
    seed: StrictInt | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    selfroute: Annotated[Options, BeforeValidator(_few)] = Options()


_OURS = {"model", "messages", "stream", "stream_options", "n", "selfroute"}
_OF_THE_DEVICE = {"max_tokens", "max_completion_tokens", "temperature", "seed", "stop"}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, understood.

    Args:
        id: names the request, everywhere.
        model: as the client calls it.
        messages: the client's conversation, as it came.
        policy: who may answer.
        undecided: who answers where the device reached no decision.
        handoff: what the cloud is given.
        bias: the dial, in nats.
        fields: the client's other fields, as they came.
        max_tokens: its limit for the answer, reasoning included.
        temperature: None where it does not say.
        seed: "" where it gives none.
        stop: the answer ends before any of these.
        beyond: the field that asks for what the device cannot serve, or "".
        key: whose budget it counts towards, beside the gateway's.
        redact: whether personal data leaves as placeholders.
        whole: whether the client takes the answer in one, so that the cloud need not stream it.
    """

    id: str
    model: str
    messages: tuple[Message, ...]
    policy: Policy = "auto"
    undecided: Literal["cloud", "device"] = "cloud"
    handoff: Handoff = "problem"
    bias: float = 0.0
    fields: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    temperature: float | None = None
    seed: str = ""
    stop: tuple[str, ...] = ()
    beyond: str = ""
    key: Scope | None = None
    redact: bool = False
    whole: bool = False

    @property
    def device_fields(self) -> dict[str, Any]:
        """Those that an engine may pass on."""
        return {name: value for name, value in self.fields.items() if name not in _OF_THE_DEVICE}


def read(body: Any) -> ChatRequest:
    """The request in a body.

    Raises:
        RefusedError: it is none, or asks for what no upstream of the gateway is asked for; it names the field.
    """
    if not isinstance(body, dict):
        raise RefusedError(400, "the body must be a JSON object", code="invalid_body")
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(map(str, fault["loc"]))[:200] or None
        raise RefusedError(400, f"{param}: {fault['msg']}", code="invalid_value", param=param) from None
    for name, value in body.items():
        # Proxies written in Go take a name in any letters.
        small = name.casefold()
        if small in _PRICED and value is not None:
            raise _unsupported(name, _COSTS)
        if small in _OF_UPSTREAMS or small.startswith(_UPSTREAMS):
            raise _unsupported(name, "where a request goes, and with which key, is the gateway's own business")
        if name != small and small in ChatRequest.model_fields:
            raise _unsupported(name, f"it is called {small}")
    for index, tool in enumerate(request.tools or ()):
        if tool.get("cache_control") is not None:
            raise _unsupported(f"tools.{index}.cache_control", _COSTS)
        if tool.get("type") not in ("function", "custom"):
            raise _unsupported(f"tools.{index}", "only a client's own tools are passed on (type function or custom)")
    for index, message in enumerate(request.messages):
        if not isinstance(message.get("role"), str):
            raise RefusedError(400, "a message needs a role", code="invalid_value", param=f"messages.{index}.role")
        content = message.get("content")
        if not isinstance(content, str | list | None):
            why = "must be a text or a list of parts"
            raise RefusedError(400, f"content {why}", code="invalid_value", param=f"messages.{index}.content")
        parts = content if isinstance(content, list) else []
        if any(isinstance(held, dict) and held.get("cache_control") is not None for held in (message, *parts)):
            raise _unsupported(f"messages.{index}.cache_control", _COSTS)
        for part in parts:
            if not isinstance(part, dict) or part.get("type") not in _PARTS:
                raise _unsupported(f"messages.{index}.content", f"its parts are of type {', '.join(_PARTS)}")
    return request


def _unsupported(param: str, why: str) -> RefusedError:
    return RefusedError(400, f"{param}: {why}", code="unsupported_value", param=param)


def ask_of(
    request: ChatRequest,
    body: Mapping[str, Any],
    *,
    id: str,
    policy: Policy,
    undecided: Literal["cloud", "device"],
    handoff: Handoff,
    bias: float,
    honours: Collection[str],
    key: Scope | None = None,
    redact: Redact = "never",
) -> Ask:
    """What a request asks, its fields as they stand in the body.

    The other arguments are what its `selfroute` field may change, and who asks.

    Raises:
        RefusedError: it asks to be redacted, or not to be, against the gateway's setting.
    """
    own = request.selfroute
    fields = {name: value for name, value in body.items() if name not in _OURS}
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    limits = [limit for limit in (request.max_completion_tokens, request.max_tokens) if limit is not None]
    return Ask(
        id=id,
        model=request.model,
        messages=tuple(request.messages),
        policy=policy,
        undecided=own.undecided or undecided,
        handoff=own.handoff or handoff,
        bias=bias if own.bias is None else own.bias,
        fields=fields,
        max_tokens=min(limits, default=None),
        temperature=request.temperature,
        seed="" if request.seed is None else str(request.seed),
        stop=tuple(s for s in stop if s),
        beyond=beyond(request.messages, fields, honours),
        key=key,
        redact=redacts(own.redact, redact),
        whole=not request.stream,
    )


def redacts(asked: bool | None, setting: Redact) -> bool:
    """Whether a request is redacted: a client may ask for more than the gateway does, where it can, never for less.

    >>> redacts(None, "always"), redacts(None, "asked"), redacts(True, "asked")
    (True, False, True)

    Raises:
        RefusedError: it asks for less, or for what the gateway has not.
    """
    if asked is False and setting == "always":
        message = "this gateway redacts whatever leaves it"
        raise RefusedError(403, message, code="policy_not_allowed", param="selfroute.redact")
    if asked and setting == "never":
        raise _unsupported("selfroute.redact", "this gateway does not redact (privacy.redact)")
    return setting == "always" or bool(asked)


def beyond(messages: list[dict[str, Any]], fields: Mapping[str, Any], honours: Collection[str]) -> str:
    """The first field that asks for what a device cannot serve, or "".

    >>> beyond([{"role": "user", "content": "Hi"}], {"top_p": 0.9}, honours=[])
    'top_p'
    """
    for name, neutral in _NEUTRAL.items():
        if name in fields and fields[name] not in neutral and name not in honours:
            return name
    for index, message in enumerate(messages):
        if message["role"] not in ("system", "developer", "user", "assistant"):
            return f"messages.{index}.role"
        if message.get("tool_calls") or message.get("function_call"):
            return f"messages.{index}.tool_calls"
        content = message.get("content")
        if isinstance(content, list) and not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            return f"messages.{index}.content"
    return ""
