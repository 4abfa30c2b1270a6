"""LiteLLM's SDK and lm-evaluation-harness against a gateway: python tests/clients/ask.py URL FOLDER.

Runs in an environment of its own (requirements.txt beside this file) and prints, as JSON, what the two got.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

# Else it asks the network for a list of prices when it is imported, and the hub for data sets.
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "any"}

import litellm
import lm_eval
from lm_eval.tasks import TaskManager

MESSAGES = [{"role": "user", "content": "2+3?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 64, until: ["\\n\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def ask_litellm(url: str) -> dict[str, Any]:
    """One request of each kind."""
    asked: dict[str, Any] = {"model": "openai/selfroute", "api_base": url, "api_key": "any", "messages": MESSAGES}
    whole = litellm.completion(**asked)
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    later = asyncio.run(litellm.acompletion(**asked))
    called = litellm.completion(**asked, tools=TOOLS).choices[0].message.tool_calls[0].function
    as_json = litellm.completion(**asked, response_format={"type": "json_object"})
    try:
        litellm.completion(**{**asked, "model": "openai/nobody"})
        refused = ""
    except litellm.NotFoundError as error:
        refused = str(error)
    return {
        "whole": whole.choices[0].message.content,
        "reasoning": whole.choices[0].message.reasoning_content,
        "tokens": whole.usage.total_tokens,
        "streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
        "streamed_tokens": chunks[-1].usage.total_tokens,
        "later": later.choices[0].message.content,
        "called": [called.name, json.loads(called.arguments)],
        "json": as_json.choices[0].message.content,
        "refused": refused,
    }


def ask_lm_eval(url: str, folder: Path) -> dict[str, Any]:
    """The share of sums that the gateway gets right."""
    rows = [{"question": f"2+{n}?", "answer": "five" if n == 3 else "six"} for n in (3, 3, 4, 3)]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK % json.dumps(str(data)))
    found = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args={"base_url": f"{url}/chat/completions", "model": "selfroute", "num_concurrent": 2, "max_retries": 1},
        tasks=["sums"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    return {
        "accuracy": found["results"]["sums"]["exact_match,none"],
        "problems": found["n-samples"]["sums"]["effective"],
    }


if __name__ == "__main__":
    answer = {"litellm": ask_litellm(sys.argv[1]), "lm_eval": ask_lm_eval(sys.argv[1], Path(sys.argv[2]))}
    print(json.dumps(answer))
