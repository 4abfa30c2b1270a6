from __future__ import annotations

import pytest

from selfroute.compare.config import QUICK, CompareConfig, brief, label
from selfroute.compare.methods import BOUNDS, METHODS, OURS, ROUTERS, TASK_TUNED, TRAINED
from selfroute.comparison import load_config
from selfroute.config import Choice, names, validate
from selfroute.errors import ConfigError

COMPARISONS = [name for name in names() if name.startswith(("compare-", "ablate-"))]


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_shipped_comparison_is_whole(name: str) -> None:
    config = load_config(name)
    trained = config.trained
    assert len(trained) == len(set(trained)) > 0
    for method in trained:
        training = config.training(method, lr=config.lrs[0], seed=7)
        assert (training.seed, training.lr) == (7, config.lrs[0])
        assert training.budget == {"rho=0.1": 0.091, "rho=1": 0.5}.get(method, 0.3)
        assert training.task.settings["seed"] == 1, "another draw than the one that settings were tuned on"
        assert training.sampling.max_tokens == training.evaluation.max_tokens
    load_config(name, QUICK)


def test_the_main_comparison_has_every_row() -> None:
    config = load_config("compare-countdown")
    assert config.methods == tuple(METHODS)
    assert len(config.seeds) >= 3
    assert {*BOUNDS, *TRAINED, *ROUTERS} == set(METHODS)


def test_methods_differ_from_ours_in_what_they_say_alone() -> None:
    config = load_config("compare-countdown")
    ours = config.training(OURS, lr=1e-4, seed=0).model_dump()
    for method in TRAINED:
        other = config.training(method, lr=1e-4, seed=0).model_dump()
        changed = {key for key in ours if ours[key] != other[key]}
        assert changed <= {"algorithm", "d1", "decision_weight", "reward", "sampling"}, method
        # Where no call is rewarded, or every decision's both outcomes are known, none is sampled.
        assert other["sampling"]["forbid_help"] == (method in (OURS, TASK_TUNED))
        assert (method == OURS) == (not changed)
        assert other["decision_weight"] == (ours["decision_weight"] if method == OURS else 0)
        # The paper's v4 reward has no format term.
        cloud = 0 if method == TASK_TUNED else 0.25
        assert other["reward"] == {
            "answer": 1,
            "cloud": cloud,
            "format": 0.02 if method == OURS else 0,
            "token_cost": 0,
        }


def test_routers_bring_the_model_that_they_stand_on() -> None:
    base = load_config("compare-countdown")
    assert base.model_copy(update={"methods": ("probe",)}).trained == [TASK_TUNED]
    assert base.model_copy(update={"methods": ("decision_votes", "device_only")}).trained == [OURS]
    assert base.model_copy(update={"methods": ("cloud_only",)}).trained == []


def test_ablations_change_ours() -> None:
    values = {"testbed": "x", "methods": [], "ablations": {"G=4": {"num_responses": 4}, "fast": {"lr": 1e-3}}}
    config = validate(CompareConfig, values, "test")
    assert config.trained == ["G=4", "fast"]
    assert config.training("G=4", lr=1e-4, seed=3).num_responses == 4
    assert config.training("fast", lr=1e-4, seed=3).lr == 1e-3
    assert config.training("G=4", lr=1e-4, seed=3).sampling.forbid_help
    assert label("G=4") == "GAPG + decision loss, G=4"


def test_a_clouds_name_is_fit_for_a_folder() -> None:
    assert brief(Choice(name="oracle", accuracy=0.7)) == "accuracy=0.7"
    assert brief(Choice(name="oracle")) == "oracle"
    assert brief(Choice(name="x:Y", model="../../deep/r1")) == "model=..-..-deep-r1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["gapgg"]}, "no such method: gapgg"),
        ({"ablations": {"gapg": {}}}, "must not be named like a method: gapg"),
        ({"ablations": {"G=1": {"num_responses": 1}}}, "num_responses: .*greater than or equal to 2"),
        ({"ablations": {"../G": {"num_responses": 4}}}, r"name of an ablation"),
        ({"testbed": "../x"}, "testbed"),
        ({"seeds": []}, "seeds"),
        ({"train": {"task": {"name": "countdown", "numbers": 3}}}, "numbers"),
        ({"train": {"lr": 1e-3}}, "set lrs and seeds"),
        ({"train": {"decision_weight": 0}}, "must be above 0"),
        ({"swap_clouds": [{"name": "orcale"}]}, "no such choice: 'orcale'"),
        ({"swap_clouds": [{"name": "oracle", "accuracy": 0.5}] * 2}, "same name"),
        ({"ablations": {"cloud": {"cloud": {"acuracy": 0.5}}}}, "did you mean"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(CompareConfig, {"testbed": "x", **changes}, "test")
