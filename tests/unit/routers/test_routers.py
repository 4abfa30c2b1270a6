from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from selfroute.device.hf import HFEngine
from selfroute.errors import DeviceError
from selfroute.evaluate.calibrate import calibrate
from selfroute.protocol import ANSWER_CLOSE, ANSWER_OPEN
from selfroute.routers.agreement import Agreement, DecisionVotes
from selfroute.routers.base import Attempt, Router
from selfroute.routers.classifier import Boosting, Encoder
from selfroute.routers.confidence import Confidence
from selfroute.routers.naive import Naive, UnansweredFirst
from selfroute.routers.probe import Probe, PromptProbe
from selfroute.tasks.addition import problem
from selfroute.tasks.expressions import canonical
from selfroute.types import Response


def response(answer: str | None, tokens: int = 3) -> Response:
    text = "lost" if answer is None else f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"
    return Response(text, tuple(range(tokens)), finished=answer is not None)


def attempt(
    answer: str | None, *others: str | None, confidence: float = 0.5, digits: int = 2, seed: int = 0
) -> Attempt:
    rng = random.Random(seed)
    low = 10 ** (digits - 1)
    made = problem(rng.randint(low, 10 * low - 1), rng.randint(low, 10 * low - 1))
    more = tuple(response(o) for o in others)
    nothing = np.zeros(4, dtype=np.float32)
    return Attempt(made, response(answer), confidence, nothing, nothing, more, more[:1])


def by_length(count: int, seed: int) -> tuple[list[Attempt], list[bool]]:
    """Additions of which the device solves those of up to three digits."""
    rng = random.Random(seed)
    digits = [rng.randint(1, 6) for _ in range(count)]
    return [attempt("1", digits=d, seed=rng.getrandbits(32)) for d in digits], [d <= 3 for d in digits]


def test_chance_among_those_with_an_answer_looks_at_the_response() -> None:
    attempts = [attempt("1", seed=n) for n in range(20)]
    assert UnansweredFirst(0).route(attempts) == Naive(0).route(attempts)
    assert (Naive.prompt_only, UnansweredFirst.prompt_only) == (True, False)


def test_agreement_by_hand() -> None:
    samples = Agreement(canonical, "samples")
    # Three of four agree up to order; confidence 0.5 is worth half a vote.
    [got] = samples.route([attempt("1+2", "2+1", "1*2", "1+2")])
    assert got.score == pytest.approx((4 - 3 + 0.5) / 4)
    assert got.response.text == f"{ANSWER_OPEN}1+2{ANSWER_CLOSE}"
    assert got.device_tokens == 12
    # The majority overrules the first response; a response without an answer has no vote.
    [got] = samples.route([attempt("1*2", "2+1", None, "1+2")])
    assert got.response.text == f"{ANSWER_OPEN}2+1{ANSWER_CLOSE}"
    assert got.score == pytest.approx((4 - 2 + 0.5) / 4)
    # A tie goes to the response that would have stood.
    assert samples.route([attempt("1*2", "2+1")])[0].response.text == f"{ANSWER_OPEN}1*2{ANSWER_CLOSE}"
    # Nobody has an answer: ask.
    [got] = samples.route([attempt(None, None)])
    assert (got.score, got.device_tokens) == (1.0, 6)


def decided(answer: str | None, score: float | None) -> Response:
    return replace(response(answer), score=score)


def test_decision_votes_by_hand() -> None:
    votes = DecisionVotes(canonical)
    made = attempt("1*2")
    # Two doubtful answers that agree (0.2 each) against a sound one (0.8).
    doubtful, sound = decided("1*2", math.log(4)), decided("1+2", -math.log(4))
    [got] = votes.route([replace(made, response=doubtful, samples=(doubtful, sound))])
    assert got.response == sound
    assert got.score == pytest.approx(1 - 0.8 / 3)
    assert got.device_tokens == 9
    # Votes for one answer add up; a response without a decision has none.
    [got] = votes.route([replace(made, response=sound, samples=(decided("2+1", 0.0), decided(None, None)))])
    assert got.score == pytest.approx(1 - 1.3 / 3)
    [got] = votes.route([replace(made, response=decided(None, None), samples=(decided("1", None),))])
    assert got.score == 1.0
    # An l beyond what exp can hold is a vote of nothing.
    [got] = votes.route([replace(made, response=decided("1", 1e6), samples=())])
    assert got.score == pytest.approx(1.0)


def test_prompt_variants_vote_apart_from_samples() -> None:
    [got] = Agreement(canonical, "variants").route([attempt("1+2", "1*2", "1+2")])
    assert got.score == pytest.approx((2 - 1 + 0.5) / 2)
    assert got.device_tokens == 6


def test_confidence_is_one_less_the_mean_probability() -> None:
    assert [r.score for r in Confidence().route([attempt("1", confidence=0.9)])] == [pytest.approx(0.1)]


def test_naive_scores_are_uniform_and_named_by_seed_and_problem() -> None:
    attempts = [attempt("1", seed=s, digits=6) for s in range(2000)]
    scores = [r.score for r in Naive(0).route(attempts)]
    assert scores == [r.score for r in Naive(0).route(attempts)] != [r.score for r in Naive(1).route(attempts)]
    assert abs(np.mean(scores) - 0.5) < 0.02
    assert abs(np.quantile(scores, 0.3) - 0.3) < 0.03


def learners(engine: HFEngine) -> list[Router]:
    return [Boosting(0), Encoder(0, engine.tokenizer)]


@pytest.mark.parametrize("which", [0, 1])
def test_prompt_routers_learn_what_the_prompt_shows(engine: HFEngine, which: int) -> None:
    router = learners(engine)[which]
    router.fit(*by_length(600, 0))
    attempts, correct = by_length(300, 1)
    scores = [r.score for r in router.route(attempts)]
    assert all(0 <= s <= 1 for s in scores)
    assert roc_auc_score([not c for c in correct], scores) > 0.97
    again = learners(engine)[which]
    again.fit(*by_length(600, 0))
    assert [r.score for r in again.route(attempts)] == scores


@pytest.mark.parametrize("which", [0, 1])
def test_prompt_routers_see_the_prompt_alone(engine: HFEngine, which: int) -> None:
    router = learners(engine)[which]
    router.fit(*by_length(200, 0))
    one, other = attempt("1", "1", confidence=0.9), attempt(None, "2", confidence=0.1)
    assert [r.score for r in router.route([one])] == [r.score for r in router.route([other])]


@pytest.mark.parametrize("kind", [Probe, PromptProbe])
def test_a_probe_reads_the_hidden_state(kind: type[Probe]) -> None:
    rng = np.random.default_rng(0)
    attempts, correct = [], []
    for n in range(600):
        state = rng.normal(size=4).astype(np.float32)
        made = attempt("1", seed=n)
        other = rng.normal(size=4).astype(np.float32)
        states = (state, other) if kind is Probe else (other, state)
        attempts.append(Attempt(made.problem, made.response, 0.5, *states))
        correct.append(bool(state[0] + 0.1 * rng.normal() > 0))
    probe = kind()
    probe.fit(attempts[:400], correct[:400])
    scores = [r.score for r in probe.route(attempts[400:])]
    assert all(0 <= s <= 1 for s in scores)
    assert roc_auc_score([not c for c in correct[400:]], scores) > 0.97


@pytest.mark.parametrize("solved", [True, False])
def test_a_device_that_always_or_never_solves_leaves_nothing_to_learn(engine: HFEngine, solved: bool) -> None:
    attempts, _ = by_length(50, 0)
    for router in (*learners(engine), Probe()):
        router.fit(attempts, [solved] * 50)
        scores = [r.score for r in router.route(attempts)]
        assert scores == pytest.approx([float(not solved)] * 50, abs=1e-5)
        assert all(0 <= score <= 1 for score in scores)
        # Equal ones would all stay or all leave, whatever the budget.
        assert calibrate(scores, 0.5, num_problems=50).call_rate > 0.3


def test_a_question_longer_than_an_encoder_reads(tmp_path: Path, engine: HFEngine) -> None:
    """RoBERTa's kind counts positions from behind that of the padding."""
    shape = RobertaConfig(
        vocab_size=len(engine.tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    RobertaForSequenceClassification(shape).save_pretrained(tmp_path / "encoder")
    engine.tokenizer.save_pretrained(tmp_path / "encoder")
    router = Encoder(0, engine.tokenizer, str(tmp_path / "encoder"))
    attempts, _ = by_length(2, 0)
    long = replace(attempts[0], problem=replace(attempts[0].problem, question="1 + 2 " * 500))
    assert len(router._encode([long])[0]) == 64
    assert 0 <= router._probability(router._encode([long]))[0] <= 1


@given(st.lists(st.sampled_from(["1+2", "2+1", "3", None]), min_size=1, max_size=6), st.floats(0.001, 1))
def test_agreement_scores_stay_in_range(answers: list[str | None], confidence: float) -> None:
    [got] = Agreement(canonical, "samples").route([attempt(answers[0], *answers[1:], confidence=confidence)])
    assert 0 <= got.score <= 1


def test_an_encoder_by_name(tmp_path: Path, engine: HFEngine) -> None:
    """Any Hugging Face encoder: here a tiny one in a folder."""
    shape = BertConfig(
        vocab_size=len(engine.tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(shape).save_pretrained(tmp_path / "encoder")
    engine.tokenizer.save_pretrained(tmp_path / "encoder")
    router = Encoder(0, engine.tokenizer, str(tmp_path / "encoder"))
    assert router.model.config.hidden_size == 32
    router.fit(*by_length(60, 0))
    assert all(0 <= r.score <= 1 for r in router.route(by_length(5, 1)[0]))
    with pytest.raises(DeviceError, match="cannot load the encoder 'no/such-encoder'"):
        Encoder(0, engine.tokenizer, "no/such-encoder")


def test_the_papers_kind_of_encoder_loads_and_learns(tmp_path: Path, engine: HFEngine) -> None:
    """DeBERTa-v2/v3 with its SentencePiece vocabulary, tiny, in half precision as hubs keep it; trained in float32."""
    folder = tmp_path / "deberta"
    folder.mkdir()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(a.problem.question for a in by_length(300, 3)[0]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer"}')
    shape = DebertaV2Config(
        vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    DebertaV2ForSequenceClassification(shape).half().save_pretrained(folder)
    router = Encoder(0, engine.tokenizer, str(folder))
    assert {p.dtype for p in router.model.parameters()} == {torch.float32}
    router.fit(*by_length(60, 0))
    scores = [r.score for r in router.route(by_length(5, 1)[0])]
    assert all(0 <= s <= 1 for s in scores)
    assert len(set(scores)) > 1
