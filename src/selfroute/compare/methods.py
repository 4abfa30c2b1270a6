"""The rows of a comparison: what each method trains, and which router looks at which device model.

A trained method is a change of settings to the one training loop; a router is a score on the responses of a trained
model. Left out on purpose: how either is run (`run`) and what it is worth (`results`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["bound", "paper", "prompt", "post-hoc", "later", "ours"]
"""`bound`: one side alone. `paper`: a row of the paper's table. `prompt`: sees the prompt alone. `post-hoc`: sees the
task-tuned model's responses. `later`: published after the paper, or a variant of it. `ours`: what selfroute ships."""

OURS = "gapg_decision"
"""The method that differences are taken to."""

TASK_TUNED = "task_tuning"
"""The method whose device model the outside routers stand on."""

_PAPER: Mapping[str, Any] = {"decision_weight": 0.0, "reward": {"format": 0.0}}
"""No decision loss, and no format term in the reward, as in the paper's v4."""


_NO_HELP: Mapping[str, Any] = {"sampling": {"forbid_help": True}}
"""No help call is sampled in training: every response teaches solving."""


@dataclass(frozen=True, slots=True)
class Method:
    """A row: its name for people, its kind, and either the changes to the training's settings of a trained method, or
    the trained method whose device model a router stands on; `votes`: on several responses of its own."""

    label: str
    kind: Kind
    changes: Mapping[str, Any] | None = field(default=None)
    on: str | None = None
    votes: bool = False


METHODS: Mapping[str, Method] = {
    "device_only": Method("Device only", "bound"),
    "cloud_only": Method("Cloud only", "bound"),
    TASK_TUNED: Method(
        "Task-Tuning Only",
        "paper",
        {**_PAPER, "algorithm": "rloo", "reward": {"cloud": 0.0, "format": 0.0}, **_NO_HELP},
    ),
    "naive_offloading": Method("Task-Tuning & Naive Offloading", "paper", on=TASK_TUNED),
    "router": Method("Task-Tuning & Router", "paper", on=TASK_TUNED),
    "dr_grpo": Method("Collaboration-Aware Tuning", "paper", {**_PAPER, "algorithm": "dr_grpo"}),
    "grpo": Method("Collaboration-Aware Tuning, std", "paper", {**_PAPER, "algorithm": "grpo"}),
    "gapg": Method("GAPG", "paper", {**_PAPER, "algorithm": "gapg", "d1": "any_correct"}),
    "gapg_mixed": Method("GAPG, D1 mixed", "paper", {**_PAPER, "algorithm": "gapg", "d1": "mixed"}),
    OURS: Method("GAPG + decision loss", "ours", {"algorithm": "gapg", "d1": "any_correct", **_NO_HELP}),
    "decision_votes": Method("GAPG + decision loss, k samples vote", "ours", on=OURS, votes=True),
    "da_grpo": Method("DA-GRPO", "later", {**_PAPER, "algorithm": "da_grpo"}),
    "lagrangian_gapg": Method("Lagrangian GAPG", "later", {**_PAPER, "algorithm": "lagrangian_gapg"}),
    "router_encoder": Method("Prompt router: encoder", "prompt", on=TASK_TUNED),
    "router_boosting": Method("Prompt router: boosting", "prompt", on=TASK_TUNED),
    "prompt_probe": Method("Prompt router: hidden state", "prompt", on=TASK_TUNED),
    "unanswered_first": Method("Unanswered first, then random", "post-hoc", on=TASK_TUNED),
    "log_probability": Method("Mean log-probability", "post-hoc", on=TASK_TUNED),
    "self_consistency": Method("Self-consistency", "post-hoc", on=TASK_TUNED, votes=True),
    "prompt_variants": Method("Agreement across prompt variants", "post-hoc", on=TASK_TUNED, votes=True),
    "probe": Method("Hidden-state probe", "post-hoc", on=TASK_TUNED),
}
"""Every method by name, in the table's order."""

BOUNDS = tuple(name for name, m in METHODS.items() if m.kind == "bound")
TRAINED = tuple(name for name, m in METHODS.items() if m.changes is not None)
ROUTERS = tuple(name for name, m in METHODS.items() if m.on is not None)
