from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from selfroute.errors import DeviceError
from selfroute.protocol import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    HELP_CALL,
    HELP_OPEN,
    INSTRUCTION,
    boundaries,
    cloud_request,
    decision_points,
    find_decision,
    last_boundary,
    parse,
    reasoning_of,
)
from selfroute.train.warmstart import train_tokenizer
from selfroute.types import Answer, HelpCall, Undecided


@pytest.mark.parametrize(
    ("text", "decision"),
    [
        ("<answer>1+2</answer>", Answer("1+2", True)),
        ("so\n<answer> 1+2 </answer>\n", Answer("1+2", True)),
        ("<answer>1+2", Answer("1+2", False)),
        ("<answer>1+2</answer> done", Answer("1+2", False)),
        ("<answer>1</answer><answer>2</answer>", Answer("2", False)),
        ("<answer></answer>", Undecided()),
        ("<answer>  ", Undecided()),
        ("", Undecided()),
        ("just thinking", Undecided()),
        (HELP_CALL, HelpCall()),
        (f"hard.\n{HELP_CALL}\n ", HelpCall()),
        ("<unknown>I need external assistance</unknown>", HelpCall()),
        (f"{HELP_CALL} or not", Undecided()),
        # A model's own thinking that never ended.
        (f"<think>{HELP_CALL}", Undecided()),
        ("<think>so\n<answer>4</answer>", Undecided()),
        (f"the tag `{HELP_CALL}` asks", Undecided()),
        (f"<answer>1</answer> {HELP_CALL}", HelpCall()),
        (f"{HELP_CALL} no: <answer>1</answer>", Answer("1", True)),
        ("<unknown> I need external help </unknown>", Undecided()),
        (f'"{HELP_CALL}"', Undecided()),
        ("x" * 10_000 + HELP_CALL, HelpCall()),
    ],
)
def test_parse(text: str, decision: object) -> None:
    assert parse(text) == decision


def test_a_cut_response_has_not_decided() -> None:
    assert parse("<answer>1+2</answer>", finished=False) == Undecided()
    assert parse(HELP_CALL, finished=False) == Undecided()


PIECES = st.lists(st.sampled_from([HELP_CALL, ANSWER_OPEN, ANSWER_CLOSE, "1+2", " ", "\n", "<", "unknown>", "é"]))


@given(PIECES.map("".join) | st.text())
def test_parse_is_total_and_a_help_call_ends_the_text(text: str) -> None:
    decision = parse(text)
    if isinstance(decision, HelpCall):
        assert text.rstrip().endswith("</unknown>")
    if isinstance(decision, Answer):
        assert decision.text
        assert decision.text in text


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_level(merged: list[str], split: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE that has learned to merge `merged`."""
    tokenizer = Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.pre_tokenizer = byte
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(merged * 5, trainer)
    return fast(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """A SentencePiece-like unigram tokenizer, as Gemma's and Llama 2's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = sorted(set(INSTRUCTION + "x\n.:()0123456789+-*/=?!"))
    trainer = trainers.UnigramTrainer(
        vocab_size=160, unk_token="<unk>", special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([INSTRUCTION, "I think. x\n x. x: x) 1+2=3?"] * 20, trainer)
    return fast(tokenizer)


def characters() -> PreTrainedTokenizerFast:
    """One token a character."""
    alphabet = sorted(set(INSTRUCTION + "x\n.:()0123456789+-*/=?!"))
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return fast(tokenizer)


def whole_tags() -> PreTrainedTokenizerFast:
    """Both tags are single added tokens."""
    tokenizer = train_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (HELP_CALL, ANSWER_OPEN)])
    return tokenizer


TOKENIZERS = {
    "shipped": train_tokenizer,
    "bytes only": lambda: byte_level(["zz"], split=False),
    "one tag merged": lambda: byte_level(["<unknown> I need external assistance </unknown>"], split=True),
    "answer merged": lambda: byte_level(["<answer>"], split=False),
    "merges across the border": lambda: byte_level([".<", "\n<", "?\n<"], split=False),
    "sentencepiece": metaspace,
    "characters": characters,
    "whole tags": whole_tags,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("border", ["\n", "", " ", ".", "?\n"])
@pytest.mark.parametrize("tag", [HELP_CALL, f"{ANSWER_OPEN}1+2{ANSWER_CLOSE}"])
def test_the_decision_point_is_where_the_tags_part(name: str, border: str, tag: str) -> None:
    tokenizer = TOKENIZERS[name]()
    before = "1+2=3" + border
    ids = tokenizer.encode(before + tag, add_special_tokens=False)
    points = decision_points(tokenizer)
    found = find_decision(ids, points, tokenizer)
    assert found is not None
    index, point = found
    # The canonical tokens of the two tags agree up to the decision and differ there.
    other = HELP_CALL if tag != HELP_CALL else ANSWER_OPEN
    other_ids = tokenizer.encode(before + other, add_special_tokens=False)
    assert ids[:index] == other_ids[:index]
    assert ids[index] != other_ids[index]
    assert {ids[index], other_ids[index]} == {point.help, point.answer}
    assert (ids[index] == point.help) == (tag == HELP_CALL)


def test_tags_share_their_bracket_in_the_shipped_tokenizer() -> None:
    tokenizer = train_tokenizer()
    [point] = decision_points(tokenizer)
    assert [tokenizer.decode([t]) for t in (*point.prefix, point.help, point.answer)] == ["<", "unknown", "answer"]


def test_the_last_decision_counts_and_a_missing_one_is_none() -> None:
    tokenizer = train_tokenizer()
    points = decision_points(tokenizer)
    text = f"the tag {HELP_CALL} asks\n<answer>1+2</answer>"
    ids = tokenizer.encode(text)
    found = find_decision(ids, points, tokenizer)
    assert found is not None
    assert ids[found[0]] == found[1].answer
    assert find_decision(tokenizer.encode("1+2=3?"), points, tokenizer) is None
    assert find_decision([], points, tokenizer) is None


def test_the_decision_is_the_one_that_parse_goes_by() -> None:
    tokenizer = train_tokenizer()
    points = decision_points(tokenizer)
    quoted = "<answer>1+2</answer> <unknown> maybe"
    assert parse(quoted) == Answer("1+2", well_formed=False)
    ids = tokenizer.encode(quoted)
    found = find_decision(ids, points, tokenizer)
    assert found is not None
    assert ids[found[0]] == found[1].answer
    # A help tag that no help call follows decides nothing.
    assert find_decision(tokenizer.encode("<unknown> maybe"), points, tokenizer) is None


def test_a_tokenizer_without_the_tags_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DeviceError, match="cannot tell"):
        decision_points(fast(tokenizer))


def test_boundaries_are_past_each_line_break() -> None:
    tokenizer = train_tokenizer()
    ids = tokenizer.encode("1:1+2=3,3+4=7?\n2:1+2=3!\n3")
    heads = [tokenizer.decode(ids[:place]) for place in boundaries(ids, tokenizer)]
    assert heads == ["1:1+2=3,3+4=7?\n", "1:1+2=3,3+4=7?\n2:1+2=3!\n"]
    assert boundaries([], tokenizer) == []


@given(st.text(max_size=60), st.sampled_from(["", HELP_CALL, f"a {HELP_OPEN} b"]))
def test_reasoning_that_is_handed_over_holds_no_help_tag(text: str, end: str) -> None:
    reasoning = reasoning_of(text + end)
    assert HELP_OPEN not in reasoning
    assert (text + end).lstrip().startswith(reasoning)
    # The question stands first, as it is.
    content = cloud_request("What is 1+1?", reasoning).messages[-1]["content"]
    assert content.startswith("What is 1+1?")
    assert content.endswith(reasoning)
    assert (content == "What is 1+1?") == (reasoning == "")


def test_last_boundary_is_past_the_last_line_break() -> None:
    tokenizer = train_tokenizer()
    ids = tokenizer.encode("1:1+2=3,3+4=7?\n2:1+")
    assert tokenizer.decode(ids[: last_boundary(ids, tokenizer)]) == "1:1+2=3,3+4=7?\n"
    assert last_boundary(tokenizer.encode("1:1+2"), tokenizer) == 0
