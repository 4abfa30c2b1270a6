"""One of reasoning-gym's scorers in the sandbox, which sees none of that package's files: made from its modules' texts.

Scorers need little of what their modules import. Curricula and numpy, which serve to make problems, are stood in for by
names that do nothing.
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False  # importing typing would take as long as all the others
if TYPE_CHECKING:
    from typing import Any

_STOOD_IN = ("reasoning_gym.coaching", "numpy")


class _Nothing:
    """What a name of a module that is not there stands for."""


def score(family: str, texts: dict[str, str], answer: str, entry: dict[str, Any]) -> Any:
    """What a family's scorer says of an answer to the problem `entry`.

    Args:
        family: its name.
        texts: the texts of the modules that it is made from, by name, each after what it imports. One of them is
            `reasoning_gym.dataset`.
        answer: what is judged.
        entry: the problem as reasoning-gym made it.
    """
    known: dict[str, tuple[Any, Any]] = {}

    def register(name: str, dataset: Any, config: Any, curriculum: Any = None) -> None:
        known[name] = dataset, config

    _module("reasoning_gym")
    for name in _STOOD_IN:
        _module(name).__dict__["__getattr__"] = _stand_in
    for name, text in texts.items():
        names = _module(name).__dict__
        exec(compile(text, name, "exec", dont_inherit=True), names)
        if name == "reasoning_gym.dataset":
            factory = _module("reasoning_gym.factory")
            factory.__dict__.update(ProceduralDataset=names["ProceduralDataset"], register_dataset=register)
    dataset, config = known[family]
    return dataset(config()).score_answer(answer, entry)


def _module(name: str) -> ModuleType:
    """A new module, which is there to be imported."""
    module = sys.modules[name] = ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    return module


def _stand_in(name: str) -> type[_Nothing]:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Nothing
