"""What a batch teaches, where it may ask early and where tokens have a price."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_protocol import byte_level
from tests.unit.train.test_loop import config, metrics, trainer

from selfroute.config import Choice
from selfroute.device.hf import HFEngine
from selfroute.errors import ConfigError
from selfroute.protocol import HELP_CALL, decision_points
from selfroute.tasks.countdown import Countdown, CountdownConfig
from selfroute.tasks.judge import Judge, JudgeConfig
from selfroute.train.loop import train
from selfroute.train.plan import Judged, Plan, Planner
from selfroute.train.ranks import Ranks
from selfroute.train.rows import Row
from selfroute.types import Problem, Response, Verdict

ALPHAS = {"answer": 1.0, "cloud": 0.25, "format": 0.02}
EARLY: dict[str, Any] = {"sampling": {"max_tokens": 120, "early_exit": True}, "reward": {**ALPHAS, "token_cost": 0.001}}
ONE, TWO, THREE = "1:20-6=14,14-2=12?\n", "2:20+6=26,26+2=28?\n", "3:6/2=3,3+20=23!\n"
RIGHT, WRONG = "<answer>6/2+20</answer>", "<answer>20-6-2</answer>"
TASK = Countdown(CountdownConfig())
PROBLEM = TASK.read("numbers 2, 6, 20; target 23")


class RightCloud:
    """A cloud that is right, in place of `Cloud`."""

    def ask(self, questions: Any, *, phase: str, step: int) -> list[Response]:
        return [Response("<answer>6/2+20</answer>", (), True) for _ in questions]


class Rehearsal:
    """Plans made of responses written by hand."""

    def __init__(self, engine: HFEngine, **changes: Any) -> None:
        self.engine = engine
        made = config(**{**EARLY, **changes})
        self.planner = Planner(made, TASK, engine.tokenizer, engine.points, RightCloud(), Ranks())  # type: ignore[arg-type]

    def judged(self, *texts: str) -> Judged:
        """Each text is a response, with its end token unless it is cut (`...` at its end)."""
        responses = []
        for text in texts:
            said = text.removesuffix("...")
            ids = self.engine.tokenizer.encode(said, add_special_tokens=False)
            end = [] if text != said else [min(self.engine.end_tokens)]
            responses.append(Response(said, (*ids, *end), text == said))
        [judged] = self.planner.judge([PROBLEM], [responses])
        return judged

    def early(self, *texts: str, step: int = 1) -> list[tuple[str, str, Row] | None]:
        """For each response, the text before its early exit, the asking behind it, and the row."""
        judged = self.judged(*texts)
        plan = self.planner.plan(step, [PROBLEM], [judged])
        found: list[tuple[str, str, Row] | None] = []
        for g in range(len(texts)):
            row = self.planner.early(plan, 0, g)
            decode = self.engine.tokenizer.decode
            found.append(
                row and (decode(list(row.token_ids[: row.boundary])), decode(list(row.token_ids[row.boundary :])), row)
            )
        return found


def test_a_response_could_have_asked_at_the_line_breaks_before_its_last(engine: HFEngine) -> None:
    made = Rehearsal(engine)
    texts = [ONE + TWO + THREE + RIGHT, ONE + TWO + HELP_CALL, ONE + WRONG, ONE + TWO + "3:20..."]
    seen: list[Counter[str]] = [Counter() for _ in texts]
    for step in range(60):
        for g, found in enumerate(made.early(*texts, step=step)):
            if found:
                before, asks, row = found
                seen[g][before] += 1
                assert (asks, row.advantage, row.decision_index) == ("<unknown", 0.0, len(row.token_ids) - 1)
    # The last line break is where it decided, or the decision of a cut one; of several, each is drawn as often.
    assert set(seen[0]) == {ONE, ONE + TWO}
    assert min(seen[0].values()) > 18
    assert seen[1] == seen[3] == Counter({ONE: 60})
    assert not seen[2]


def test_what_an_early_exit_weighs(engine: HFEngine) -> None:
    made = Rehearsal(engine)
    texts = [ONE + TWO + THREE + RIGHT, ONE + TWO + WRONG, ONE + RIGHT]
    tokens = [len(r.token_ids) for r in made.judged(*texts).responses]
    first, second, third = made.early(*texts)
    assert first
    assert second
    # Two places and one, which are one and a half on average.
    place = len(first[2].token_ids) - 2
    help_call = len(engine.tokenizer.encode(HELP_CALL)) + 1
    # No verdict was needed, so the cloud counts as right.
    assert first[2].gap == pytest.approx(2 / 1.5 * (0.001 * (tokens[0] - place - help_call) - (1.02 - 0.25)))
    place = len(second[2].token_ids) - 2
    assert second[2].gap == pytest.approx(1 / 1.5 * 0.001 * (tokens[1] - place - help_call))
    assert third is None


def test_without_a_price_only_what_was_solved_says_something(engine: HFEngine) -> None:
    made = Rehearsal(engine, reward=ALPHAS)
    solved, failed, asked = made.early(ONE + TWO + THREE + RIGHT, ONE + TWO + WRONG, ONE + TWO + HELP_CALL)
    assert solved
    assert solved[2].gap < 0
    assert failed is asked is None
    off = Rehearsal(engine, sampling={"max_tokens": 120})
    assert off.early(ONE + TWO + THREE + RIGHT, ONE + TWO + WRONG) == [None, None]


def test_the_draw_follows_from_seed_step_problem_and_index_alone(engine: HFEngine) -> None:
    long = ONE + TWO + THREE.replace("!", "?") + ONE + TWO + RIGHT
    made = Rehearsal(engine)

    def places(planner: Planner, step: int, problems: list[Problem], *, copies: int = 8) -> list[int]:
        judged = [made.judged(*[long] * copies) for _ in problems]
        exits = planner.plan(step, problems, judged).exits_PG
        return [exit_.place for group in exits for exit_ in group if exit_]

    other = TASK.load("train")[0]
    alone = places(made.planner, 3, [PROBLEM])
    assert places(made.planner, 3, [other, PROBLEM])[-8:] == alone == places(Rehearsal(engine).planner, 3, [PROBLEM])
    # Counted on where a batch holds a problem twice.
    twice = places(made.planner, 3, [PROBLEM, PROBLEM], copies=4)
    assert twice == alone
    assert len({tuple(places(made.planner, step, [PROBLEM])) for step in range(5)}) == 5
    assert places(Rehearsal(engine, seed=1).planner, 3, [PROBLEM]) != alone


def test_each_token_of_a_response_costs_its_reward(engine: HFEngine) -> None:
    made = Rehearsal(engine, sampling={"max_tokens": 120})
    judged = made.judged(ONE + TWO + THREE + RIGHT, ONE + WRONG, ONE + HELP_CALL, ONE + TWO + "3:20...")
    plan = made.planner.plan(1, [PROBLEM], [judged])
    costs = [0.001 * len(r.token_ids) for r in judged.responses]
    table = [1.02, 0.02, 0.25, 0.0]
    assert plan.rewards_PG[0].tolist() == pytest.approx([t - c for t, c in zip(table, costs, strict=True)])
    # What was spent before the decision is the same whether it asks or answers.
    gaps = [row.gap for row in made.planner.rows(plan) if row.point]
    assert gaps == pytest.approx([0.25 - 1.02, 0.25 - 0.02, 0.25])


def test_the_early_exits_are_rows_of_the_update(engine: HFEngine) -> None:
    texts = [ONE + TWO + THREE + RIGHT, ONE + TWO + WRONG]
    made = Rehearsal(engine)
    rows = made.planner.rows(made.planner.plan(1, [PROBLEM], [made.judged(*texts)]))
    plain = Rehearsal(engine, sampling={"max_tokens": 120})
    fewer = plain.planner.rows(plain.planner.plan(1, [PROBLEM], [plain.judged(*texts)]))
    early = [row for row in rows if row.boundary is not None]
    assert [row for row in rows if row.boundary is None] == fewer
    assert len(early) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"early_exit": True}, "decision_weight": 0.0}, "needs decision_weight and reward.cloud > 0"),
        (
            {"sampling": {"early_exit": True}, "reward": {"cloud": 0.0, "format": 0.0}},
            "needs decision_weight and reward.cloud > 0",
        ),
        ({"reward": {"token_cost": -0.1}}, "reward.token_cost"),
        (
            {"reward": {"token_cost": 0.01}},
            "a right answer of sampling.max_tokens tokens would cost 1.2, more than the",
        ),
        ({"evaluation": {"handoff": "everything"}}, "evaluation.handoff"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_who_learns_to_ask_early_is_evaluated_so() -> None:
    assert not config().evaluation.early_exit
    assert config(**EARLY).evaluation.early_exit
    assert config(**EARLY, evaluation={"max_tokens": 9}).evaluation.early_exit


def test_help_calls_that_could_not_come_have_a_part_in_the_policy(engine: HFEngine) -> None:
    texts = [ONE + TWO + THREE + RIGHT, ONE + TWO + WRONG, ONE + TWO + "3:20..."]
    made = Rehearsal(engine, sampling={**EARLY["sampling"], "forbid_help": True})
    plan = made.planner.plan(1, [PROBLEM], [made.judged(*texts)])
    solved, failed, cut = plan.advantages_PG[0].tolist()
    rows = [(row.advantage, row.declined) for row in made.planner.rows(plan) if row.point]
    # The early exit of each, which stands for two places, one and one; then its last place.
    assert rows == [(0, 2 * solved), (solved, solved), (0, failed), (failed, failed), (0, cut), (0, cut)]
    sampled = Rehearsal(engine).planner
    assert all(row.declined == 0 for row in sampled.rows(sampled.plan(1, [PROBLEM], [made.judged(*texts)])))


def test_it_trains_and_is_the_same_twice(tmp_path: Path) -> None:
    for name in "ab":
        train(config(**EARLY, steps=2), tmp_path / name)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    train(config(**{**EARLY, "sampling": {**EARLY["sampling"], "forbid_help": True}}, steps=2), tmp_path / "forbidden")
    assert all(step["help"] == 0 and step["rows"] > 0 for step in metrics(tmp_path / "forbidden"))
    with trainer(tmp_path / "off", **{**EARLY, "sampling": {"max_tokens": 120}}) as made:
        off = made.step(1)
    [on, _] = metrics(tmp_path / "a")
    assert on["rows"] > off.rows
    assert on["reward"] == off.reward


class Marked(Countdown):
    """Answers are graded by what they make, 0.8 is enough, and one that makes 20 is worth 0.5."""

    pass_score = 0.8

    def verify(self, answer: str, problem: Problem) -> Verdict:
        grade = {"6/2+20": 1.0, "20+6-2": 0.8, "20": 0.5}.get(answer, 0.0)
        return Verdict(grade >= self.pass_score, "as marked", grade)


class HalfRight(RightCloud):
    """A cloud whose answer is worth 0.5."""

    def ask(self, questions: Any, *, phase: str, step: int) -> list[Response]:
        return [Response("<answer>20</answer>", (), True) for _ in questions]


def graded(engine: HFEngine, cloud: RightCloud, *texts: str, **changes: Any) -> tuple[Planner, Plan]:
    made = Rehearsal(engine, **changes)
    made.planner = Planner(made.planner.config, Marked(TASK.config), engine.tokenizer, engine.points, cloud, Ranks())  # type: ignore[arg-type]
    return made.planner, made.planner.plan(1, [PROBLEM], [made.judged(*texts)])


def test_graded_answers_earn_their_share_and_are_correct_from_the_pass_score_on(engine: HFEngine) -> None:
    answers = [f"<answer>{text}</answer>" for text in ("6/2+20", "20+6-2", "20", "6+2")]
    changes: dict[str, Any] = {"sampling": {"max_tokens": 120}, "reward": {**ALPHAS, "cloud": 0.25}}
    planner, plan = graded(engine, HalfRight(), *answers, HELP_CALL, **changes)
    assert plan.judged[0].correct == [True, True, False, False, False]
    assert plan.judged[0].scores == [1.0, 0.8, 0.5, 0.0, 0.0]
    assert plan.rewards_PG[0].tolist() == pytest.approx([1.02, 0.82, 0.52, 0.02, 0.125])
    assert (plan.selection.d1, plan.cloud_score_P, planner.cloud_share()) == ((0,), [0.5], 0.5)
    # Asking would have paid 0.25 * 0.5, whatever the device's own answer was worth.
    gaps = [row.gap for g in range(4) if (row := planner.decision(plan, 0, g))]
    assert gaps == pytest.approx([0.125 - earned for earned in (1.02, 0.82, 0.52, 0.02)])


def test_a_problem_teaches_asking_where_the_cloud_passes_and_no_answer_does(engine: HFEngine) -> None:
    answers = ["<answer>20</answer>", "<answer>6+2</answer>"]
    # With a budget of all, no problem of D2 is left out.
    _, plan = graded(engine, RightCloud(), *answers, budget=1.0)
    assert (plan.selection.d1, plan.selection.d2, plan.cloud_score_P) == ((), (0,), [1.0])
    _, plan = graded(engine, HalfRight(), *answers, budget=1.0)
    assert (plan.selection.kept, plan.cloud_score_P) == ((), [0.5])


def test_a_checkpoint_of_before_grades_can_be_resumed(engine: HFEngine) -> None:
    planner = Rehearsal(engine).planner
    planner.resume({"cloud_correct": {"a": True, "b": False}, "dual": 0.5})
    assert planner.cloud_share() == 0.5
    assert planner.state() == {"cloud_scores": {"a": 1.0, "b": 0.0}, "dual": 0.5}


def test_the_draw_of_d2_follows_from_seed_and_step(engine: HFEngine) -> None:
    made = Rehearsal(engine)
    # 3/7 of four that are solved: one of the eight that the cloud alone solves.
    judged = [made.judged(RIGHT, WRONG)] * 4 + [made.judged(WRONG, WRONG)] * 8

    def drawn(seed: int) -> list[tuple[int, ...]]:
        planner = Rehearsal(engine, seed=seed).planner
        return [planner.plan(step, [PROBLEM] * 12, judged).selection.d2 for step in range(20)]

    assert {len(d2) for d2 in drawn(0)} == {1}
    assert len(set(drawn(0))) > 4
    assert drawn(0) == drawn(0) != drawn(1)


def test_asking_at_a_line_break_that_the_tokenizer_merges_with_the_tag(engine: HFEngine) -> None:
    tokenizer = byte_level(["\n<"], split=False)
    planner = Planner(config(), TASK, tokenizer, decision_points(tokenizer), RightCloud(), Ranks())  # type: ignore[arg-type]
    ids = tokenizer.encode("1:2+6=8?\n2:20", add_special_tokens=False)
    cut = Response(tokenizer.decode(ids), tuple(ids), finished=False)
    [judged] = planner.judge([PROBLEM], [[cut, cut]])
    row = planner.decision(planner.plan(1, [PROBLEM], [judged]), 0, 0)
    assert row
    assert row.boundary is not None
    # As the tokenizer itself would spell it: the line break is the tag's, and not there twice.
    spelled = tokenizer.encode("1:2+6=8?\n" + HELP_CALL, add_special_tokens=False)
    assert list(row.token_ids) == spelled[: len(row.token_ids)]
    assert tokenizer.decode(list(row.token_ids[row.boundary :])) == "\n<u"


def test_a_judge_that_is_paid_is_asked_by_the_first_process_alone(engine: HFEngine) -> None:
    class Second(Ranks):
        """The second of two processes, to which the first says what it found."""

        def __init__(self) -> None:
            self.size, self.rank, self.first = 2, 1, False

        def from_first(self, work: Any) -> Any:
            return "what the first found"

        def gather(self, work: Any) -> Any:
            return [*work(), "the rest"]

    def found(task: Any) -> Any:
        planner = Planner(config(), task, engine.tokenizer, engine.points, None, Second())
        response = Response(RIGHT, (), True)
        return planner.judge([PROBLEM, PROBLEM], [[response], [response]])

    assert found(Judge(JudgeConfig(path="x", judge=Choice(name="tests.clouds:SameJudge")))) == "what the first found"
    # Without a judge it judges its share, the second problem.
    [second, rest] = found(TASK)
    assert (second.correct, rest) == ([True], "the rest")
