"""The dashboard, its sign-in and the playground, as pages of the server's own that load nothing from elsewhere.

Where keys are asked for, a browser shows one once, in a form, and has a session then: an admin's sees everybody's
requests, any other its own. Everything that models, clients or key names may hold is escaped by the templates, and the
pages' policy lets no script run but the two files here. Left out on purpose: what is shown (`board`), and foreign pages
that ask, which `app` refuses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from selfroute.errors import StoreError
from selfroute.serve import board, charts, history, words
from selfroute.serve.access import COOKIE, Key, key_of
from selfroute.serve.metrics import resting
from selfroute.serve.refusal import RefusedError
from selfroute.serve.sessions import LASTS_S
from selfroute.serve.store import Store
from selfroute.types import POLICIES

if TYPE_CHECKING:
    from selfroute.serve.app import Gateway

_FILES: Mapping[str, str] = {
    "page.css": "text/css; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "playground.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

_SAFE: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # With none at all, browsers would send forms of these pages without saying whose they are.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

_MOST_FORM_BYTES, _FORM_S = 4096, 10.0

_log = logging.getLogger(__name__)

Page = Callable[[Request], Awaitable[Response]]


def routes(gateway: Gateway, store: Store) -> list[BaseRoute]:
    """The pages of a gateway, read from its store."""
    pages = _Pages(gateway, store)
    return [
        Route("/", _front),
        Route("/dashboard", pages.guarded(pages.board)),
        Route("/dashboard/live", pages.guarded(pages.live)),
        Route("/dashboard/requests/{id}", pages.guarded(pages.request)),
        Route("/dashboard/playground", pages.guarded(pages.playground)),
        Route("/dashboard/sign-in", pages.sign_in, methods=["GET", "POST"]),
        Route("/dashboard/sign-out", pages.sign_out, methods=["POST"]),
        Route("/dashboard/files/{name}", _file),
    ]


class _Pages:
    def __init__(self, gateway: Gateway, store: Store) -> None:
        self._gateway, self._store = gateway, store
        # Pages take tens of milliseconds of a store that has few readers, and keys are read there, too.
        self._one = asyncio.Semaphore(1)
        self._templates = Environment(
            loader=PackageLoader("selfroute.serve", "pages"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(words.FILTERS)
        self._templates.globals.update(charts=charts, words=words, spans=board.SPANS, name=gateway.config.model)

    def guarded(self, page: Callable[[Request, Key | None], Awaitable[Response]]) -> Page:
        """A page for who may see it; others are sent to sign in."""

        async def guard(request: Request) -> Response:
            try:
                key = await key_of(request, self._gateway.keys, self._gateway.sessions)
                return await page(request, key)
            except RefusedError as refusal:
                if refusal.status == 401 and request.url.path != "/dashboard/live":
                    return RedirectResponse("/dashboard/sign-in", 303, headers=_SAFE)
                return self._say(str(refusal), refusal.status)
            except StoreError as error:
                _log.error("the dashboard cannot be read: %s", error)
                return self._say("The store cannot be read now. This page tries again by itself.", 503)

        return guard

    async def board(self, request: Request, key: Key | None) -> Response:
        return self._render("dashboard", key=key, **await self._read(request, key))

    async def live(self, request: Request, key: Key | None) -> Response:
        """The part of the dashboard that changes."""
        return self._render("live", key=key, **await self._read(request, key))

    async def _read(self, request: Request, key: Key | None) -> dict[str, Any]:
        chosen = request.query_params.get("span", "")
        span = chosen if chosen in board.SPANS else "1h"
        before = request.query_params.get("before", "")[:64]
        own = None if key is None or key.admin else key.scope
        limits = self._gateway.config.budget
        async with self._one:
            found = await self._store.read(lambda c: board.read(c, board.SPANS[span], limits, own, before=before))
        cloud = words.cloud(found.health, resting(self._gateway.pair.cloud))
        return {"board": found, "chosen": span, "before": before, "cloud": cloud}

    async def request(self, request: Request, key: Key | None) -> Response:
        """One request, with what was asked and answered if that was kept."""
        id = request.path_params["id"]
        found = await self._store.read(lambda c: history.find(c, id))
        if found is None or (key and not key.admin and key.scope.name != f"key:{found.key_id}"):
            return self._say("There is no such request, or it was forgotten.", 404)
        return self._render("request", key=key, r=found)

    async def playground(self, request: Request, key: Key | None) -> Response:
        """A page that asks /v1/chat/completions."""
        models = {
            name: policy
            for name, policy in self._gateway.models.items()
            if key is None
            or ((key.models is None or name in key.models) and (policy is None or policy in key.policies))
        }
        policies = [policy for policy in POLICIES if key is None or policy in key.policies]
        config = self._gateway.config
        return self._render(
            "playground", key=key, models=models, policies=policies, policy=config.policy, bias=config.bias
        )

    async def sign_in(self, request: Request) -> Response:
        """A form that takes a key, and what it leads to."""
        sessions = self._gateway.sessions
        if sessions is None:
            return RedirectResponse("/dashboard", 303, headers=_SAFE)
        if request.method == "GET":
            return self._render("sign-in", key=None, wrong="")
        try:
            session = await sessions.begin((await _form(request)).get("key", ""))
        except StoreError as error:
            _log.error("nobody can sign in: %s", error)
            return self._render("sign-in", 503, key=None, wrong="Keys cannot be checked now. Try again in a moment.")
        if session is None:
            return self._render("sign-in", 403, key=None, wrong="That is no valid key of this gateway.")
        response = RedirectResponse("/dashboard", 303, headers=_SAFE)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, session, max_age=LASTS_S, httponly=True, samesite="strict", secure=secure)
        return response

    async def sign_out(self, request: Request) -> Response:
        sessions, session = self._gateway.sessions, request.cookies.get(COOKIE)
        if sessions and session:
            try:
                await sessions.end(session)
            except StoreError as error:
                _log.error("a session ends by its time only: %s", error)
        response = RedirectResponse("/dashboard/sign-in", 303, headers=_SAFE)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response

    def _say(self, message: str, status: int) -> Response:
        return self._render("message", status, key=None, message=message)

    def _render(self, template: str, status: int = 200, **what: Any) -> Response:
        html = self._templates.get_template(f"{template}.html.jinja").render(at=template, **what)
        return HTMLResponse(html, status, headers=_SAFE)


async def _form(request: Request) -> dict[str, str]:
    """The fields of a small form; what is larger, too slow, or no form, has none."""
    read = bytearray()
    try:
        async with asyncio.timeout(_FORM_S):
            async for piece in request.stream():
                read += piece
                if len(read) > _MOST_FORM_BYTES:
                    return {}
    except (TimeoutError, ClientDisconnect):
        return {}
    return dict(parse_qsl(read.decode("ascii", "replace")))


async def _front(request: Request) -> Response:
    return RedirectResponse("/dashboard", 303, headers=_SAFE)


async def _file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _FILES:
        return Response(status_code=404, headers=_SAFE)
    data = resources.files("selfroute.serve").joinpath("pages", name).read_bytes()
    return Response(data, headers={**_SAFE, "content-type": _FILES[name], "cache-control": "no-cache"})
