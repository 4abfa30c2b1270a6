"""The gateway as it comes: the shipped model in process, and the oracle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI

from selfroute.tasks.countdown import Countdown, CountdownConfig


def test_the_shipped_pair_answers_asks_and_goes_on_where_the_budget_denies_it(tmp_path: Path) -> None:
    question = Countdown(CountdownConfig()).load("test")[0].question
    command = [sys.executable, "-m", "selfroute", "serve", "port=0", "budget.calls_per_minute=1"]
    process = subprocess.Popen(
        [*command, f"store={tmp_path / 'gateway.sqlite'}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = next(word for word in process.stdout.readline().split() if word.startswith("http"))
        with OpenAI(base_url=url, api_key="any", max_retries=0) as client:

            def ask(model: str, **changes: Any) -> tuple[Any, Any]:
                made = client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": question}], seed=1, extra_body=changes
                )
                return made.choices[0].message, made.selfroute  # type: ignore[attr-defined]

            own, by_itself = ask("selfroute-device")
            handed, by_cloud = ask("selfroute", selfroute={"bias": 50.0})
            denied, again = ask("selfroute", selfroute={"bias": 50.0})
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
    assert (by_itself["route"], by_cloud["route"], again["route"]) == ("device", "cloud", "device")
    assert again["denied"] == "calls_per_minute"
    assert by_itself["score"] is not None
    assert own.content
    assert handed.content
    assert denied.content
    # It reasons in the same way up to where it asks, and goes on from there.
    assert own.reasoning_content == handed.reasoning_content
    assert denied.reasoning_content.startswith(own.reasoning_content)
