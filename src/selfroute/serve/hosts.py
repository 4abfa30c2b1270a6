"""By which names the gateway is called, and of which pages: so that no web page asks in a user's name."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from selfroute.serve.config import GatewayConfig
from selfroute.serve.refusal import RefusedError
from selfroute.serve.telling import refuse


class Hosts:
    """Serves the gateway's own names and pages only: a page of another site, under a name that leads here or in its
    own, asks in vain."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._app = app
        self._named = set(config.hosts)
        own = f"[{config.host}]" if ":" in config.host else config.host
        self._hosts = {"localhost", "127.0.0.1", "[::1]", own.lower(), *config.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        named = [value for name, value in scope["headers"] if name == b"host"]
        host = named[0].decode("latin-1").lower() if len(named) == 1 else ""
        bare = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if bare not in self._hosts:
            message = f"the gateway does not answer to the host name {bare[:100]!r}: its config can say so (hosts)"
            await refuse(send, RefusedError(421, message, code="unknown_host"), {})
            return
        if not self._own(scope, host):
            message = "pages of other sites may not ask here (Origin)"
            await refuse(send, RefusedError(403, message, code="foreign_origin"), {})
            return
        await self._app(scope, receive, send)

    def _own(self, scope: Scope, host: str) -> bool:
        """Whether a request is of no page, or of one of this gateway's; a proxy may have changed the Host header."""
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        if not origins:
            return True
        page = origins[0].decode("latin-1").lower().partition("://")[2]
        return len(origins) == 1 and (page == host or page in self._named)
