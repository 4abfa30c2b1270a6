"""The shares that a step reports, and the signals that end a run."""

from __future__ import annotations

import math
import os
import signal

import pytest

from selfroute.train.plan import Judged
from selfroute.train.progress import shares, stop_signals
from selfroute.types import Answer, HelpCall, Response, Undecided


def response(score: float | None) -> Response:
    return Response("", (), True, score, None if score is None else 0)


def test_the_shares_of_a_step_by_hand() -> None:
    one = Judged([response(0.0), response(math.log(3))], [HelpCall(), Answer("1", True)], [False, True], [0.0, 1.0])
    two = Judged([response(-math.log(3)), response(None)], [Answer("2", True), Undecided()], [False, False], [0.0, 0.0])
    found = shares([one, two])
    # Of three decisions, asking has the probabilities 1/2, 3/4 and 1/4; the cut response made none.
    assert found == {
        "local_accuracy": 0.25, "help": 0.25, "asking": pytest.approx(0.5), "wrong": 0.25, "undecided": 0.25,
    }  # fmt: skip


def test_a_lopsided_decision_certain_ones_and_none() -> None:
    # Odds of 3 to 1 alone, which no other one levels out.
    assert shares([Judged([response(math.log(3))], [HelpCall()], [False], [0.0])])["asking"] == pytest.approx(0.75)
    assert shares([Judged([response(800.0)], [HelpCall()], [False], [0.0])])["asking"] == 1.0
    assert shares([Judged([response(None)], [Undecided()], [False], [0.0])])["asking"] == 0.0


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_and_the_second_does_not(first: signal.Signals, second: signal.Signals) -> None:
    def kill(number: int, frame: object) -> None:
        raise ProcessLookupError

    before = {number: signal.signal(number, kill) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), first)
            assert stop.wait(5)
            with pytest.raises(ProcessLookupError):
                os.kill(os.getpid(), second)
        assert signal.getsignal(first) is kill
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
