"""Training in several processes on one machine, started by `accelerate launch` or `torchrun`.

Each rank samples its share of the problems. What is small (tokens, verdicts) goes to all, so that rewards, the filter
and the plan of the update are worked out by every rank alike; then each takes its share of the rows, and gradients are
added up. Only the first rank asks the cloud and writes files. Every exchange carries errors too, so that a rank that
fails ends the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from selfroute.errors import ConfigError, TrainingError

T = TypeVar("T")


def check_launch(place: str) -> None:
    """Refuse several processes of a kind that our loop is not made for.

    Raises:
        ConfigError: several machines, sharded weights, or a device that several processes cannot share.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    wrong = {
        "several machines": os.environ.get("LOCAL_WORLD_SIZE") not in (None, os.environ["WORLD_SIZE"]),
        "FSDP": os.environ.get("ACCELERATE_USE_FSDP") == "true",
        "DeepSpeed": os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true",
        "mps": place == "mps",
    }
    for what, is_so in wrong.items():
        if is_so:
            raise ConfigError(f"train cannot run in several processes with {what} (see selfroute.train.trl)")


PATIENCE = timedelta(hours=6)
"""How long a rank waits for the others; a reasoning cloud may take long."""


class Ranks:
    """This process among those of a run, which compute on `place` (`cuda` or `cpu`)."""

    def __init__(self, place: str = "cpu") -> None:
        self.size, self.rank = 1, 0
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=place == "cpu", timeout=PATIENCE)
            self.size, self.rank = state.num_processes, state.process_index
        self.first = self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all ranks hold: one of `size` neighbouring parts of nearly equal length."""
        return list(items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size])

    def gather(self, work: Callable[[], list[T]]) -> list[T]:
        """The lists that `work` gives on each rank, joined in the ranks' order.

        Raises:
            Exception: what `work` raised here; on the other ranks a TrainingError that tells of it.
        """
        if self.size == 1:
            return work()
        from accelerate.utils import gather_object

        made: list[T] = []
        failure = None
        try:
            made = work()
        except Exception as error:
            failure = error
        results: list[tuple[list[T], str | None]] = gather_object([(made, None if failure is None else str(failure))])
        if failure is not None:
            raise failure
        for rank, (_, said) in enumerate(results):
            if said is not None:
                raise TrainingError(f"process {rank} failed: {said}")
        return [item for items, _ in results for item in items]

    def each(self, work: Callable[[], object]) -> None:
        """Do it on each rank; where one fails, all do.

        Raises:
            Exception: as `gather`.
        """
        self.gather(lambda: [work() is None])

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, on all.

        Raises:
            Exception: as `gather`.
        """
        [made] = self.gather(lambda: [work()] if self.first else [])
        return made

    def end(self) -> None:
        """Leave the other processes, when all is done."""
        if self.size > 1:
            # A thread of Gloo's that lets go of a Python tensor while Python ends aborts the process; a barrier has
            # none, and those before it are let go by then.
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def any(self, here: bool) -> bool:
        """Whether it is so on some rank."""
        return any(self.gather(lambda: [here]))

    def balance(self, costs: Sequence[int]) -> list[int]:
        """The indices of this rank's part of some work: dear ones first, each to the rank with the least so far."""
        if self.size == 1:
            return list(range(len(costs)))
        loads, mine = [0] * self.size, []
        for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
            rank = loads.index(min(loads))
            loads[rank] += costs[index]
            if rank == self.rank:
                mine.append(index)
        return sorted(mine)

    def add_gradients(self, weights: Sequence[Tensor]) -> None:
        """Add up each weight's gradient over the ranks; a rank without one adds nothing and holds nobody up."""
        if self.size == 1:
            return
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            torch.distributed.all_reduce(weight.grad)
