"""Clients that are no OpenAI SDK: LiteLLM's, and lm-evaluation-harness, in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from selfroute.cloud.client import OpenAICloud
from selfroute.cloud.endpoint import OpenAIConfig
from selfroute.protocol import HELP_CALL
from selfroute.serve.app import Gateway, make_app
from selfroute.serve.config import GatewayConfig
from selfroute.serve.handoff import Pair
from tests.servers import Exchange, Server, event
from tests.serving import MemoryBudget, MemoryRecorder, ScriptedDevice, said, serving

ROOT = Path(__file__).parents[2]
USAGE = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


async def cloud(exchange: Exchange) -> None:
    """Calls the tool that it is given, answers in JSON if asked to, and else says five."""
    if exchange.body.get("tools"):
        function = {"name": "add", "arguments": '{"a":2}'}
        call = {"index": 0, "id": "c1", "type": "function", "function": function}
        await exchange.answer(event("", tool_calls=[call]), event("", "tool_calls"), USAGE)
        return
    text = '{"sum": 5}' if exchange.body.get("response_format") else "five"
    await exchange.answer(event(text[:2]), event(text[2:], "stop"), USAGE)


@pytest.mark.slow
def test_litellm_and_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = Path(os.environ.get("SELFROUTE_CLIENTS", ROOT / ".venv-clients")) / "bin" / "python"
    assert python.exists(), "make clients sets up their environment"
    monkeypatch.setenv("TEST_CLOUD_KEY", "sk-test")
    device, budget = ScriptedDevice(said("hard", HELP_CALL)), MemoryBudget()
    with Server(otherwise=cloud) as upstream:
        config = OpenAIConfig(base_url=upstream.url, model="gpt-4.1", api_key_var="TEST_CLOUD_KEY")
        cloud_client = OpenAICloud(config)
        pair = Pair(device, cloud_client, budget, MemoryRecorder())
        with serving(make_app(Gateway(GatewayConfig(), pair, budget)), cloud_client) as url:
            done = subprocess.run(
                [str(python), str(ROOT / "tests/clients/ask.py"), f"{url}/v1", str(tmp_path)],
                capture_output=True, text=True, timeout=500, cwd=tmp_path,
            )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    got = json.loads(done.stdout.splitlines()[-1])
    refused = got["litellm"].pop("refused")
    assert "known: selfroute" in refused
    assert got["litellm"] == {
        "whole": "five",
        "reasoning": "hard",
        "tokens": 10 + 2 + 110,
        "streamed": "five",
        "streamed_tokens": 10 + 2 + 110,
        "later": "five",
        "called": ["add", {"a": 2}],
        "json": '{"sum": 5}',
    }
    assert got["lm_eval"] == {"accuracy": 0.75, "problems": 4}
    assert not budget.under_way
