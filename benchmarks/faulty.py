"""A device and a cloud that fail as they are told, and a book of what the cloud may charge; for `load.py`."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from loopback import HELP_CALL, STREAM, Upstream, answer_of, chunk, event, text_of, usage_of

from selfroute.cloud.client import OpenAICloud
from selfroute.cloud.endpoint import OpenAIConfig
from selfroute.types import CloudRequest

PRICES = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 2.0}
FAULTS = ("429", "500", "closed", "hangs", "stalls", "cut", "garbage")


class Book:
    """What the upstreams saw: a line a call of the cloud, its cost in nano-USD at what it was, or may have been."""

    def __init__(self) -> None:
        self._cloud = OpenAICloud(OpenAIConfig(base_url="http://127.0.0.1/v1", model="cloud", **PRICES))
        self.lines: list[dict[str, Any]] = []
        self.calls: Counter[str] = Counter()
        self.down: set[str] = set()
        self.up_since = time.monotonic()

    def begin(self, body: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
        request = CloudRequest(tuple(body["messages"]), temperature=None, extra={"max_tokens": body["max_tokens"]})
        worst = round(self._cloud.worst_usd(request) * 1e9)
        line = {"key": wanted["key"], "name": wanted["name"], "nano": worst, "worst": worst}
        self.lines.append(line)
        return line

    def spent_nano(self, gone: Collection[str], key: str | None = None) -> tuple[int, int]:
        """The least and the most that was spent, which differ for clients that are gone alone: whether they saw the end
        of a call is not for the cloud to know."""
        lines = [line for line in self.lines if key in (None, line["key"])]
        least = sum(line["nano"] for line in lines)
        return least, least + sum(line["worst"] - line["nano"] for line in lines if line["name"] in gone)


class Faulty(Upstream):
    """The device or the cloud, which does what a request says."""

    def __init__(self, who: str, book: Book) -> None:
        self._who, self._book = who, book

    def asked(self, body: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        book = self._book
        call = f"{self._who}/{wanted['name']}"
        book.calls[call] += 1
        self._line = book.begin(body, wanted) if self._who == "cloud" else {}
        fault = wanted["fault"] if wanted["at"] == self._who and book.calls[call] <= wanted["times"] else ""
        if self._who in book.down or fault == "429":
            # Neither is charged.
            self._line["nano"] = 0
            self.whole({"error": {"message": "later"}}, 503 if self._who in book.down else 429)
        elif fault == "500":
            self.whole({"error": {"message": "oops"}}, 500)
        elif fault == "closed":
            self.transport.close()
        elif fault != "hangs" and body.get("stream"):
            self.transport.write(STREAM)
            self._go_on(self._pieces(body, wanted, fault), wanted["every_ms"] / 1000)
        elif fault != "hangs":
            ready_s = wanted["pieces"] * wanted["every_ms"] / 1000
            asyncio.get_running_loop().call_later(ready_s, self._in_one, text_of(wanted), fault)

    def _in_one(self, pieces: Sequence[str], fault: str) -> None:
        """The cloud's answer to a request that does not stream."""
        if self.gone:
            return
        data = json.dumps(answer_of(pieces)).encode()
        if not fault:
            self._line["nano"] = price_of(len(pieces))
            self.whole(data)
        elif fault == "garbage":
            self.whole(data[: len(data) // 2])
        else:
            self.transport.write(b"HTTP/1.1 200 X\r\nContent-Length: %d\r\n\r\n" % len(data) + data[: len(data) // 2])
            if fault == "cut":
                self.transport.close()

    def _pieces(self, body: Mapping[str, Any], wanted: Mapping[str, Any], fault: str) -> Iterator[bytes]:
        pieces = text_of(wanted)
        if self._who == "device":
            # What goes on from the middle may not ask.
            does = "answer" if body["messages"][-1]["role"] == "assistant" else wanted["device"]
            tagged = {"answer": ["<answer>", *pieces, "</answer>"], "help": ["hm ", HELP_CALL], "undecided": pieces}
            pieces = tagged[does]
        for number, piece in enumerate(pieces):
            if fault and number == len(pieces) // 2:
                if fault != "garbage":
                    break
                yield chunk(b'data: {"choices": [{"delta"\n\n')
            yield chunk(event({"content": piece}))
        if fault == "stalls":
            return
        if fault:
            self.transport.close()
            return
        if self._who == "cloud":
            self._line["nano"] = price_of(len(pieces))
        last = event({}, "stop") + event({}, choices=[], usage=usage_of(len(pieces)))
        yield chunk(last + b"data: [DONE]\n\n") + chunk(b"")


def price_of(pieces: int) -> int:
    """What an answer costs, in nano-USD."""
    usage = usage_of(pieces)
    return usage["prompt_tokens"] * 1000 + usage["completion_tokens"] * 2000
