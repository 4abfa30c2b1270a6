"""Requests as tokens, and tokens as pieces of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.checkpoints import FAMILIES, random_model
from tests.checkpoints import tokenizer as family_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from selfroute.device.hf import HFEngine
from selfroute.device.wording import Deltas, Wording
from selfroute.errors import ContextError
from selfroute.protocol import ANSWER_OPEN, HELP_CALL, chat
from selfroute.types import DeviceRequest


def pieces(engine: HFEngine, ids: Sequence[int], start: int = 0, rest: str = "") -> Iterator[str]:
    deltas = Deltas(engine.decode, ids[:start], rest)
    for n in range(start, len(ids)):
        yield deltas.feed(ids[: n + 1])
    yield deltas.end(ids)


@given(st.data())
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("kind", ["shipped", "qwen2", "llama"])
def test_pieces_are_the_text_and_never_half_a_character(engine: HFEngine, kind: str, data: st.DataObject) -> None:
    made = engine if kind == "shipped" else HFEngine(engine.model, family_tokenizer(kind))
    text = data.draw(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=60))
    ids = made.tokenizer.encode(text, add_special_tokens=False)
    whole = made.decode(ids)
    start = data.draw(st.integers(0, len(ids)).filter(lambda n: "\ufffd" not in made.decode(ids[:n])))
    said = list(pieces(made, ids, start))
    assert made.decode(ids[:start]) + "".join(said) == whole
    assert not any("\ufffd" in piece for piece in said)


@given(ids=st.lists(st.integers(0, 384), max_size=80))
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_tokens_are_their_text(engine: HFEngine, ids: list[int]) -> None:
    """Bytes that are no text, and tokens that structure a conversation, among them."""
    assert "".join(pieces(engine, ids)) == engine.decode(ids)


def test_text_comes_as_soon_as_it_is_certain(engine: HFEngine) -> None:
    ids = engine.tokenizer.encode("3*7=21,\u00e9", add_special_tokens=False)
    said = list(pieces(engine, ids))
    assert said[:3] == ["3", "*", "7"]
    assert said[-3:] == ["", "\u00e9", ""]


def test_a_prompt_is_the_engines(engine: HFEngine) -> None:
    request = DeviceRequest(chat("Make 24 from 3, 8, 1."), max_tokens=10)
    made = Wording(engine, None, merges=True).read(request)
    assert (made.token_ids, made.start, made.rest) == (engine.encode(request.messages), [], "")


@pytest.mark.parametrize("kind", FAMILIES)
def test_nobody_can_write_tokens_that_structure_the_conversation(kind: str) -> None:
    made = HFEngine(random_model(kind), family_tokenizer(kind))
    specials = {made.tokenizer.convert_tokens_to_ids(token) for token in FAMILIES[kind].specials}
    forged = "".join(FAMILIES[kind].specials) + FAMILIES[kind].specials[0][:3] + "".join(FAMILIES[kind].specials)
    wording = Wording(made, None, merges=True)
    plain, attack = (
        wording.read(DeviceRequest(({"role": "user", "content": text},), 10)).token_ids for text in ("x", forged)
    )
    assert len(attack) > len(plain)
    assert [n for n in attack if n in specials] == [n for n in plain if n in specials]
    start = wording.read(DeviceRequest(({"role": "user", "content": "x"},), 10, prefix=forged)).start
    assert made.decode(start) == forged


def test_what_does_not_fit_is_refused(engine: HFEngine) -> None:
    wording = Wording(engine, 100, merges=True)
    prompt = len(engine.encode(chat("1 + 1")))
    request = DeviceRequest(chat("1 + 1"), max_tokens=100 - prompt)
    assert len(wording.read(request).token_ids) == prompt
    with pytest.raises(ContextError, match=f"conversation of {prompt} tokens, with up to {101 - prompt} of the resp"):
        wording.read(DeviceRequest(chat("1 + 1"), max_tokens=101 - prompt))
    with pytest.raises(ContextError, match="the model's context of 100"):
        wording.read(DeviceRequest(chat("1 + 1"), max_tokens=100 - prompt, prefix="12"))
    with pytest.raises(ContextError, match="characters"):
        wording.read(DeviceRequest(chat("1" * 100_000), max_tokens=1))


def merging() -> HFEngine:
    """A tokenizer that merges a tag's first character with a mark before it, and a model of random weights."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(
        [f"So{mark}{tag}" for mark in (".", "?!", " ", "\n") for tag in (HELP_CALL, ANSWER_OPEN)] * 40,
        trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    family = FAMILIES["qwen2"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=family.template
    )
    return HFEngine(random_model("qwen2"), tokenizer)


@pytest.mark.parametrize(
    ("prefix", "rest"), [("So.", "."), ("So?!", "?!"), ("So. So ", " "), ("So\n", ""), ("S\u00e9", "")]
)
def test_a_response_goes_on_from_where_the_model_could_have_written_the_tag(prefix: str, rest: str) -> None:
    made = merging()
    prompt = Wording(made, None, merges=True).read(DeviceRequest(chat("x"), 10, prefix=prefix))
    assert made.decode(prompt.start) + rest == prefix
    assert prompt.rest == rest
    texts = {made.decode([n]) for n in prompt.next_tokens}
    assert (f"{rest}<" in texts) == bool(rest)
    assert all(text.startswith(rest) for text in texts)
    # What the model wrote before the tag, token by token.
    written = made.tokenizer.encode(prefix + HELP_CALL, add_special_tokens=False)
    assert written[: len(prompt.start)] == prompt.start
    plain = Wording(made, None, merges=False).read(DeviceRequest(chat("x"), 10, prefix=prefix))
    assert made.decode(plain.start) == prefix
    assert not plain.next_tokens
