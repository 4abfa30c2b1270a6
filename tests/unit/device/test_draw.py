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


def test_rows_may_have_temperatures_of_their_own() -> None:
    logits_BV = 3 * torch.randn(6, BLOCK + 9, generator=torch.Generator().manual_seed(0))
    draw = Draws([f"r{n}" for n in range(6)], 4, CPU)
    top_B, rows, index_B = logits_BV.amax(-1), torch.arange(6), torch.full((6,), 2)
    warm_B1 = torch.tensor([0.3, 1.0, 2.0, 0.5, 1.5, 0.7], dtype=torch.float64)[:, None]
    expected = [draw(logits_BV, top_B, float(t), rows, index_B)[n] for n, t in enumerate(warm_B1)]
    assert draw(logits_BV, top_B, warm_B1, rows, index_B).tolist() == [int(token) for token in expected]


def test_responses_that_join_and_leave_keep_their_streams() -> None:
    logits_BV = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    together = Draws(list("abcde"), 9, CPU)
    draw, more = Draws(list("cxa"), 4, CPU), Draws(list("ed"), 9, CPU)
    top_B, index_B = logits_BV.amax(-1), torch.tensor([3, 2, 1, 8, 3])
    draw.select([2, 0])
    draw.join(more)
    order = torch.tensor([0, 2, 4, 3])
    expected = together(logits_BV, top_B, 1.0, torch.arange(5), index_B)[order]
    found = draw(logits_BV[order], top_B[order], 1.0, torch.arange(4), index_B[order])
    assert found.equal(expected)


@pytest.mark.parametrize("vocabulary", [6, BLOCK + 6])
def test_top_p_draws_from_the_likeliest_alone(vocabulary: int) -> None:
    p_V = torch.zeros(vocabulary, dtype=torch.float64)
    p_V[:6] = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15, 0.0])
    logits_BV = p_V.log().expand(4000, -1)
    draw = Draws([f"r{n}" for n in range(4000)], 1, CPU)
    top_B, rows, index_B = logits_BV.amax(-1), torch.arange(4000), torch.zeros(4000, dtype=torch.long)

    def shares(top_p: float, temperature: float = 1.0) -> list[float]:
        top_p_B1 = torch.full((4000, 1), top_p, dtype=torch.float64)
        token_B = draw(logits_BV, top_B, temperature, rows, index_B, top_p_B1)
        return (torch.bincount(token_B, minlength=6)[:6] / 4000).tolist()

    assert shares(0.69) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0, 0], abs=0.03)
    assert shares(0.71) == pytest.approx([0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85, 0], abs=0.03)
    assert shares(1e-6) == [0, 1, 0, 0, 0, 0]
    # A lower temperature gives the likeliest more: 0.81 of all, at 0.2.
    assert shares(0.69, 0.2) == [0, 1, 0, 0, 0, 0]
    plain = draw(logits_BV, top_B, 1.0, rows, index_B)
    top_p_B1 = torch.ones(4000, 1, dtype=torch.float64)
    assert draw(logits_BV, top_B, 1.0, rows, index_B, top_p_B1).equal(plain)
