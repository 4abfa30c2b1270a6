"""Rows that come and go: requests of many clients, decoded together.

Those that wait join between two steps, after a pass over their prompts; those that are over, or that nobody listens to
any more, leave before the next. What a row draws comes from its own stream, so that its response does not depend on
the others. Left out on purpose: threads, and waiting (`live`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from selfroute.device.base import Sampling
from selfroute.device.decode import Decoder
from selfroute.device.hf import HFEngine
from selfroute.device.prefix import pack
from selfroute.device.wording import Deltas, Prompt
from selfroute.errors import DeviceError, DivergenceError
from selfroute.types import DeviceChunk

PREFILL_TOKENS = 8192
"""Most tokens of prompts in one pass, unless a single one has more; the other rows wait for it."""


@dataclass(eq=False, slots=True)
class Row:
    """One request on its way.

    Args:
        prompt: the conversation.
        name: of its random stream.
        max_tokens: limit of the response beyond its start.
        sampling: its temperature, and what may be decided.
        top_p: see `Choices`.
        closed: nobody listens to it any more.
    """

    prompt: Prompt
    name: str
    max_tokens: int
    sampling: Sampling
    top_p: float = 1.0
    closed: bool = False
    token_ids: list[int] = field(default_factory=list)
    deltas: Deltas | None = None


Event = tuple[Row, DeviceChunk | DeviceError]
"""A piece of a row's response, the last one with its `finish`, or why there is no more."""


class Batch:
    """The rows that are decoded together.

    Args:
        engine: the model.
        early_exit: of all rows, see `Sampling.early_exit`.
    """

    def __init__(self, engine: HFEngine, *, early_exit: bool) -> None:
        self.engine, self.early_exit = engine, early_exit
        self.rows: list[Row] = []
        self._decoder: Decoder | None = None
        # The beginnings of what a declined help call takes back.
        prefixes = [point.prefix for point in engine.points] if early_exit else []
        self._openings = {prefix[:n] for prefix in prefixes for n in range(1, len(prefix) + 1)}

    def join(self, rows: Iterable[Row]) -> list[Event]:
        """Take rows in. One whose prompt the model fails on alone fails alone; any other error is everybody's."""
        alike: dict[tuple[Sampling, float], list[Row]] = {}
        for row in rows:
            alike.setdefault((row.sampling, row.top_p), []).append(row)
        events: list[Event] = []
        for (sampling, top_p), group in alike.items():
            for part in pack([row.prompt.token_ids + row.prompt.start for row in group], PREFILL_TOKENS):
                events += self._prefill([group[n] for n in part], sampling, top_p)
        return events

    def step(self) -> list[Event]:
        """A token for each row; those that it ends leave."""
        decoder = self._decoder
        if decoder is None:
            return []
        try:
            decoder.step()
        except DivergenceError as error:
            # The others' numbers are good.
            lost = [self.rows[n] for n in decoder.choices.lost]
            decoder.again()
            self._keep([row for row in self.rows if row not in lost])
            return [(row, DeviceError(str(error))) for row in lost]
        events: list[Event] = []
        last, over, counts = decoder.last_B.tolist(), decoder.over_B.tolist(), decoder.count_B.tolist()
        for n, row in enumerate(self.rows):
            # Whatever was taken back goes.
            row.token_ids[counts[n] - 1 :] = [last[n]]
            assert row.deltas
            if over[n]:
                events.append((row, self._last_chunk(decoder, n)))
            elif text := row.deltas.feed(self._certain(row.token_ids)):
                events.append((row, DeviceChunk(text)))
        if any(over):
            self._keep([row for row, ended in zip(self.rows, over, strict=True) if not ended])
        return events

    def drop_closed(self) -> None:
        """Leave out those that nobody listens to."""
        if any(row.closed for row in self.rows):
            self._keep([row for row in self.rows if not row.closed])

    def clear(self) -> list[Row]:
        """Leave out all, whatever state they are in; they are returned."""
        rows, self.rows, self._decoder = self.rows, [], None
        return rows

    def _prefill(self, rows: Sequence[Row], sampling: Sampling, top_p: float) -> list[Event]:
        limits = [len(row.prompt.start) + row.max_tokens for row in rows]
        failed: DeviceError | None = None
        try:
            joining = Decoder(
                self.engine,
                [row.prompt.token_ids for row in rows],
                range(len(rows)),
                [row.prompt.start for row in rows],
                [row.name for row in rows],
                limits,
                sampling.model_copy(update={"max_tokens": max(limits)}),
                top_p=top_p,
                joins=True,
            )
        except Exception as error:
            failed = failure(error)
        if failed and len(rows) == 1:
            return [(rows[0], failed)]
        if failed:
            # Out here no traceback holds on to memory.
            return [event for row in rows for event in self._prefill([row], sampling, top_p)]
        for n, row in enumerate(rows):
            row.token_ids = list(row.prompt.start)
            row.deltas = Deltas(self.engine.decode, row.prompt.start, row.prompt.rest)
            if row.prompt.next_tokens:
                joining.choices.begins[n] = row.prompt.next_tokens
        self.rows += rows
        if self._decoder is None:
            self._decoder = joining
        else:
            self._decoder.join(joining)
        return []

    def _last_chunk(self, decoder: Decoder, n: int) -> DeviceChunk:
        row, response = self.rows[n], decoder.response(n)
        assert row.deltas
        return DeviceChunk(
            row.deltas.end(response.token_ids),
            finish="stop" if response.finished else "length",
            score=response.score,
            prompt_tokens=len(row.prompt.token_ids) + len(row.prompt.start),
            completion_tokens=len(response.token_ids) - len(row.prompt.start),
        )

    def _certain(self, token_ids: list[int]) -> list[int]:
        """A row's tokens without those at the end that may be taken back."""
        for n in range(max(map(len, self._openings), default=0), 0, -1):
            if tuple(token_ids[-n:]) in self._openings:
                return token_ids[:-n]
        return token_ids

    def _keep(self, rows: Sequence[Row]) -> None:
        if not rows:
            self.clear()
            return
        assert self._decoder
        kept = set(map(id, rows))
        self._decoder.select([n for n, row in enumerate(self.rows) if id(row) in kept])
        self.rows = list(rows)


def failure(error: Exception) -> DeviceError:
    """What a client is told of an error in the model."""
    said = (str(error).splitlines() or [""])[0][:200]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in said:
        return DeviceError(f"the device has too little memory: lower device.max_streams or device.context ({said})")
    return DeviceError(f"the model failed: {type(error).__name__}: {said}")
