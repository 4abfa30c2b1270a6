from __future__ import annotations

from pathlib import Path

import pytest

from selfroute import config
from selfroute.compare.config import CompareConfig
from selfroute.config import Choice, Config, build, load, names, override, resolve
from selfroute.errors import ConfigError
from selfroute.serve.config import GatewayConfig
from selfroute.tasks import TASKS
from selfroute.tasks.countdown import CountdownConfig
from selfroute.train.config import TrainConfig
from selfroute.train.warmstart import WarmstartConfig


class Inner(Config):
    width: int = 3


class Outer(Config):
    steps: int = 10
    """Updates."""
    name: str = "x"
    inner: Inner = Inner()


def test_names_paths_and_overrides(tmp_path: Path) -> None:
    assert {"countdown-tiny", "countdown-1m"} <= set(names())
    assert load(TrainConfig, "countdown-tiny", ["steps=7", "cloud.accuracy=0.7"]).steps == 7
    assert load(WarmstartConfig, "countdown-1m").seed == 0
    path = tmp_path / "mine.toml"
    path.write_text("steps = 5\n[inner]\nwidth = 4\n")
    got = load(Outer, str(path), ["inner.width=9", "name=plain text"])
    assert (got.steps, got.inner.width, got.name) == (5, 9, "plain text")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("steps = ", [], "not valid TOML"),
        ("stesp = 3", [], "stesp: Extra inputs"),
        ("", ["steps=many"], r"steps: .*integer.*'many'"),
        ("", ["steps"], "key=value"),
        ("", ["=3"], "key=value"),
        ("steps = 3", ["steps.x=1"], "not a table"),
        ("", ["inner.depth=1"], "inner.depth"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(Outer, str(path), overrides)


def test_a_config_of_another_command_names_the_command() -> None:
    with pytest.raises(ConfigError, match=r"of another command: selfroute warmstart countdown-1m$"):
        load(TrainConfig, "countdown-1m")
    with pytest.raises(ConfigError, match=r"of another command: selfroute compare compare-countdown$"):
        load(TrainConfig, "compare-countdown")


TRAIN = """steps = 20
lr = 1e-3
num_responses = 4
[task]
name = "countdown"
[device]
model = "countdown-1m"
[cloud]
name = "oracle"
"""
SERVE = """device = {name = "live"}
cloud = {name = "oracle"}
bias = 0.5
"""


@pytest.mark.parametrize(
    ("text", "kind", "command"),
    [
        (TRAIN, GatewayConfig, "train"),
        (TRAIN, CompareConfig, "train"),
        ('stages = [{name = "a"}]', GatewayConfig, "train"),
        ('testbed = "mine"\n[train]\nsteps = 3', TrainConfig, "compare"),
        ("hidden_size = 64\nsteps = 3", TrainConfig, "warmstart"),
        ("port = 8001", TrainConfig, "serve"),
        ("[budget]\nusd_per_day = 1", CompareConfig, "serve"),
        (SERVE, TrainConfig, "serve"),
    ],
)
def test_a_file_of_another_command_is_told_by_its_keys(
    text: str, kind: type[Config], command: str, tmp_path: Path
) -> None:
    path = tmp_path / "good.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"good\.toml looks like a config of `selfroute {command}`$"):
        load(kind, str(path))


def test_a_misspelt_key_is_no_sign_of_another_command(tmp_path: Path) -> None:
    path = tmp_path / "good.toml"
    path.write_text(TRAIN.replace("steps =", "stepss ="))
    with pytest.raises(ConfigError, match=r"did you mean steps\?"):
        load(TrainConfig, str(path))


def test_known_keys_are_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "good.toml"
    path.write_text(TRAIN.replace("lr =", "zzz = 1\nqqq = 2\nlr ="))
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, str(path))
    said = str(caught.value)
    assert "  zzz: " in said
    assert "  qqq: " in said
    assert said.count("; known: task, device,") == 1


@pytest.mark.parametrize("name", names())
def test_every_config_states_its_command(name: str) -> None:
    class Other(Config):
        """Knows no key."""

    with pytest.raises(ConfigError, match=rf"command: (selfroute|accelerate launch) .*{name}$"):
        load(Other, name)


def test_an_unknown_config_names_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no such config: 'nope' \(.*countdown-tiny"):
        load(Outer, "nope")
    with pytest.raises(ConfigError, match=r"no such config: 'countdown-tin'; did you mean countdown-tiny\? \("):
        load(Outer, "countdown-tin")
    for path in ("gatway.toml", "configs/nope"):
        with pytest.raises(ConfigError, match=f"^no such file: {path}$"):
            load(Outer, path)


def test_overriding_leaves_the_original_alone() -> None:
    values = {"inner": {"width": 1}}
    assert override(values, ["inner.width=2", "a.b.c=[1, 2]"]) == {"inner": {"width": 2}, "a": {"b": {"c": [1, 2]}}}
    assert values == {"inner": {"width": 1}}


def test_another_choice_keeps_what_was_given_before_its_name_tables_too() -> None:
    before = {"task": {"name": "countdown", "train": 5, "column": {"question": "old"}}}
    given = ["task.columns.question=q", "task.path=x.jsonl", "task.name=custom"]
    assert override(before, given) == {"task": {"columns": {"question": "q"}, "path": "x.jsonl", "name": "custom"}}


def test_choices_are_named_or_dotted() -> None:
    assert type(build(Choice(name="countdown"), TASKS)).__name__ == "Countdown"
    made = build(Choice(name="tests.clouds:FlakyOracle", answers_first=3), TASKS)
    assert made.flaky.answers_first == 3
    for name, message in (("nope", "known: addition"), ("nope:Nope", "cannot import"), ("json:Nope", "cannot import")):
        with pytest.raises(ConfigError, match=message):
            build(Choice(name=name), TASKS)


def test_a_resolved_choice_writes_out_its_defaults() -> None:
    resolved = resolve(Choice(name="countdown", number_max=9), TASKS, "task")
    assert resolved.settings == {**CountdownConfig(number_max=9).model_dump(mode="json")}
    assert resolve(resolved, TASKS, "task") == resolved
    with pytest.raises(ConfigError, match=r"task.nubmer_max: .*did you mean task.number_max\?"):
        resolve(Choice(name="countdown", nubmer_max=9), TASKS, "task")
    with pytest.raises(ConfigError, match=r"task.zzz: .*known: num_numbers, "):
        resolve(Choice(name="countdown", zzz=9), TASKS, "task")
    with pytest.raises(ConfigError, match="needs a `Config`"):
        resolve(Choice(name="tests.unit.test_config:Plain"), TASKS, "task")


class Plain:
    """A choice whose settings are no pydantic class."""

    Config = dict


def test_every_field_of_a_command_is_documented() -> None:
    for kind in (TrainConfig, WarmstartConfig):
        assert len(kind.model_fields) <= 25
        assert all(field.description for field in kind.model_fields.values()), kind


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.validate(Outer, {}, "x").steps = 3  # type: ignore[misc]
