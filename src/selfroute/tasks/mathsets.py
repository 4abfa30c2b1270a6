"""The maths data sets, one row each: where they are, how their columns read, how large they are, and whose.

Mirrors differ in their columns; a file of any of them is known by the columns that it has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from selfroute.tasks.datasets import DataSet
from selfroute.tasks.latex import extract
from selfroute.tasks.sources import Hub

_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of a problem and of its answer, and how the answer is got.

    `whole`: the column is the answer, or a list of answers any of which will do. `boxed`: the last box in a worked
    solution. `hashes`: what follows `####`.
    """

    question: str
    answer: str
    how: Literal["whole", "boxed", "hashes"] = "whole"


@dataclass(frozen=True, slots=True)
class MathSet(DataSet):
    """A maths data set, and how the columns of its copies read."""

    layouts: tuple[Layout, ...]


_SOLUTION = Layout("problem", "solution", "boxed")
_BOTH = {"train": "train", "test": "test"}
_TEST = {"test": "test"}
_TRAIN_IS_TEST = {"test": "train"}

MATH_SETS = {
    "math-lighteval": MathSet(
        "MATH (Hendrycks et al., arXiv:2103.03874)",
        (
            Hub("DigitalLearningGmbH/MATH-lighteval", _BOTH, ("default",), "0530c78699ea5e8eb5530600900e1f328b48acad"),
            Hub("EleutherAI/hendrycks_math", _BOTH, _SUBJECTS, "21a5633873b6a120296cce3e2df9d5550074f4a3"),
        ),
        {"train": 7500, "test": 5000},
        "MIT; a takedown removed the first copy",
        (_SOLUTION,),
    ),
    "math-500": MathSet(
        "MATH-500, a part of MATH's test problems",
        (Hub("HuggingFaceH4/MATH-500", _TEST, commit="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"),),
        {"test": 500},
        "as MATH",
        (Layout("problem", "answer"), _SOLUTION),
    ),
    "agieval-math": MathSet(
        "AGIEval maths (arXiv:2304.06364), a part of MATH's test problems",
        (Hub("hails/agieval-math", _TEST),),
        {"test": 1000},
        "as MATH",
        (Layout("query", "answer"),),
    ),
    "amc23": MathSet(
        "AMC 12 of 2023",
        (
            Hub("math-ai/amc23", _TEST, commit="80815d37005feb82cd7f8fbc6901d5d3eff43057"),
            Hub("zwhe99/amc23", _TEST),
        ),
        {"test": 40},
        "not stated",
        (Layout("question", "answer"),),
    ),
    "aime24": MathSet(
        "AIME of 2024",
        (
            Hub("HuggingFaceH4/aime_2024", _TRAIN_IS_TEST, commit="2fe88a2f1091d5048c0f36abc874fb997b3dd99a"),
            Hub("math-ai/aime24", _TEST, commit="83a7f387baaa524a8bda0022eac0541582297103"),
            Hub("Maxwell-Jia/AIME_2024", _TRAIN_IS_TEST),
        ),
        {"test": 30},
        "not stated",
        (Layout("problem", "answer"), _SOLUTION, Layout("Problem", "Answer")),
    ),
    "aime25": MathSet(
        "AIME of 2025",
        (
            Hub("math-ai/aime25", _TEST, commit="563bb8404243c5f09de6ec262f2db674fe5bce9b"),
            Hub("MathArena/aime_2025", _TRAIN_IS_TEST),
        ),
        {"test": 30},
        "not stated; MathArena's copy CC-BY-NC-SA-4.0",
        (Layout("problem", "answer"),),
    ),
    "minervamath": MathSet(
        "Minerva's course problems (arXiv:2206.14858)",
        (Hub("math-ai/minervamath", _TEST, commit="ee46ddc498933b1977577953250ca5c66be64f96"),),
        {"test": 272},
        "not stated",
        (Layout("question", "answer"),),
    ),
    "gsm8k": MathSet(
        "GSM8K (arXiv:2110.14168)",
        (Hub("openai/gsm8k", _BOTH, ("main",), "740312add88f781978c0658806c59bc2815b9866"),),
        {"train": 7473, "test": 1319},
        "MIT",
        (Layout("question", "answer", "hashes"),),
    ),
}


def question_of(text: str) -> str:
    """A question without the `Q:` and `A:` that AGIEval puts around it."""
    if not text.lstrip().startswith("Q:"):
        return text.strip()
    return re.sub(r"\s*\bA:[^\n]{0,80}\Z", "", text.lstrip().removeprefix("Q:")).strip()


def answers_of(value: object, how: str) -> tuple[tuple[str, ...], str]:
    """The answers that a cell gives, and what is wrong with it ("" where nothing is)."""
    texts = [_text(v) for v in value] if isinstance(value, list) else [_text(value)]
    if not texts or not all(texts):
        return (), f"must be text or a number, not {str(value)[:60]!r}"
    if how == "boxed":
        if not all("\\boxed" in text or "\\fbox" in text for text in texts):
            return (), r"has no \boxed{} answer"
        texts = [extract(text) for text in texts]
    elif how == "hashes":
        if not all("####" in text for text in texts):
            return (), "has no #### before the answer"
        texts = [text.rpartition("####")[2].strip() for text in texts]
    return (tuple(texts), "") if all(texts) else ((), "holds an empty answer")


def _text(cell: object) -> str:
    return str(cell) if is_number(cell) else cell.strip() if isinstance(cell, str) else ""


def is_number(cell: object) -> bool:
    """Whether a cell is a number; a missing one is NaN in many a file."""
    return isinstance(cell, int | float) and not isinstance(cell, bool) and cell == cell
