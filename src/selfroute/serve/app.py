"""The gateway as an ASGI application: who may ask, what a request may take, and which endpoint says the answer.

Left out on purpose: what happens to a request (`handoff`) and how it is told (`telling`, `chat`, `responses`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfroute.errors import StoreError
from selfroute.serve import dashboard
from selfroute.serve.access import Key, Keys, Sessions, key_of
from selfroute.serve.account import Denied
from selfroute.serve.account import Scope as BudgetScope
from selfroute.serve.asking import Ask, ChatRequest, ask_of, read
from selfroute.serve.budget import Usage, usage_of_all
from selfroute.serve.chat import ChatWriter
from selfroute.serve.config import GatewayConfig
from selfroute.serve.events import Course
from selfroute.serve.handoff import Budget, Pair, answer
from selfroute.serve.hosts import Hosts
from selfroute.serve.metrics import CONTENT_TYPE, Metrics
from selfroute.serve.refusal import RefusedError, shutting_down, too_many
from selfroute.serve.responses import ResponsesWriter, chat_body
from selfroute.serve.store import Store
from selfroute.serve.telling import KEEP_ALIVE_S, Telling, Writer, refuse
from selfroute.serve.turns import Turns
from selfroute.types import POLICIES, DeviceEngine, Policy

MAX_DEPTH = 64
"""A body that is nested deeper is refused."""

BODY_S = 30.0
"""Seconds that a client has to send its body."""

READY_S = 5.0
"""Seconds that the device has to say that it is ready."""

REQUEST_ID = "x-selfroute-request-id"

_POLICY = "selfroute.policy"

_HELD = "selfroute.held"
"""In the scope of a request: the name of the key that it counts towards."""

_log = logging.getLogger(__name__)


class Arrivals(Budget, Protocol):
    """A budget that counts requests too; see `budget.Budget`."""

    async def arrive(self, key: BudgetScope | None = None) -> Denied | None:
        """Count a request, or deny it."""
        ...


@dataclass(slots=True)
class Gateway:
    """What the endpoints and the dashboard share. `keys` is None where none are asked for."""

    config: GatewayConfig
    pair: Pair
    budget: Arrivals
    keys: Keys | None = None
    sessions: Sessions | None = None
    """Browsers that signed in with a key."""
    store: Store | None = None
    """Where the dashboard reads; None: there is no dashboard."""
    metrics: Metrics = field(default_factory=Metrics)
    active: int = 0
    """Requests under way that count towards `max_concurrent`."""
    active_of: Counter[str] = field(default_factory=Counter)
    """Those of each key, by its scope, where `max_concurrent_per_key` is set."""
    turns: Turns = field(default_factory=Turns)
    """Who begins when."""
    keep_alive_s: float = KEEP_ALIVE_S
    around: Callable[[ASGIApp], ASGIApp] | None = None
    """What is put around the application, such as `tracing.Tracing.app`."""
    readiness: asyncio.Task[bool] | None = None
    """Finds out, or has found out last, whether the device is ready."""
    began: int = field(default_factory=lambda: int(time.time()))

    @property
    def models(self) -> dict[str, Policy | None]:
        """The models by name, each with the policy that it stands for; None: what the request says."""
        name = self.config.model
        return {name: None, f"{name}-device": "device-only", f"{name}-cloud": "cloud-only"}

    def hold(self, key: Key | None, scope: Scope) -> None:
        """Count a request towards those of its key, or refuse it."""
        most = self.config.max_concurrent_per_key
        if key is None or most is None:
            return
        if self.active_of[key.scope.name] >= most:
            raise too_many(f"{most} requests of this key are under way")
        self.active_of[key.scope.name] += 1
        scope[_HELD] = key.scope.name

    def letting_go(self, scope: Scope, send: Send) -> Send:
        """`send` that counts a request no more before its last byte: a client that has its answer may ask again."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self.let_go(scope)
            await send(message)

        return sending

    def let_go(self, scope: Scope) -> None:
        """Count it no more."""
        if held := scope.pop(_HELD, None):
            self.active_of[held] -= 1
            if not self.active_of[held]:
                del self.active_of[held]


def make_app(gateway: Gateway) -> ASGIApp:
    """The application."""
    asked = {"/v1/chat/completions": _Endpoint(gateway, _chat), "/v1/responses": _Endpoint(gateway, _responses)}
    app = Starlette(
        routes=[
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in asked.items()),
            Route("/v1/models", _Endpoint(gateway, _models), methods=["GET"]),
            Route("/v1/models/{name:path}", _Endpoint(gateway, _model), methods=["GET"]),
            Route("/healthz", _Endpoint(gateway, _healthz, limited=False), methods=["GET"]),
            Route("/readyz", _Endpoint(gateway, _readyz, limited=False), methods=["GET"]),
            Route("/metrics", _Endpoint(gateway, _metrics, limited=False), methods=["GET"]),
            *(dashboard.routes(gateway, gateway.store) if gateway.store else ()),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _fault},  # type: ignore[dict-item]
    )

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        # Starlette has layers around every message of an answer, and an answer has hundreds.
        endpoint = asked.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (endpoint or app)(scope, receive, send)

    served = Hosts(routed, gateway.config)
    return gateway.around(served) if gateway.around else served


Respond = Callable[[Gateway, Request, dict[str, str]], Awaitable[ASGIApp]]


class _Endpoint:
    """An endpoint whose refusals have the API's form. A class, so that Starlette leaves the answering to it."""

    def __init__(self, gateway: Gateway, respond: Respond, *, limited: bool = True) -> None:
        self._gateway, self._respond, self._limited = gateway, respond, limited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, headers = self._gateway, {REQUEST_ID: secrets.token_hex(16)}
        if self._limited and gateway.active >= gateway.config.max_concurrent:
            refusal = too_many(f"{gateway.active} requests are under way")
            gateway.metrics.refuse(refusal)
            await refuse(send, refusal, headers)
            return
        if gateway.config.max_concurrent_per_key is not None:
            send = gateway.letting_go(scope, send)
        gateway.active += self._limited
        gateway.metrics.in_flight.inc(self._limited)
        try:
            response = await self._response(Request(scope, receive), headers)
            await response(scope, receive, send)
        except RefusedError as refusal:
            gateway.metrics.refuse(refusal)
            await refuse(send, refusal, headers)
        except asyncio.CancelledError:
            # The server ends, and nothing was answered yet: a body that is still coming, for instance.
            await refuse(send, shutting_down(), headers)
        except ClientDisconnect:
            return
        finally:
            gateway.let_go(scope)
            gateway.active -= self._limited
            gateway.metrics.in_flight.dec(self._limited)

    async def _response(self, request: Request, headers: dict[str, str]) -> ASGIApp:
        try:
            return await self._respond(self._gateway, request, headers)
        except (RefusedError, ClientDisconnect):
            raise
        except Exception as error:
            _log.exception("request %s failed", headers[REQUEST_ID])
            message = f"selfroute failed; its log knows more of {headers[REQUEST_ID]}"
            raise RefusedError(500, message, code="internal_error") from error


async def _chat(gateway: Gateway, request: Request, headers: dict[str, str]) -> ASGIApp:
    course = Course()
    key = await _admitted(gateway, request)
    body = await _body(gateway, request)
    asked = read(body)
    ask = await _ask(gateway, request, key, asked, body, headers[REQUEST_ID])
    usage = bool((asked.stream_options or {}).get("include_usage"))
    writer = ChatWriter(ask.id, ask.model, usage=usage)
    return _telling(gateway, ask, writer, course, stream=bool(asked.stream), headers=headers)


async def _responses(gateway: Gateway, request: Request, headers: dict[str, str]) -> ASGIApp:
    course = Course()
    key = await _admitted(gateway, request)
    body = await _body(gateway, request)
    chat = chat_body(body)
    asked = read(chat)
    ask = await _ask(gateway, request, key, asked, chat, headers[REQUEST_ID])
    writer = ResponsesWriter(ask.id, body)
    return _telling(gateway, ask, writer, course, stream=bool(asked.stream), headers=headers)


def _telling(
    gateway: Gateway, ask: Ask, writer: Writer, course: Course, *, stream: bool, headers: Mapping[str, str]
) -> ASGIApp:
    return Telling(
        lambda tell: answer(ask, gateway.pair, tell, course),
        writer,
        course,
        stream=stream,
        headers=headers,
        keep_alive_s=gateway.keep_alive_s,
    )


async def _models(gateway: Gateway, request: Request, headers: dict[str, str]) -> ASGIApp:
    key = await _key(gateway, request)
    data = [_entry(gateway, name) for name in _models_of(gateway, key)]
    return JSONResponse({"object": "list", "data": data}, headers=headers)


async def _model(gateway: Gateway, request: Request, headers: dict[str, str]) -> ASGIApp:
    key = await _key(gateway, request)
    name = request.path_params["name"]
    _check_model(gateway, key, name)
    return JSONResponse(_entry(gateway, name), headers=headers)


def _entry(gateway: Gateway, name: str) -> dict[str, Any]:
    """A model in the API's list."""
    return {"id": name, "object": "model", "created": gateway.began, "owned_by": "selfroute"}


def _check_model(gateway: Gateway, key: Key | None, name: str) -> None:
    """Refuse a model that there is not, or that the key may not ask for."""
    known = _models_of(gateway, key)
    if name in known:
        return
    whose = "for this key" if key and key.models is not None else "here"
    message = f"no model {name!r} {whose} (known: {', '.join(known) or 'none'})"
    raise RefusedError(404, message, code="model_not_found", param="model")


def _models_of(gateway: Gateway, key: Key | None) -> list[str]:
    """The models that a key may ask for."""
    return [name for name in gateway.models if key is None or key.models is None or name in key.models]


async def _healthz(gateway: Gateway, request: Request, headers: dict[str, str]) -> ASGIApp:
    return JSONResponse({"status": "ok"}, headers=headers)


async def _readyz(gateway: Gateway, request: Request, headers: dict[str, str]) -> ASGIApp:
    # Anybody may ask this, and the device is asked once for all who ask at a time.
    if gateway.readiness is None or gateway.readiness.done():
        gateway.readiness = asyncio.create_task(is_ready(gateway.pair.device))
    if await asyncio.shield(gateway.readiness):
        return JSONResponse({"status": "ok"}, headers=headers)
    return JSONResponse({"status": "unavailable", "part": "device"}, 503, headers=headers)


async def is_ready(device: DeviceEngine) -> bool:
    """Whether the device can serve. Where it cannot, the log says why: the gateway serves all the same, and asks the
    cloud instead."""
    try:
        async with asyncio.timeout(READY_S):
            await device.ready()
        return True
    except TimeoutError:
        why = f"it does not say that it is within {READY_S:g} s"
    except Exception as error:
        # An engine of the user's own may raise anything.
        why = str(error) or type(error).__name__
    # For the log alone: it may name places that are nobody's business.
    _log.warning("the device is not ready, and requests go to the cloud as far as they may: %s", why)
    return False


async def _metrics(gateway: Gateway, request: Request, headers: dict[str, str]) -> ASGIApp:
    key = await _key(gateway, request)
    if key and not key.admin:
        raise RefusedError(403, "metrics take a key made with --admin", code="admin_only")
    gateway.metrics.watch(gateway.pair.cloud)
    usage: list[tuple[BudgetScope, Usage]] = []
    if gateway.store:
        try:
            usage = await gateway.store.read(lambda c: usage_of_all(c, gateway.config.budget))
        except StoreError as error:
            # What this process counts is worth telling all the more.
            _log.error("the budget cannot be read: %s", error)
    return Response(gateway.metrics.page(usage), headers={**headers, "content-type": CONTENT_TYPE})


async def _key(gateway: Gateway, request: Request) -> Key | None:
    return await key_of(request, gateway.keys, gateway.sessions)


async def _admitted(gateway: Gateway, request: Request) -> Key | None:
    """Wait for a request's turn; its key."""
    key = await _key(gateway, request)
    gateway.hold(key, request.scope)
    # Strangers, and keys whose places are taken, do not wait: they would take the places of others meanwhile.
    await gateway.turns.mine()
    return key


async def _body(gateway: Gateway, request: Request) -> Any:
    """The JSON of a request's body."""
    limit = gateway.config.max_body_bytes
    too_large = RefusedError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    if int(length if (length := request.headers.get("content-length", "0")).isdecimal() else 0) > limit:
        raise too_large
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            more = True
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                read += message.get("body", b"")
                if len(read) > limit:
                    raise too_large
                more = message.get("more_body", False)
    except TimeoutError:
        raise RefusedError(408, f"the body did not come within {BODY_S:g} s", code="timeout") from None
    try:
        value = from_json(bytes(read), allow_inf_nan=False)
    except ValueError as error:
        raise RefusedError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if _deeper(value, MAX_DEPTH):
        raise RefusedError(400, f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")
    return value


def _deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        inside = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [member for members in inside for member in members]
        if not level:
            return False
    return True


async def _ask(
    gateway: Gateway, request: Request, key: Key | None, asked: ChatRequest, body: Mapping[str, Any], id: str
) -> Ask:
    """What a request asks, if whoever asks may."""
    _check_model(gateway, key, asked.model)
    said = asked.selfroute.policy or request.headers.get("x-selfroute-policy")
    policy = POLICIES.get(gateway.models[asked.model] or said or gateway.config.policy)
    if policy is None:
        raise RefusedError(400, f"a policy is one of {', '.join(POLICIES)}", code="invalid_value", param=_POLICY)
    if said not in (None, policy):
        message = f"the model {asked.model} is {policy}, and the request says {said}"
        raise RefusedError(400, message, code="invalid_value", param=_POLICY)
    if key and policy not in key.policies:
        raise RefusedError(403, f"this key may not ask for {policy}", code="policy_not_allowed", param=_POLICY)
    scope, config = key.scope if key else None, gateway.config
    # What is refused does not count.
    ask = ask_of(
        asked,
        body,
        id=id,
        policy=policy,
        undecided=config.undecided,
        handoff=config.handoff,
        bias=config.bias,
        honours=gateway.pair.device.honours,
        key=scope,
        redact=config.privacy.redact,
    )
    try:
        denied = await gateway.budget.arrive(scope)
    except StoreError as error:
        _log.error("requests cannot be counted: %s", error)
        raise RefusedError(503, "requests cannot be counted now", code="store_unavailable", retry_after_s=5) from error
    if denied:
        message = f"too many requests ({denied.limit})"
        raise RefusedError(429, message, code="rate_limit_exceeded", retry_after_s=denied.retry_after_s)
    return ask


async def _http_error(request: Request, error: HTTPException) -> Response:
    """What the router refuses, in the API's form."""
    message = f"{request.method} {request.url.path[:100]} is not served here, but POST /v1/chat/completions, POST "
    message += "/v1/responses and GET /v1/models are"
    refusal = RefusedError(error.status_code, message, code="not_found")
    return JSONResponse(refusal.body(), error.status_code, headers=error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    """What nobody thought of, in the API's form; the server logs it."""
    return JSONResponse(RefusedError(500, "selfroute failed; its log knows more", code="internal_error").body(), 500)
