"""The settings of a comparison: one testbed, its methods and seeds, and the training that they share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from selfroute.cloud import CLOUDS, free_settings
from selfroute.compare.methods import BOUNDS, METHODS, OURS, TRAINED
from selfroute.config import Choice, Config, resolve, validate
from selfroute.records import without
from selfroute.train.config import TrainConfig, as_now, whole
from selfroute.train.progress import flat

QUICK = (
    *("seeds=[0, 1]", "lrs=[3e-4]", "fit_problems=60", "num_samples=3", "train.steps=2", "train.problems_per_step=8"),
    *("train.task.train=100", "train.task.calibration=60", "train.task.test=60"),
)
"""Overrides of `--quick`: every row in a few minutes, learning little."""


class CompareConfig(Config):
    """A comparison on one testbed."""

    testbed: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the testbed, and of its folder under --out."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to compare, by name."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Seeds of the training and of the evaluation's sampling; the problems are the same for all."""
    lrs: tuple[float, ...] = Field((3e-4,), min_length=1)
    """Learning rates to choose from for each trained method, on calibration problems, with the first seed."""
    ablations: dict[str, dict[str, Any]] = Field({})
    """More rows: GAPG + decision loss with these changes to the training's settings."""
    swap_clouds: tuple[Choice, ...] = ()
    """Clouds to evaluate with, in place of the one it was trained with, each ablation that changes the cloud."""
    fit_problems: int = Field(4000, ge=10)
    """Training problems that the prompt classifiers and the probe learn from, at most."""
    num_samples: int = Field(5, ge=2)
    """k: responses that vote in the agreement routers; k - 1 samples say whether the device mostly solves a problem."""
    encoder: str | None = None
    """Encoder of the prompt classifier, a hub id or a folder; without it, a small one is trained from nothing."""
    train: TrainConfig = TrainConfig()
    """The training that every trained method shares; `budget` is the budget compared at."""

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise ValueError(f"no such method: {', '.join(unknown)} (known: {', '.join(METHODS)})")
        return methods

    @field_validator("train")
    @classmethod
    def _resolved(cls, train: TrainConfig) -> TrainConfig:
        if train.model_fields_set & {"lr", "seed"}:
            raise ValueError("lr and seed are the comparison's: set lrs and seeds")
        if train.evaluation.every:
            raise ValueError("a comparison measures the last checkpoint: leave evaluation.every at 0")
        if train.decision_weight == 0:
            raise ValueError("decision_weight is that of GAPG + decision loss, so it must be above 0")
        if train.sampling.early_exit:
            raise ValueError("sampling.early_exit must be false: most rows have no decision loss to teach it")
        if train.evaluation.handoff != "problem":
            raise ValueError(
                "evaluation.handoff must be the problem alone: all rows stand on the same answers of the cloud"
            )
        return whole(train)

    @field_validator("swap_clouds")
    @classmethod
    def _named(cls, clouds: tuple[Choice, ...]) -> tuple[Choice, ...]:
        for cloud in clouds:
            resolve(cloud, CLOUDS, "swap_clouds")
        names = [brief(cloud) for cloud in clouds]
        if len(set(names)) != len(names):
            raise ValueError(f"two clouds would have the same name: {', '.join(sorted(names))}")
        return clouds

    @model_validator(mode="after")
    def _distinct(self) -> CompareConfig:
        for name in self.ablations:
            if not re.fullmatch(_NAME, name):
                raise ValueError(f"the name of an ablation is letters, digits and _ . , = + -; got {name!r}")
        clash = sorted(set(self.ablations) & set(METHODS))
        if clash:
            raise ValueError(f"an ablation must not be named like a method: {', '.join(clash)}")
        for name in self.ablations:
            self.training(name, lr=self.lrs[0], seed=self.seeds[0])
        return self

    @property
    def trained(self) -> list[str]:
        """The methods to train, in the table's order, those that routers stand on among them; then the ablations."""
        wanted = set(self.methods) | {METHODS[m].on for m in self.methods}
        return [name for name in TRAINED if name in wanted] + list(self.ablations)

    def parts(self) -> list[CompareConfig]:
        """The comparison cut into parts that share no row: a trained method with the routers on its model, a group of
        ablations that train the same, or the bounds. The longest, with the most routers, come first."""
        methods = {
            name: tuple(m for m in self.methods if name in (m, METHODS[m].on))
            for name in self.trained
            if name in METHODS
        }
        same: dict[str, dict[str, dict[str, Any]]] = {}
        for name, changes in self.ablations.items():
            same.setdefault(self._trained_as(name), {})[name] = changes
        # Ablations that change nothing of ours are copies of its row.
        unchanged = same.pop(self._trained_as(OURS), {}) if OURS in methods else {}
        bounds = tuple(m for m in self.methods if m in BOUNDS)
        cuts: list[tuple[tuple[str, ...], dict[str, dict[str, Any]]]] = [
            *(
                (methods[name], unchanged if name == OURS else {})
                for name in sorted(methods, key=lambda name: len(methods[name]), reverse=True)
            ),
            *(((), group) for group in same.values()),
            *([(bounds, {})] if bounds else []),
        ]
        return [self.model_copy(update={"methods": some, "ablations": group}) for some, group in cuts]

    def _trained_as(self, name: str) -> str:
        return self.training(name, lr=self.lrs[0], seed=self.seeds[0]).model_dump_json()

    def shared(self) -> dict[str, Any]:
        """The settings that all rows of a testbed share."""
        return self.model_dump(mode="json", exclude={"methods", "seeds", "ablations", "swap_clouds"})

    def differing(self, shared: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
        """The keys in which shared settings that were written down differ from these, where that changes an answer."""
        free = [f"train.{key}" for key in free_settings(self.train.cloud, self.train.task)]
        known = {**before, "train": as_now(before["train"])}
        old, new = flat(without(known, ["data", *free])), flat(without(shared, free))
        return sorted(key for key in {*old, *new} if old.get(key) != new.get(key))

    def stored(self) -> dict[str, Any]:
        """What `validate` makes this comparison from again."""
        return self.model_dump(mode="json", exclude={"train": {"lr", "seed"}})

    def training(self, method: str, *, lr: float, seed: int) -> TrainConfig:
        """The training of a method."""
        changes = METHODS[OURS if method in self.ablations else method].changes or {}
        changes = _merge(dict(changes), self.ablations.get(method, {}))
        values = _merge(self.train.model_dump(mode="json"), {**changes, "lr": changes.get("lr", lr), "seed": seed})
        return whole(validate(TrainConfig, values, f"the training of {method}"))

    def changed(self, method: str, trained: Mapping[str, Any]) -> list[str]:
        """The settings, of those that change an answer, with which something was trained and this comparison would not
        train that method: at the same learning rate and seed."""
        expected = self.training(method, lr=trained["lr"], seed=trained["seed"]).model_dump(mode="json")
        free = free_settings(self.train.cloud, self.train.task)
        old, new = without(as_now(trained), free), without(expected, free)
        return sorted(key for key in new if old.get(key) != new[key])


_NAME = r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*"


def brief(cloud: Choice) -> str:
    """A swapped cloud by what sets it apart, such as `accuracy=0.7`, fit for the name of a folder."""
    text = ",".join(f"{key}={value}" for key, value in cloud.settings.items()) or cloud.name
    return re.sub(r"[^A-Za-z0-9_.,=+-]", "-", text).lstrip(".-")


def label(method: str) -> str:
    """A method's name for people."""
    return METHODS[method].label if method in METHODS else f"{METHODS[OURS].label}, {method}"


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables merged; a change's value wins, and another choice by name stands alone."""
    merged = dict(values)
    if changes.get("name", values.get("name")) != values.get("name"):
        return dict(changes)
    for key, value in changes.items():
        merged[key] = _merge(merged.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged
