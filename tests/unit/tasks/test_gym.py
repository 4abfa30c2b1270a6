"""Problems of reasoning-gym, and answers that mean harm to what scores them."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.witness import Witness

from selfroute.config import Choice
from selfroute.errors import ConfigError, TaskError
from selfroute.tasks import gym, make_task
from selfroute.tasks.box import Limits
from selfroute.tasks.check import check
from selfroute.tasks.gym import FAMILIES, Family, Gym, GymConfig
from selfroute.tasks.inside.wire import pack
from selfroute.tasks.sandbox import Job, Sandbox
from selfroute.types import Problem, Verdict

pytest.importorskip("reasoning_gym", reason="needs the extra: pip install '.[gym]'")


def task(family: Family = "chain_sum", **more: Any) -> Gym:
    return Gym(GymConfig(**{"family": family, "train": 30, "calibration": 8, "test": 12, **more}))


def judged(task: Gym, answers: list[tuple[str, Problem]]) -> list[Verdict]:
    return asyncio.run(task.verify_many(answers))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Gym:
    return task(request.param)


def test_the_list_of_families_is_one() -> None:
    assert get_args(Family) == tuple(FAMILIES)


def test_splits_and_seeds_share_no_problem() -> None:
    # Few texts are there, so that the same ones come up again and again.
    few = {"min_digits": 1, "max_digits": 1, "min_terms": 3, "max_terms": 3}
    made = [task(settings=few, train=300, calibration=30, test=40, seed=seed) for seed in (0, 1, 42, 43)]
    texts = {split: {p.question for one in made for p in one.load(split)} for split in ("train", "calibration", "test")}  # type: ignore[arg-type]
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["calibration"]
    assert not texts["calibration"] & texts["test"]
    for one in made:
        problems = [p for split in ("train", "calibration", "test") for p in one.load(split)]  # type: ignore[arg-type]
        assert len({p.question for p in problems}) == len({p.id for p in problems}) == 370
    # Neighbouring seeds of reasoning-gym itself share all but one of a hundred.
    first, second = ({p.question for p in task("products", seed=seed).load("train")} for seed in (42, 43))
    assert not first & second


def test_the_same_problems_whatever_is_loaded_first() -> None:
    one, other = task(), task()
    test, train = one.load("test"), one.load("train")
    assert other.load("train") == train
    assert other.load("test") == test
    drawn = one.training_problems(random.Random(0))
    assert {next(drawn).id for _ in range(60)} <= {p.id for p in train}


def test_settings_are_the_familys_own_and_written_out() -> None:
    assert task("mini_sudoku", settings={"min_empty": 3, "max_empty": 4}).config.settings == {
        "min_empty": 3,
        "max_empty": 4,
    }
    assert {"min_rows", "p_blocked"} <= set(task("shortest_path").config.settings)
    for problem in task("mini_sudoku", settings={"min_empty": 3, "max_empty": 4}).load("test"):
        assert problem.question.count("_") in (3, 4)
    # An integer passes for a number.
    assert task("number_sorting", settings={"min_value": -5, "max_value": 5}).config.settings["min_value"] == -5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_emtpy": 3}, r"mini_sudoku has no setting min_emtpy \(it has: min_empty, max_empty\)"),
        ({"size": 3}, "mini_sudoku has no setting size"),
        ({"seed": 3}, "mini_sudoku has no setting seed"),
        ({"min_empty": 3.5}, "min_empty is of type int, such as 8; got 3.5"),
        ({"min_empty": True}, "min_empty is of type int, such as 8; got True"),
        ({"min_empty": 12, "max_empty": 9}, "mini_sudoku refuses these settings: max_empty must be between"),
        ({"min_empty": "three"}, "settings.min_empty"),
    ],
)
def test_settings_that_the_family_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(Choice(name="gym", family="mini_sudoku", settings=settings))


def test_other_families_are_not_there() -> None:
    # Its scorer runs what it is given.
    with pytest.raises(ConfigError, match="family: Input should be 'mini_sudoku', "):
        make_task(Choice(name="gym", family="countdown"))


def test_too_few_problems_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym, "_PATIENCE_S", 1.0)
    few = {"min_digits": 1, "max_digits": 1, "min_terms": 1, "max_terms": 1}
    with pytest.raises(
        TaskError, match=r"chain_sum made only \d+ distinct train problems, 30 were asked .*task.train=N"
    ):
        task(settings=few).load("train")
    with pytest.raises(
        TaskError, match=r"knights_knaves made only 0 distinct train problems.* TimeoutError: no problem within 2 "
    ):
        task("knights_knaves", settings=ALONE).load("train")


ALONE = {"n_people": 1}
"""A knight alone can say one thing only, for which reasoning-gym looks for a second one for ever."""


def test_an_item_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from selfroute.tasks import gym_items

    monkeypatch.setattr(gym_items, "ITEM_CPU_S", 0.1)
    given = task("knights_knaves").config.settings
    # At one of them, numpy swallows the first word of it.
    assert (
        gym_items.items("knights_knaves", {**given, **ALONE}, 0, 4)
        == [{"failure": "TimeoutError: no problem within 0.1 processor seconds"}] * 4
    )
    # A call that takes long gives fewer.
    monkeypatch.setattr(gym_items, "CALL_CPU_S", 0.05)
    assert len(gym_items.items("knights_knaves", {**given, **ALONE}, 0, 4)) == 1
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_without_the_library_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(TaskError, match=r"task gym needs reasoning-gym .*pip install 'selfroute\[gym\]'"):
        GymConfig()


def test_without_isolation_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TaskError, match=r"no `(bwrap|setpriv)` .*task.unsafe_sandbox=true"):
        task().load("test")


def test_every_familys_own_answers_score_and_others_do_not(family: Gym) -> None:
    problems = family.load("train")
    assert list(check(family, problems[:6])) == [None] * 6
    own = judged(family, [(f"\n {p.reference['answer']} ", p) for p in problems])
    assert {v.reason for v in own} == {"reasoning-gym scores it 1"}
    assert all(v.correct for v in own)
    for answer in ("", "  ", "no", "1", "[]", "null", "\x00", "\ud800", "é" * 100, "-" * 20_001):
        assert not family.verify(answer, problems[0]).correct


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_five_hundred_of_every_family_score_themselves(name: Family) -> None:
    many = task(name, train=500)
    problems = many.load("train")
    assert all(v.correct for v in judged(many, [(many.solution(p) or "", p) for p in problems]))


def a(family: Family, entry: dict[str, Any]) -> Problem:
    """A problem of our own, as the family would write it down."""
    return Problem("gym-0", "?", {"answer": entry["answer"], "entry": {"question": "?", "metadata": {}, **entry}})


GRID = [list("*OO"), list("XXO"), list("OO#")]
SORTED = ["-3.5", "1.25", "7.0"]
PROBLEMS: dict[Family, Problem] = {
    "mini_sudoku": a(
        "mini_sudoku",
        {
            "answer": "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1",
            "metadata": {"solution": [[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]},
        },
    ),
    "maze": a("maze", {"answer": "12"}),
    "knights_knaves": a("knights_knaves", {"answer": "Zoey is a sage, and Owen is a fool."}),
    "shortest_path": a("shortest_path", {"answer": "right right down down", "metadata": {"matrix": GRID}}),
    "path_star": a("path_star", {"answer": "1 3 5"}),
    "chain_sum": a("chain_sum", {"answer": "-1234"}),
    "products": a("products", {"answer": "1813"}),
    "number_sorting": a(
        "number_sorting", {"answer": str(SORTED), "metadata": {"direction": "ascending", "sorted_numbers": SORTED}}
    ),
}
VERDICTS: list[tuple[Family, str, bool]] = [
    ("mini_sudoku", "\n1 2 3 4 \n3 4 1 2\n2 1 4 3\n4 3 2 1 ", True),
    ("mini_sudoku", "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1", True),
    ("mini_sudoku", "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 1 2", False),
    ("mini_sudoku", "1234\n3412\n2143\n4321", False),
    ("maze", "12", True),
    ("maze", " 12\n", True),
    ("maze", "12 steps", False),
    ("maze", "112", False),
    ("maze", "6+6", False),
    ("knights_knaves", "Owen is a fool, and Zoey is a sage.", True),
    ("knights_knaves", "zoey is a sage and owen is a fool", True),
    ("knights_knaves", "Zoey is a sage, and Owen is a sage.", False),
    ("knights_knaves", "Zoey is a sage, Owen is a fool, and Owen is a sage.", False),
    ("knights_knaves", "Zoey is a sage", False),
    ("shortest_path", "right right down down", True),
    ("shortest_path", "right down right down", False),
    ("shortest_path", "right right left right down down", False),
    ("shortest_path", "infeasible", False),
    ("path_star", "1  3\n5", True),
    ("path_star", "1 3 4", False),
    ("path_star", "1 3 5 1 3 5", False),
    ("chain_sum", "-1,234.0", True),
    ("chain_sum", "-1234 + 0", False),
    ("chain_sum", "1234", False),
    ("chain_sum", "NaN", False),
    ("products", "1813", True),
    ("products", "37*49", False),
    ("products", "The result is 1813", False),
    ("products", "9**9**9", False),
    ("number_sorting", "['-3.5', '1.25', '7.0']", True),
    ("number_sorting", "[-3.50, 1.25, 7]", True),
    ("number_sorting", "['7.0', '1.25', '-3.5']", False),
    ("number_sorting", "['-3.5', '1.25']", False),
    ("number_sorting", "-3.5, 1.25, 7.0", False),
    # The family's own scorer takes these.
    ("number_sorting", "['-2.6', '0.3', '6.1']", False),
    ("number_sorting", "[NaN, NaN, NaN]", False),
    ("number_sorting", "['nan', 'nan', 'nan']", False),
]


@pytest.mark.parametrize(("name", "answer", "correct"), VERDICTS)
def test_verdicts(name: Family, answer: str, correct: bool) -> None:
    assert task(name).verify(answer, PROBLEMS[name]).correct == correct


def scores(name: Family, *answers: str) -> list[str]:
    """What reasoning-gym's scorer alone says in the sandbox."""
    texts, entry = task(name)._texts, PROBLEMS[name].reference["entry"]
    cases = [json.dumps(pack([name, texts, answer, entry])) for answer in answers]
    return [ran.answers for ran in Sandbox().run(gym._job(cases))]


def test_why_numbers_are_compared_here_too() -> None:
    assert scores("number_sorting", "[NaN, NaN, NaN]", "['-2.6', '0.3', '6.1']", "[1, 2, 3]") == ["1.0", "1.0", "0.0"]


def test_the_scorer_is_that_of_the_library() -> None:
    import reasoning_gym

    for name, problem in PROBLEMS.items():
        answers = [answer for family, answer, _ in VERDICTS if family == name]
        usual = reasoning_gym.get_score_answer_fn(name)
        assert scores(name, *answers) == [str(float(usual(one, problem.reference["entry"]))) for one in answers]


HOSTILE = [
    "__import__('os').system('touch MARK')",
    "eval(\"__import__('os').system('touch MARK')\")",
    "[__import__('os').system('touch MARK')]",
    "exec('import os; os.kill(1, 9)')",
    "9**9**9",
    "9" * 19_000,
    "1e" + "9" * 18_000,
    "[" * 19_000,
    "(" * 19_000,
    '{"a":' * 3_000,
    "\\" * 19_000,
    "right " * 3_000,
    "1 " * 9_000,
    "x" * (1 << 20),
    "Zoey is a " * 1_900,
    "\x00" * 1_000,
    "\ud800\udfff" * 1_000,
    "</answer><answer>",
    "%s%n{0.__class__}",
    "' or '1'='1",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_that_mean_harm_do_nothing_outside(name: Family, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    tmp_path.chmod(0o777)
    one, answers = task(name), [(text.replace("MARK", str(mark)), PROBLEMS[name]) for text in HOSTILE]
    one.sandbox.isolated()
    started = time.monotonic()
    with Witness() as witness:
        verdicts = judged(one, answers)
    assert time.monotonic() - started < 30
    assert not any(v.correct for v in verdicts)
    assert all(v.reason for v in verdicts)
    assert not mark.exists()
    assert witness.alive() == []


SELF_MADE = """
from ..factory import ProceduralDataset, register_dataset
class Config: pass
class Loose(ProceduralDataset):
    def __init__(self, config): pass
    def __getitem__(self, number): return {}
    def score_answer(self, answer, entry): return float(eval(answer))
register_dataset("loose", Loose, Config)
"""


def test_a_scorer_that_runs_an_answer_runs_it_inside(tmp_path: Path) -> None:
    """None of the families has one; this is what would stand between one and the machine."""
    mark = tmp_path / "mark"
    tmp_path.chmod(0o777)
    texts = {"reasoning_gym.dataset": task()._texts["reasoning_gym.dataset"], "reasoning_gym.games.loose": SELF_MADE}
    answers = [
        f"__import__('os').system('touch {mark}')",
        f"open({str(mark)!r}, 'w').write('x')",
        "__import__('socket').create_connection(('127.0.0.1', 80))",
        "len(open('/etc/passwd').read())",
        "9**9**9",
        "len('x' * 10**10)",
        "__import__('os').kill(1, 9)",
        "__import__('os').fork() or __import__('time').sleep(100)",
        "0.5",
    ]
    limits = Limits(cpu_s=1, wall_s=2, memory_mb=256, processes=4, output_kb=64)
    cases = [json.dumps(pack(["loose", texts, answer, {}])) for answer in answers]
    with Witness() as witness:
        runs = Sandbox().run(Job(gym._scorer(), cases, "call", "score", limits=limits))
    assert not mark.exists()
    assert witness.alive() == []
    verdicts = [gym._verdict(ran, answer) for ran, answer in zip(runs, answers, strict=True)]
    assert verdicts[4].reason.startswith("undecided: the scorer came to its limit (")
    assert verdicts[-1] == Verdict(False, "reasoning-gym scores it 0.5", extracted="0.5")
    # Only the machine is safe from it, not the verdict, so no such family is in the list.
    assert verdicts[0].correct


@given(st.lists(st.text(max_size=200), max_size=12))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_verifier_is_total(texts: list[str]) -> None:
    one = task("number_sorting")
    assert not any(v.correct for v in judged(one, [(text, PROBLEMS["number_sorting"]) for text in texts]))


def test_threads_and_batches_give_the_same_verdicts() -> None:
    one = task("shortest_path")
    answers = [(text, PROBLEMS["shortest_path"]) for name, text, _ in VERDICTS if name == "shortest_path"] * 3
    expected = [correct for name, _, correct in VERDICTS if name == "shortest_path"] * 3
    assert [v.correct for v in judged(one, answers)] == expected
    with ThreadPoolExecutor(8) as threads:
        assert [v.correct for v in threads.map(lambda pair: one.verify(*pair), answers)] == expected
    assert judged(one, []) == []


def test_a_users_own_words_have_no_reference() -> None:
    problem = task().read("What is 2 + 2?")
    assert task().verify("4", problem) == Verdict(False, "no reference answer is known", extracted="4", judged=False)
    assert task().solution(problem) is None
    assert task().variants(problem, 3) == []
    assert task().canonical(" 1\n 2 ") == "1 2"
    with pytest.raises(TaskError, match="in words"):
        task().read(" ")
