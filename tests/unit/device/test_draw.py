from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from selfroute.device.draw import BLOCK, Draws, uniforms

CPU = torch.device("cpu")


def test_streams_differ_and_repeat() -> None:
    assert (uniforms("0/1/p/0", 8) == uniforms("0/1/p/0", 16)[:8]).all()
    assert not (uniforms("0/1/p/0", 8) == uniforms("0/1/p/1", 8)).any()
    draws = uniforms("mean", 20_000)
    assert abs(draws.mean() - 0.5) < 0.01
    assert draws.min() >= 0
    assert draws.max() < 1


def draws(u_BT: Tensor) -> Draws:
    """Draws whose uniforms are given."""
    made = Draws(["any"], 1, CPU)
    made.uniforms_RT = u_BT
    return made


@pytest.mark.parametrize("vocabulary", [5, BLOCK, BLOCK + 1, 4 * BLOCK, 150_001])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_token_is_drawn_where_the_distribution_function_passes_u(vocabulary: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BV = 4 * torch.randn(40, vocabulary, generator=generator)
    u_BT = torch.rand(40, 3, generator=generator, dtype=torch.float64)
    draw = draws(u_BT)
    for t in range(3):
        token_B = draw(logits_BV, logits_BV.amax(-1), temperature, torch.arange(40), torch.full((40,), t))
        upto_BV = np.cumsum(np.exp(logits_BV.numpy().astype(np.longdouble) / temperature), -1)
        for token, upto_V, u in zip(token_B.tolist(), upto_BV, u_BT[:, t].numpy(), strict=True):
            assert token == np.searchsorted(upto_V, u * upto_V[-1], side="right")


def test_the_borders_between_tokens_are_exact() -> None:
    """4,096 tokens alike: all sums are whole numbers, and u = k / 4096 is where token k begins."""
    count = 4 * BLOCK
    assert count == 4096
    begin_B = torch.arange(count, dtype=torch.float64) / count
    before_B = torch.nextafter(begin_B, torch.tensor(-1.0, dtype=torch.float64)).clamp_min(0)
    draw = draws(torch.stack([begin_B, before_B], 1))
    rows, logits_BV, top_B = torch.arange(count), torch.zeros(count, count), torch.zeros(count)
    assert draw(logits_BV, top_B, 1.0, rows, torch.zeros_like(rows)).equal(rows)
    assert draw(logits_BV, top_B, 1.0, rows, torch.ones_like(rows)).equal((rows - 1).clamp_min(0))


@pytest.mark.parametrize("vocabulary", [7, BLOCK, 3 * BLOCK + 5])
def test_what_has_no_probability_is_never_drawn(vocabulary: int) -> None:
    """Not at the ends of a block, nor for the u's closest to 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    below_one = 1 - 2.0**-53
    u_BT = torch.tensor([[0.0, 2.0**-53, 0.5, below_one]] * 200, dtype=torch.float64)
    logits_BV = torch.randn(200, vocabulary, generator=generator)
    logits_BV[torch.rand(200, vocabulary, generator=generator) < 0.9] = -torch.inf
    logits_BV[:, 3] = 0.0
    logits_BV[:, [0, -1]] = -torch.inf
    draw = draws(u_BT)
    for t in range(4):
        token_B = draw(logits_BV, logits_BV.amax(-1), 1.0, torch.arange(200), torch.full((200,), t))
        assert torch.isfinite(logits_BV.gather(1, token_B[:, None])).all()


def test_fewer_rows_later_draw_the_same() -> None:
    logits_BV = torch.randn(6, 2 * BLOCK + 9, generator=torch.Generator().manual_seed(0))
    draw = Draws([f"r{n}" for n in range(6)], 4, CPU)
    top_B, rows, index_B = logits_BV.amax(-1), torch.arange(6), torch.full((6,), 2)
    together = draw(logits_BV, top_B, 1.0, rows, index_B)
    some = torch.tensor([4, 1])
    assert draw(logits_BV[some], top_B[some], 1.0, some, index_B[some]).equal(together[some])
