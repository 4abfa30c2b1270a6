"""Attempts: the device's responses to problems, with what a router may look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from selfroute.device.base import Sampling
from selfroute.device.head import Head, log_probs
from selfroute.device.hf import HFEngine
from selfroute.device.prefix import SharedPrompts, pack
from selfroute.protocol import chat, last_boundary
from selfroute.routers.base import Attempt
from selfroute.types import Problem, Response


@dataclass(frozen=True, slots=True)
class Extra:
    """How many more responses an attempt gets: to the same prompt, and to prompts that ask the same in other words."""

    samples: int = 0
    variants: int = 0


def collect(
    engine: HFEngine,
    problems: Sequence[Problem],
    sampling: Sampling,
    stream: str,
    *,
    extra: Extra = Extra(),
    variants_of: Callable[[Problem, int], list[str]] = lambda problem, count: [],
    progress: Callable[[int], None] | None = None,
) -> list[Attempt]:
    """An attempt at each problem, help forbidden.

    Args:
        engine: the device.
        problems: what to attempt.
        sampling: how responses are drawn; help is forbidden whatever it says.
        stream: names the responses' randomness, with each problem's id.
        extra: how many more responses.
        variants_of: the task's questions in other words.
        progress: called with the number of responses that finished since the last call.
    """
    alone = sampling.model_copy(update={"forbid_help": True, "decide": "sample"})
    prompts = [engine.encode(chat(p.question)) for p in problems]
    streams = [[f"{stream}/{p.id}/{i}" for i in range(1 + extra.samples)] for p in problems]
    groups = engine.generate(prompts, streams, alone, progress=progress)
    others = [[engine.encode(chat(q)) for q in _questions(p, extra.variants, variants_of)] for p in problems]
    flat = [prompt for group in others for prompt in group]
    names = [[f"{stream}/{p.id}/variant/{i}"] for p, g in zip(problems, others, strict=True) for i in range(len(g))]
    varied = iter(engine.generate(flat, names, alone, progress=progress))
    variants = [tuple(next(varied)[0] for _ in group) for group in others]
    seen = _read(engine, prompts, [group[0] for group in groups])
    return [
        Attempt(p, group[0], *read, tuple(group[1:]), varied_group)
        for p, group, read, varied_group in zip(problems, groups, seen, variants, strict=True)
    ]


def _questions(problem: Problem, count: int, variants_of: Callable[[Problem, int], list[str]]) -> list[str]:
    """`count` questions in other words; where a problem has fewer, they come round again, so that all have k votes."""
    found = variants_of(problem, count) or [problem.question]
    return [found[n % len(found)] for n in range(count)]


@torch.no_grad()
def _read(
    engine: HFEngine, prompts: Sequence[Sequence[int]], responses: Sequence[Response]
) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """For each response, exp(mean log-probability), and the hidden states where it chose to answer and before its first
    token."""
    found: list[tuple[float, np.ndarray, np.ndarray]] = [(0.0, np.zeros(0), np.zeros(0))] * len(responses)
    head = Head(engine.model)
    for begin in range(0, len(responses), 256):
        batch = range(begin, min(begin + 256, len(responses)))
        shared = SharedPrompts(engine.model, [prompts[i] for i in batch], engine.pad)
        rows = [responses[i].token_ids for i in batch]
        for part in pack(rows, 8192):
            states_BTH = shared.states(part, [rows[b] for b in part])
            for n, b in enumerate(part):
                targets_T = torch.tensor(rows[b], device=states_BTH.device)
                mean = log_probs(head, states_BTH[n, : len(rows[b])], targets_T).mean()
                at = _decision(engine, responses[begin + b])
                state, first = (states_BTH[n, t].float().cpu().numpy() for t in (at, 0))
                found[begin + b] = mean.exp().item(), state, first
    return found


def _decision(engine: HFEngine, response: Response) -> int:
    if response.decision_index is not None:
        return response.decision_index
    return min(last_boundary(response.token_ids, engine.tokenizer), len(response.token_ids) - 1)
