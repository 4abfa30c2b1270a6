"""The way out: everything that a request hands to the cloud passes `Border.cross`, and nothing goes round it.

    device-only             ->  never
    a rule that blocks      ->  stays
    what cannot be checked  ->  stays: too long, too slow, no text, or the check failed
    the rest                ->  leaves, with placeholders where a rule or the request asks for them

Left out on purpose: the budget, and what a request does that may not leave (`handoff`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from selfroute.errors import TaskError
from selfroute.serve.asking import Ask
from selfroute.serve.privacy import Privacy
from selfroute.serve.redaction import Placeholders, legible, mapped, plain, texts_of, unreadable, without_file
from selfroute.serve.refusal import RefusedError
from selfroute.serve.restoring import Restoring
from selfroute.types import CloudRequest

_log = logging.getLogger(__name__)


class HeldBackError(RefusedError):
    """A request that may not leave; what it says is for a client that nobody else can answer.

    Args:
        reason: `policy`, `rule` or `privacy`, for the record.
        rule: the rule's name, where it is one.
    """

    def __init__(
        self, reason: Literal["policy", "rule", "privacy"], status: int, message: str, *, rule: str = "", **more: Any
    ) -> None:
        super().__init__(status, message, code=_CODES[reason], **more)
        self.reason, self.rule = reason, rule


_CODES = {"policy": "policy_not_allowed", "rule": "rule", "privacy": "cannot_be_checked"}


@dataclass(frozen=True, slots=True)
class Crossing:
    """A request that may leave as it is here; `counts` are different texts that it hides, by kind."""

    request: CloudRequest
    counts: Mapping[str, int] = field(default_factory=dict)
    restoring: Restoring | None = None


class Finder(Protocol):
    """What finds; see `search.Search`."""

    async def find(self, texts: Sequence[str], redact: bool) -> Mapping[str, Any]:
        """As `finding.find`; raises TimeoutError, or TaskError where it failed."""
        ...


class Border:
    """Lets requests out, or not; without a finder there is neither a rule nor redaction."""

    def __init__(self, privacy: Privacy | None = None, finder: Finder | None = None) -> None:
        self._privacy, self._finder = privacy or Privacy(), finder

    async def cross(self, ask: Ask, request: CloudRequest) -> Crossing:
        """What of a request may go to the cloud.

        Raises:
            HeldBackError: nothing may.
        """
        if ask.policy == "device-only":
            raise HeldBackError("policy", 403, "this request may not leave the device")
        if self._finder is None or not (ask.redact or self._privacy.rules):
            if ask.redact:
                raise HeldBackError("privacy", 503, "this gateway cannot redact")
            return Crossing(request)
        if self._privacy.unreadable == "block" and (part := unreadable(request.messages)):
            raise HeldBackError("privacy", 400, f"{part} holds no text that could be checked", param=part)
        tree = [request.messages, request.extra]
        readable = list(map(without_file, request.messages)) if self._privacy.unreadable == "pass" else request.messages
        texts = texts_of([readable, request.extra])
        # Many texts take time, though there is nothing in them.
        length, most = sum(len(text) + 1 for text in texts), self._privacy.max_chars
        if length > most:
            message = f"the request has {length} characters, and {most} can be checked before they leave"
            raise HeldBackError("privacy", 413, message, param="messages")
        texts = list(map(plain, texts))
        found = await self._found(ask, list(map(legible, texts)))
        if rule := found["blocked"]:
            raise HeldBackError("rule", 403, f"the rule {rule!r} keeps this request on the device", rule=rule)
        return self._redacted(request, tree, texts, found["spans"])

    async def _found(self, ask: Ask, texts: Sequence[str]) -> Mapping[str, Any]:
        assert self._finder is not None
        try:
            async with asyncio.timeout(self._privacy.timeout_s):
                return await self._finder.find(texts, ask.redact)
        except TimeoutError:
            _log.warning("request %s: its check took more than %g s", ask.id, self._privacy.timeout_s)
        except TaskError as error:
            _log.error("request %s: its check failed: %s", ask.id, error)
        raise HeldBackError("privacy", 503, "the request cannot be checked now", retry_after_s=5)

    def _redacted(
        self, request: CloudRequest, tree: Sequence[Any], texts: list[str], spans: Sequence[Sequence[Any]]
    ) -> Crossing:
        if not any(spans):
            return Crossing(request)
        placeholders = Placeholders(texts)
        changed = {t: placeholders.put(t, [tuple(s) for s in found]) for t, found in zip(texts, spans, strict=True)}
        messages, extra = mapped(tree, lambda text: changed.get(plain(text), text))
        form = request.extra.get("response_format")
        json_answer = isinstance(form, Mapping) and form.get("type") in ("json_object", "json_schema")
        return Crossing(
            replace(request, messages=tuple(messages), extra=extra),
            placeholders.counts,
            Restoring(placeholders.originals, json_answer=json_answer),
        )
