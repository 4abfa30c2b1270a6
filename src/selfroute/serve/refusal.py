"""Requests that are not answered, as the API says so."""

from __future__ import annotations

from typing import Any

from selfroute.errors import CloudError, SelfrouteError

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RefusedError(SelfrouteError):
    """A request that is not answered.

    Args:
        status: the HTTP status.
        message: the cause and the way out, for the client; holds no secret.
        code: for programs.
        param: the field of the request that is at fault.
        retry_after_s: when it may be worth another try.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s

    def body(self) -> dict[str, Any]:
        """The API's form of it."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def device_unavailable() -> RefusedError:
    """Nobody is left to answer."""
    return RefusedError(503, "the device cannot answer now", code="device_unavailable", retry_after_s=5)


def too_many(under_way: str) -> RefusedError:
    """Others have to end first."""
    return RefusedError(429, f"{under_way}, which is the most", code="too_many_requests", retry_after_s=1)


def shutting_down() -> RefusedError:
    """The gateway ends before the answer does."""
    return RefusedError(503, "the gateway ends before the answer does", code="shutting_down", retry_after_s=5)


def cloud_failed(error: CloudError) -> RefusedError:
    """What a client of the cloud alone is told: what is its to mend, and nothing of where the cloud is."""
    if error.status == 429:
        return RefusedError(429, "the cloud is busy", code="cloud_rate_limit", retry_after_s=error.retry_after_s)
    if error.status in (400, 413, 422):
        return RefusedError(400, f"the cloud rejects the request: {error.said}", code="cloud_rejects")
    return RefusedError(502, "the cloud cannot answer now", code="cloud_unavailable")
