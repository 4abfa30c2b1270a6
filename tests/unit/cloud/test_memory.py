from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from tests.clouds import FlakyConfig, FlakyOracle

from selfroute.cloud.memory import Cloud
from selfroute.cloud.oracle import Oracle, OracleConfig
from selfroute.errors import CloudError
from selfroute.protocol import cloud_request
from selfroute.tasks.countdown import Countdown, CountdownConfig
from selfroute.types import CloudRequest

QUESTIONS = [(p.id, cloud_request(p.question)) for p in Countdown(CountdownConfig()).load("test")[:10]]


def flaky(tmp_path: Path, answers_first: int = 0) -> FlakyOracle:
    return FlakyOracle(FlakyConfig(broken=str(tmp_path / "broken"), answers_first=answers_first))


def test_an_answer_is_bought_once_even_after_a_restart(tmp_path: Path) -> None:
    client = flaky(tmp_path)
    cloud = Cloud(client, tmp_path / "cloud.sqlite")
    first = cloud.ask(QUESTIONS, phase="train", step=1)
    assert cloud.ask([*QUESTIONS, *QUESTIONS], phase="train", step=2) == first + first
    cloud.close()
    again = Cloud(client, tmp_path / "cloud.sqlite")
    assert again.ask(QUESTIONS, phase="evaluate") == first
    assert len(client.asked) == 10
    assert again.spent().calls == 10
    assert again.spent().cost_usd == pytest.approx(sum(a.cost_usd for a in first))
    assert again.spent("evaluate").calls == 0
    again.close()


class Frugal(FlakyOracle):
    """Remembers what it is told was spent before."""

    def carry(self, spent_usd: float) -> None:
        self.carried = spent_usd


def test_runs_that_share_a_file_count_their_own_calls_and_pay_once(tmp_path: Path) -> None:
    first, second = (Cloud(flaky(tmp_path), tmp_path / "cloud.sqlite", stage=stage) for stage in ("1-a", "2-b"))
    answers = first.ask(QUESTIONS[:6], phase="train", step=1)
    assert second.ask(QUESTIONS[:6], phase="train", step=1) == answers
    second.ask(QUESTIONS[6:], phase="train", step=1)
    assert (first.spent("train").calls, second.spent("train").calls) == (6, 4)
    assert first.spent().calls == second.spent().calls == 10
    # What both have spent counts towards a limit.
    client = Frugal(FlakyConfig())
    third = Cloud(client, tmp_path / "cloud.sqlite", stage="3-c")
    assert client.carried == pytest.approx(third.spent().cost_usd) != 0
    for cloud in (first, second, third):
        cloud.close()


def test_two_of_the_same_at_once_are_one_call(tmp_path: Path) -> None:
    client = flaky(tmp_path)
    cloud = Cloud(client, tmp_path / "cloud.sqlite")
    answers = cloud.ask([QUESTIONS[0], QUESTIONS[0], QUESTIONS[1]], phase="train")
    assert answers[0] == answers[1]
    assert len(client.asked) == 2
    cloud.close()


def test_what_came_before_a_failure_is_kept_and_not_paid_again(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    client = flaky(tmp_path, answers_first=4)
    cloud = Cloud(client, tmp_path / "cloud.sqlite")
    with pytest.raises(
        CloudError, match=r"6 of 10 cloud requests failed or were not sent: connection refused \(answers that came"
    ):
        cloud.ask(QUESTIONS, phase="train", step=3)
    assert cloud.spent("train").calls == 4
    (tmp_path / "broken").unlink()
    assert len(cloud.ask(QUESTIONS, phase="train", step=3)) == 10
    assert cloud.spent("train").calls == 10
    # The fifth failed, and the others were not sent.
    assert len(client.asked) == 5 + 6
    cloud.close()


def test_after_a_failure_nothing_more_is_sent(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    client = flaky(tmp_path)
    cloud = Cloud(client, tmp_path / "cloud.sqlite")
    many = [(f"{n}", CloudRequest(messages=({"role": "user", "content": f"{n}"},))) for n in range(200)]
    with pytest.raises(CloudError, match="200 of 200"):
        cloud.ask(many, phase="train")
    assert len(client.asked) <= client.concurrency
    cloud.close()


def test_the_key_covers_all_that_affects_an_answer(tmp_path: Path) -> None:
    cloud = Cloud(Oracle(OracleConfig()), tmp_path / "cloud.sqlite")
    other = Cloud(Oracle(OracleConfig(accuracy=0.7)), tmp_path / "cloud.sqlite")
    request = QUESTIONS[0][1]
    variants = [
        CloudRequest(request.messages, max_tokens=1),
        CloudRequest(request.messages, temperature=0.5),
        CloudRequest(request.messages, sample_index=1),
        CloudRequest(request.messages[1:]),
    ]
    keys = {cloud.key(request), other.key(request), *map(cloud.key, variants)}
    assert len(keys) == 6
    cloud.close()
    other.close()


def test_the_ledger_counts_up_to_a_step(tmp_path: Path) -> None:
    cloud = Cloud(Oracle(OracleConfig()), tmp_path / "cloud.sqlite")
    for step, question in enumerate(QUESTIONS, 1):
        cloud.ask([question], phase="train", step=step)
    assert cloud.spent("train", until_step=4).calls == 4
    assert cloud.spent("train", until_step=99).calls == 10
    cloud.close()


def test_a_damaged_store_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cloud.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(CloudError, match="cannot open"):
        Cloud(Oracle(OracleConfig()), path)
    path.unlink()
    cloud = Cloud(Oracle(OracleConfig()), path)
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE calls")
    with pytest.raises(CloudError, match="cannot write"):
        cloud.ask(QUESTIONS[:1], phase="train")
    with pytest.raises(CloudError, match="cannot read"):
        cloud.spent("train")
    cloud.close()
