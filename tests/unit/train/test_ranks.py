"""How work is cut among several processes; the exchanges themselves run in tests/e2e/test_ranks.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfroute.train.ranks import Ranks


def ranks(size: int) -> list[Ranks]:
    made = [Ranks() for _ in range(size)]
    for rank, one in enumerate(made):
        one.size, one.rank, one.first = size, rank, rank == 0
    return made


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 5))
def test_every_row_has_one_process_and_no_process_has_much_more(costs: list[int], size: int) -> None:
    parts = [one.balance(costs) for one in ranks(size)]
    assert sorted(index for part in parts for index in part) == list(range(len(costs)))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(costs[index] for index in part) for part in parts]
    assert max(loads) - min(loads) <= max(costs, default=0)


@given(st.lists(st.integers(), max_size=40), st.integers(1, 5))
def test_shares_join_to_the_whole(items: list[int], size: int) -> None:
    shares = [one.share(items) for one in ranks(size)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_exchanged() -> None:
    one = Ranks()
    assert (one.size, one.rank, one.first) == (1, 0, True)
    assert one.gather(lambda: [3, 4]) == [3, 4]
    assert one.from_first(lambda: "x") == "x"
    assert one.any(True)
    assert not one.any(False)
    weight = torch.ones(2, requires_grad=True)
    one.add_gradients([weight])
    assert weight.grad is None
    with pytest.raises(ZeroDivisionError):
        one.gather(lambda: [1 // 0])
