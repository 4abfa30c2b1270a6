"""Tiny random models of the architectures that people post-train: the engine against transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.checkpoints import FAMILIES, engine_of, tokenizer
from tests.gradients import assert_the_gradient_of_whole_sequences

from selfroute.device import prefix
from selfroute.device.base import DeviceConfig, Sampling
from selfroute.device.hf import HFEngine
from selfroute.device.prefix import SAVED_TOKENS, SharedPrompts, pad_left
from selfroute.protocol import ANSWER_OPEN, HELP_CALL, INSTRUCTION, chat, find_decision
from selfroute.train.checkpoint import load_checkpoint, save_checkpoint
from selfroute.train.optimizer import MasterAdamW

# Gemma's norms compute in single precision whatever the weights are.
TOLERANCE = {"gemma3_text": 1e-5}


def prompts(engine: HFEngine) -> list[list[int]]:
    return [engine.encode([{"role": "user", "content": "x" * n}]) for n in (3, 25, 60)]


def test_groups_decode_as_transformers_does(tiny: HFEngine) -> None:
    asked = prompts(tiny)
    groups = tiny.generate(asked, [["a", "b"]] * 3, Sampling(temperature=0, max_tokens=40))
    for prompt, (one, two) in zip(asked, groups, strict=True):
        alone = tiny.model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)  # type: ignore[operator]
        expected = alone[0, len(prompt) :].tolist()
        assert list(one.token_ids) == expected[: len(one.token_ids)]
        assert one.finished or len(one.token_ids) == len(expected) == 40
        assert one == two


@pytest.fixture(params=[SAVED_TOKENS, 1], ids=["apart", "common"])
def beginnings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether what prompts begin with runs once for all of them; so few would not be worth it."""
    monkeypatch.setattr(prefix, "SAVED_TOKENS", request.param)
    return request.param == 1


def test_prompts_padded_on_the_left_have_the_logits_that_each_has_alone(
    tiny: HFEngine, kind: str, beginnings: bool
) -> None:
    asked, rows = prompts(tiny), [[5, 9, 30, 31], [7] * 6, [40]]
    _, mask = pad_left(asked, tiny.pad, tiny.model.device)
    assert not mask.all()
    with torch.no_grad():
        shared = SharedPrompts(tiny.model, asked, tiny.pad)
        # A window would count the padding behind the beginning.
        assert (shared.common > 0) == (beginnings and kind != "gemma3_text")
        assert shared.common < min(map(len, asked)) - 1
        together_BTV, _, _ = shared.logits(range(3), rows)
        for b, (prompt, row) in enumerate(zip(asked, rows, strict=True)):
            alone_TV = tiny.model(torch.tensor([[*prompt, *row]])).logits[0, len(prompt) - 1 : -1]
            close = TOLERANCE.get(kind, 1e-10)
            assert torch.allclose(together_BTV[b, : len(row)], alone_TV, rtol=0, atol=close)


def test_each_of_its_end_tokens_ends_a_response(tiny: HFEngine, kind: str) -> None:
    named = {tokenizer(kind).convert_tokens_to_ids(end) for end in FAMILIES[kind].ends}
    assert tiny.end_tokens == named
    # A model that draws each of some 800 tokens about as often.
    with torch.no_grad():
        for weight in tiny.model.parameters():
            weight.mul_(0.1)
    streams = [[str(n) for n in range(512)]]
    [group] = tiny.generate(prompts(tiny)[:1], streams, Sampling(max_tokens=20))
    seen = {r.token_ids[-1] for r in group if r.finished}
    assert seen == named
    for r in group:
        assert named.isdisjoint(r.token_ids[:-1])
        assert r.finished == (r.token_ids[-1] in named)
        assert not any(end in r.text for end in FAMILIES[kind].ends)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    engine = engine_of("llama")

    def tied(model: torch.nn.Module) -> bool:
        inside, outside = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
        return inside.weight is outside.weight

    assert tied(engine.model)
    optimizer = MasterAdamW([p for p in engine.model.parameters() if p.requires_grad], lr=1e-2)
    before = engine.model.get_input_embeddings().weight.detach().clone()
    engine.model(torch.tensor([[5, 9, 30]])).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    assert tied(engine.model)
    assert not torch.equal(engine.model.get_output_embeddings().weight, before)
    saved = save_checkpoint(tmp_path, 1, engine.model, engine.tokenizer, optimizer, {}, keep=1)
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")
    loaded = HFEngine.load(DeviceConfig(model=str(saved)))
    assert tied(loaded.model)
    assert torch.equal(loaded.model.get_output_embeddings().weight, engine.model.get_output_embeddings().weight)
    load_checkpoint(saved, MasterAdamW([p for p in loaded.model.parameters() if p.requires_grad], lr=1e-2))


def test_tags_of_several_tokens_have_a_decision_point(tiny: HFEngine) -> None:
    for text in ("So\n<answer>3</answer>", f"So\n{HELP_CALL}", f"So. {HELP_CALL}"):
        ids = tiny.tokenizer.encode(text, add_special_tokens=False)
        found = find_decision(ids, tiny.points, tiny.tokenizer)
        assert found is not None
        index, point = found
        assert point.ends(ids[:index])
        assert ids[index] == (point.answer if ANSWER_OPEN in text else point.help)
    for tag in (ANSWER_OPEN, "<unknown>"):
        assert len(tiny.tokenizer.encode(tag, add_special_tokens=False)) >= 3


def test_templates_offer_the_choice_and_a_turn_without_thought(tiny: HFEngine, kind: str) -> None:
    text = tiny.tokenizer.decode(tiny.encode(chat("1 + 1")))
    assert text.count(INSTRUCTION) == 1
    assert text.index(INSTRUCTION) < text.index("1 + 1")
    # Whatever the day is.
    assert ("Today Date: 26 Jul" in text) == (kind in ("llama", "smollm3"))
    thinks = kind in ("qwen3", "smollm3")
    assert ("<think>\n\n</think>" in text) == thinks
    loud = HFEngine(tiny.model, tiny.tokenizer, thinking=True)
    assert "<think>" not in loud.tokenizer.decode(loud.encode(chat("1 + 1")))


@pytest.mark.parametrize("recompute", [False, True])
def test_shared_prompts_have_the_gradient_of_whole_sequences(
    tiny: HFEngine, kind: str, beginnings: bool, recompute: bool
) -> None:
    rows = [[5, 9, 30, 31, 2], [7] * 20, [40, 41]]
    # Norms have a gradient in single precision; that of a common beginning goes through them as a sum.
    close = max(TOLERANCE.get(kind, 1e-10), 1e-7 if beginnings else 0)
    assert_the_gradient_of_whole_sequences(tiny.model, prompts(tiny), rows, tiny.pad, close=close, recompute=recompute)


def test_prompts_that_are_the_same_or_the_beginning_of_another_keep_a_token_of_their_own(
    tiny: HFEngine, beginnings: bool
) -> None:
    short, _, long = prompts(tiny)
    for asked in ([long] * 3, [short[:9], [*short[:9], 5], [*short[:9], 7, 8]], [[4, 5], [4, 6]], [[4], [4, 5, 6]]):
        rows = [[5, 9, 30]] * len(asked)
        with torch.no_grad():
            together_BTV, _, _ = SharedPrompts(tiny.model, asked, tiny.pad).logits(range(len(asked)), rows)
            for b, prompt in enumerate(asked):
                alone_TV = tiny.model(torch.tensor([[*prompt, *rows[b]]])).logits[0, len(prompt) - 1 : -1]
                assert torch.allclose(together_BTV[b], alone_TV, rtol=0, atol=1e-5)


def test_gradient_checkpointing_keeps_less(tiny: HFEngine) -> None:
    kept = {}
    for recompute in (False, True):
        sizes: list[int] = []

        def note(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            shared = SharedPrompts(tiny.model, prompts(tiny), tiny.pad, recompute=recompute)
            shared.logits(range(3), [[7] * 60] * 3)
        kept[recompute] = sum(sizes)
    assert kept[True] < kept[False] / 2
