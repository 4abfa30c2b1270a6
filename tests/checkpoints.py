"""Tiny checkpoints of the architectures that people post-train, each with a tokenizer and a chat template of its own.

The weights are random, or taught the tags for a moment (`teach`), so that they answer or ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from selfroute.device.hf import HFEngine
from selfroute.protocol import HELP_CALL, chat
from selfroute.types import Problem

SHAPE: Mapping[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
"""What the architectures share."""

LLAMA_3_2 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

_EACH = "{%- for message in messages %}"

QWEN2 = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    + _EACH
    + "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN3 = (
    _EACH + "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
SMOLLM3 = (
    "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}"
    "{{- '<|im_start|>system\\n## Metadata\\n\\nToday Date: ' + strftime_now('%d %B %Y') + '\\nReasoning Mode: ' }}"
    "{{- '/think' if enable_thinking else '/no_think' }}{{- '\\n\\n## Custom Instructions\\n\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}{{- '<|im_end|>\\n' }}"
    + _EACH
    + "{%- if message.role != 'system' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if not enable_thinking %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' }}"
    "{{- date_string + '\\n\\n' }}"
    "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{%- set messages = messages[1:] %}"
    "{%- endif %}{{- '<|eot_id|>' }}"
    + _EACH
    + "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Family:
    """What sets a family of checkpoints apart.

    `ends` are the tokens that end a response, as its generation config names them; `eos` is the tokenizer's.
    """

    template: str
    specials: tuple[str, ...]
    eos: str
    ends: tuple[str, ...]
    pad: str | None
    bos: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN = (_IM, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), "<|endoftext|>")

FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(QWEN2, *_QWEN),
    "qwen3": Family(QWEN3, *_QWEN),
    # Its tokenizer has no padding token.
    "llama": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        ("<|end_of_text|>", "<|eot_id|>"),
        None,
        "<|begin_of_text|>",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA_3_2},
    ),
    # Prompts are longer than the window.
    "gemma3_text": Family(
        GEMMA,
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        ("<eos>", "<end_of_turn>"),
        "<pad>",
        "<bos>",
        {"sliding_window": 24, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "smollm3": Family(SMOLLM3, _IM, "<|im_end|>", ("<|im_end|>",), "<|im_end|>"),
    "phi": Family(QWEN2, _IM, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), "<|endoftext|>"),
    "phi3": Family(
        PHI3,
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        ("<|endoftext|>", "<|end|>"),
        "<|endoftext|>",
    ),
}
"""By transformers' name of the architecture."""


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 800 tokens, trained on this project's own prose."""
    family = FAMILIES[kind]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(
        (Path(__file__).parents[1] / "docs" / "method.md").read_text(encoding="utf-8").splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=800,
            special_tokens=list(family.specials),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        eos_token=family.eos,
        bos_token=family.bos,
        pad_token=family.pad,
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )


def random_model(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of random weights, the same each time, for the tokenizer of its family."""
    words = tokenizer(kind)
    ends = [words.convert_tokens_to_ids(end) for end in FAMILIES[kind].ends]
    tokens = {"vocab_size": len(words), "eos_token_id": ends[0], "pad_token_id": words.pad_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, **{**SHAPE, **tokens, "bos_token_id": words.bos_token_id, **FAMILIES[kind].settings}
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = words.pad_token_id
    return model


def engine_of(kind: str, dtype: torch.dtype = torch.float32) -> HFEngine:
    """A random model with its tokenizer."""
    return HFEngine(random_model(kind, dtype), tokenizer(kind))


def teach(engine: HFEngine, problems: Sequence[Problem], answers: Sequence[str]) -> None:
    """A moment of plain cross-entropy: to each problem its answer or a help call, in turns, and the end token."""
    end = engine.tokenizer.convert_tokens_to_ids(engine.tokenizer.eos_token)
    rows = []
    for problem, answer in zip(problems, answers, strict=True):
        for text in (f"So\n<answer>{answer}</answer>", f"So\n{HELP_CALL}"):
            response = engine.tokenizer.encode(text, add_special_tokens=False)
            rows.append((engine.encode(chat(problem.question)), [*response, end]))
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), width), engine.pad)
    labels = torch.full((len(rows), width), -100)
    for n, (prompt, response) in enumerate(rows):
        ids[n, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        labels[n, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(200):
        logits = engine.model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(engine.model.parameters(), 1.0)
        optimizer.step()
        # Little more is left than the toss between the two, which nothing tells of.
        if loss.item() < 0.07:
            break
