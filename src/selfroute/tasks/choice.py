r"""Multiple choice: the questions of MMLU, MMLU-Pro and ARC, answered by an option's letter or text.

    row -> Problem(question and options A, B, ...; the right one) -> ... <answer>B</answer> -> letters.pick -> Verdict

Left out on purpose: how an answer is read (`letters`), and where rows come from (`datasets`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeGuard

from selfroute.errors import TaskError
from selfroute.tasks.datasets import DataConfig, DataSet, Loader
from selfroute.tasks.letters import LETTERS, folded, letter_of, pick, plain
from selfroute.tasks.mathsets import is_number, question_of
from selfroute.tasks.sources import Hub
from selfroute.tasks.splits import problem_hash
from selfroute.types import Problem, Split, Verdict

ASK = "Answer with the letter of the right option."
_WORDINGS = (
    "Which of the options is right?\n\nPROBLEM\n\nGive its letter.",
    "PROBLEM\n\nOne option is right. Name it by its letter.",
    "Here is a multiple-choice question:\n\nPROBLEM\n\nThe answer is a letter.",
    "PROBLEM\n\nThink it through with care, and then choose a letter.",
)

_MMLU = {"train": "auxiliary_train", "calibration": "validation", "test": "test"}
_ARC_COMMIT = "210d026faf9955653af8916fad021475a3f00453"
_ARC = {"train": "train", "calibration": "validation", "test": "test"}

CHOICE_SETS = {
    "mmlu": DataSet(
        "MMLU (arXiv:2009.03300)",
        (
            Hub("cais/mmlu", _MMLU, ("all",), "c30699e8356da336a370243923dbaf21066bb9fe"),
            Hub("lighteval/mmlu", _MMLU, ("all",)),
        ),
        {"train": 99842, "calibration": 1531, "test": 14042},
        "MIT",
    ),
    "mmlu-pro": DataSet(
        "MMLU-Pro (arXiv:2406.01574)",
        (
            Hub(
                "TIGER-Lab/MMLU-Pro",
                {"calibration": "validation", "test": "test"},
                commit="b189ec765aa7ed75c8acfea42df31fdae71f97be",
            ),
        ),
        {"calibration": 70, "test": 12032},
        "MIT",
    ),
    "agieval-sat-math": DataSet(
        "AGIEval's SAT maths (arXiv:2304.06364)",
        (Hub("hails/agieval-sat-math", {"test": "test"}),),
        {"test": 220},
        "MIT; the questions as their source has it",
    ),
    "arc-challenge": DataSet(
        "ARC, the hard questions (arXiv:1803.05457)",
        (Hub("allenai/ai2_arc", _ARC, ("ARC-Challenge",), _ARC_COMMIT),),
        {"train": 1119, "calibration": 299, "test": 1172},
        "CC-BY-SA-4.0",
    ),
    "arc-easy": DataSet(
        "ARC, the easy questions (arXiv:1803.05457)",
        (Hub("allenai/ai2_arc", _ARC, ("ARC-Easy",), _ARC_COMMIT),),
        {"train": 2251, "calibration": 570, "test": 2376},
        "CC-BY-SA-4.0",
    ),
}

# Options that speak of their neighbours keep their places.
_ABOUT_OTHERS = re.compile(
    r"\b(?:above|below|preceding|following|these|both|neither|either|options?|choices?|answers?)\b|\ball of\b|"
    r"\bnone of\b|\A[A-Z](?:,? (?:and|or|&) [A-Z]\b)",
    re.IGNORECASE,
)
_OPTION_LINE = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])[.):])\s+(\S.*?)\s*")


class ChoiceConfig(DataConfig):
    """Which multiple-choice questions, and where they are."""

    dataset: Literal["mmlu", "mmlu-pro", "agieval-sat-math", "arc-challenge", "arc-easy"] = "mmlu"
    """The data set; `mmlu-pro` and `agieval-sat-math` are tests, the others can be trained on."""
    shuffle_seed: int | None = None
    """Seed of each question's own order of options; None leaves the data set's. Questions with an option that speaks of
    the others, such as `all of the above`, keep theirs."""


class MultipleChoice:
    """The task: `load` gives the problems of a split, `verify` judges an answer, `read` takes a user's own words."""

    Config = ChoiceConfig
    ABOUT = tuple(one.about(f"choice dataset={name}") for name, one in CHOICE_SETS.items())

    def __init__(self, config: ChoiceConfig) -> None:
        self.config = config
        self.data = Loader(config.dataset, CHOICE_SETS[config.dataset], config, self._problem_of, instead="mmlu")

    def load(self, split: Split) -> list[Problem]:
        """The problems of a split, as `Loader.load` says."""
        return self.data.load(split)

    def training_problems(self, rng: random.Random) -> Iterator[Problem]:
        """Problems of the training split, in a new order each time round, without end."""
        return self.data.training_problems(rng)

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """Whether `answer` picks the right option and no other. Total: it never raises, on any text."""
        options, right = problem.reference["options"], problem.reference["right"]
        picked = pick(answer, options)
        if isinstance(picked, str):
            return Verdict(False, f"unreadable: {picked}")
        letter = LETTERS[picked]
        if right is None:
            return Verdict(False, "no reference answer is known", extracted=letter, judged=False)
        # Some questions have an option twice.
        correct = options[picked] == options[right]
        return Verdict(correct, f"option {letter}" + ("" if correct else f", not {LETTERS[right]}"), extracted=letter)

    def solution(self, problem: Problem) -> str | None:
        """The right option's letter."""
        right = problem.reference["right"]
        return None if right is None else LETTERS[right]

    def read(self, text: str) -> Problem:
        """A user's own question, with its options on lines of their own. No answer to it is judged correct.

        Raises:
            TaskError: there is no question, or there are fewer than two options.
        """
        lines = text.strip().splitlines()
        options: list[str] = []
        while lines and (option := _OPTION_LINE.fullmatch(lines[-1])):
            options.insert(0, option[3])
            lines.pop()
        question = "\n".join(lines).strip()
        if not question or not 2 <= len(options) <= len(LETTERS):
            raise TaskError(
                'need a question with its options on lines of their own, such as "Which is red?\\nA. grass\\nB. blood"'
            )
        return choice_problem(question, options, None)

    def variants(self, problem: Problem, count: int) -> list[str]:
        """The same question and options with another request around them."""
        text = problem.question.removesuffix(f"\n\n{ASK}")
        return [wording.replace("PROBLEM", text) for wording in _WORDINGS[:count]]

    def canonical(self, answer: str) -> str:
        """The letter that an answer gives, or else its text."""
        return letter_of(answer) or folded(plain(answer[:200]))

    def _problem_of(self, row: Mapping[str, Any]) -> Problem | str:
        if "query" in row and "gold" in row:
            found = _agieval(row)
            if isinstance(found, str):
                return found
            row = found
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            return f"question must be text, not {str(question)[:60]!r}"
        read = _options_of(row)
        if isinstance(read, str):
            return read
        options, right = read
        seed, moving = self.config.shuffle_seed, not any(map(_ABOUT_OTHERS.search, options))
        if seed is None or not moving:
            return choice_problem(question.strip(), options, right)
        order = list(range(len(options)))
        random.Random(f"{seed}/{_hash(question, options)}").shuffle(order)
        return choice_problem(question.strip(), [options[n] for n in order], order.index(right))


def _options_of(row: Mapping[str, Any]) -> tuple[list[str], int] | str:
    """A row's options and the place of the right one, or what is wrong with them.

    MMLU has `choices` and the place as `answer`; MMLU-Pro `options`, and `answer` as a letter; ARC `choices` of texts
    and their labels, and `answerKey`, one of these.
    """
    if "answerKey" in row:
        return _arc(row.get("choices"), row["answerKey"])
    name = next((name for name in ("choices", "options") if name in row), None)
    if name is None or "answer" not in row:
        return (
            "needs the columns of MMLU (question, choices, answer), MMLU-Pro (question, options, answer), ARC "
            "(question, choices, answerKey) or AGIEval (query, choices, gold); it has "
            f"{', '.join(map(str, row)) or 'none'}"
        )
    options = row[name]
    if not are_options(options):
        return f"{name} must be a list of 2 to {len(LETTERS)} texts, not {str(options)[:60]!r}"
    answer = row["answer"]
    places = [str(n) for n in range(len(options))] if name == "choices" else []
    known = [*places, *LETTERS[: len(options)]]
    if isinstance(answer, bool) or str(answer).strip() not in known:
        return f"answer must be {known[0]} to {known[-1]}, not {str(answer)[:60]!r}"
    right = known.index(str(answer).strip()) % len(options)
    if name == "options" and row.get("answer_index") not in (None, right):
        return f"answer is {answer!r}, and answer_index {str(row['answer_index'])[:60]!r}"
    return one_line(options), right


def _agieval(row: Mapping[str, Any]) -> dict[str, Any] | str:
    """A row of AGIEval in MMLU's columns, or what is wrong with it.

    `query` is `Q: ... Answer Choices: (A)... A: Among A through D, the answer is`, `choices` begin with their letters,
    and `gold` is a list with the right one's place.
    """
    query, choices, gold = row["query"], row.get("choices"), row["gold"]
    if not isinstance(query, str):
        return f"query must be text, not {str(query)[:60]!r}"
    if not isinstance(gold, list) or len(gold) != 1:
        return f"gold must be a list of one place, not {str(gold)[:60]!r}"
    if isinstance(choices, list):
        choices = [re.sub(r"\A\s*\([A-Z]\)", "", c) if isinstance(c, str) else c for c in choices]
    question = question_of(query).rpartition("Answer Choices:")[0] or question_of(query)
    return {"question": question, "choices": choices, "answer": gold[0]}


def _arc(choices: object, key: object) -> tuple[list[str], int] | str:
    texts = choices.get("text") if isinstance(choices, Mapping) else None
    labels = choices.get("label") if isinstance(choices, Mapping) else None
    if not are_options(texts) or not isinstance(labels, list) or len(labels) != len(texts):
        return f"choices must hold text and label, lists of 2 to {len(LETTERS)}, not {str(choices)[:60]!r}"
    if labels.count(key) != 1:
        return f"answerKey must be one of {', '.join(map(str, labels))}, not {str(key)[:60]!r}"
    return one_line(texts), labels.index(key)


def are_options(value: object) -> TypeGuard[list[object]]:
    """Whether a value is a list of 2 to 26 texts or numbers."""
    return (
        isinstance(value, list)
        and 2 <= len(value) <= len(LETTERS)
        and all(isinstance(v, str) or is_number(v) for v in value)
    )


def one_line(options: Sequence[object]) -> list[str]:
    """Options as text, each on one line."""
    return [" ".join(str(option).split()) for option in options]


def choice_problem(question: str, options: Sequence[str], right: int | None) -> Problem:
    """The problem of a question and its options; `right` is the place of the right one, None where it is not known."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return Problem(
        f"choice-{_hash(question, options):016x}",
        f"{question}\n\n{listed}\n\n{ASK}",
        {"options": tuple(options), "right": right},
    )


def _hash(question: str, options: Sequence[str]) -> int:
    # The same question with other options is another problem, with its options in another order it is not.
    return problem_hash([_squeezed(question), sorted(map(_squeezed, options))])


def _squeezed(text: str) -> str:
    return re.sub(r"[\s$]+", "", text).lower()
