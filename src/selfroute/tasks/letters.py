r"""Which option of a multiple-choice question an answer picks, by its letter, its text, or both.

    "B", "(b)", "\boxed{B}", "B. Paris", "Paris", "The answer is B."  ->  option B
    "A or B", "B. London", "not A", "a bit unclear"                   ->  none, and why

Total and in linear time, on any text. An answer that names several options, or a letter with another option's text,
picks none: a guess must not count for what is right in it. Left out on purpose: which option is right.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

from selfroute.tasks.latex import WRAPPED, extract

LETTERS = string.ascii_uppercase
MAX_ANSWER_CHARS = 4000
"""Longer answers are not read; an honest one is an option, with perhaps a sentence around it."""

_BOX = re.compile(r"(?=\\(?:boxed|fbox))")
_INVISIBLE = {"Cf", "Cc", "Cs", "Co", "Cn"}
_LEAD = re.compile(
    r"\A(?:(?:so|thus|hence|therefore),?\s)?(?:(?:the|my)\s)?(?:(?:correct|right|best|final)\s){0,2}"
    r"(?:answer|option|choice)(?:\s(?:is|would be))?(?:\s?[:=]\s?|\s)|\A(?:it is|it's|i (?:choose|pick|select))\s",
    re.IGNORECASE,
)
_BARE = re.compile(r"(?:(?:option|choice|letter)\s)?[(\[{]?([A-Za-z])[)\]}]?[.:,;!]?", re.IGNORECASE)
_LABELLED = re.compile(r"(?:[(\[]([A-Za-z])[)\]][.:]?\s?|([A-Za-z])(?:[.):]| [-–—])\s)(.+)", re.DOTALL)
# A capital alone. `A` and `I` before a word are an article and a pronoun, but for what follows an option's letter.
_CAPITAL = re.compile(
    r"(?<![\w'’\\^=+-])(?:(?<=[oO]ption )|(?<=[cC]hoice )|(?<=[lL]etter )|"
    r"(?![AI] (?!(?:is|because|since|and|or|as)\b)[a-z]))([A-Z])(?![\w'’^=+*]|-\w)"
)
_SMALL = re.compile(r"\(([a-z])\)|\b(?:answer(?: is)?:?|option|choice|letter) ([a-z])(?=[.,;:!)]|\Z)")
_NOT = re.compile(
    r"\b(?:not|cannot|never|neither|nor|except|wrong|incorrect|false|eliminated?|ruled? out)\b|n['’]t\b", re.IGNORECASE
)


def pick(answer: str, options: Sequence[str]) -> int | str:
    r"""The place of the option, of at most 26, that an answer picks; or why it picks none.

    Where there are boxes, what is inside them counts alone.

    >>> pick("The answer is a bit unclear. I choose C.", ["red", "green", "blue"])
    2
    >>> pick(r"\boxed{\text{green}}", ["red", "green", "blue"])
    1
    >>> pick("B. red", ["red", "green", "blue"])
    'the letter B with the text of A'
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return f"longer than {MAX_ANSWER_CHARS:,} characters"
    shown = [plain(option) for option in options]
    boxes = [extract(piece) for piece in _BOX.split(answer) if _BOX.match(piece)]
    picked = list(dict.fromkeys(_pick(plain(text), shown) for text in (list(filter(None, boxes)) or [answer])))
    places = [one for one in picked if isinstance(one, int)]
    return _several(places) if len(places) > 1 else picked[-1] if len(picked) == 1 else "boxes that disagree"


def plain(text: str) -> str:
    """Text in one spelling, without what only makes it look different; capitals are kept, as in `Aa` and `AA`."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c if unicodedata.category(c) not in _INVISIBLE else " " if c.isspace() else "" for c in text)
    text = re.sub(r"\$|\*\*|`", "", WRAPPED.sub(r"\1", text))
    text = re.sub(r"\\[()\[\],;:! ]", " ", text)
    return " ".join(text.split()).strip("\"'“”‘’ ")


def folded(text: str) -> str:
    """Text without its capitals and end mark."""
    return text.casefold().rstrip(" .,;:!")


def letter_of(answer: str) -> str:
    """The letter that an answer gives, whatever the options are; "" where it gives none or several."""
    picked = pick(answer, LETTERS)
    return LETTERS[picked] if isinstance(picked, int) else ""


def _pick(text: str, options: Sequence[str]) -> int | str:
    said = _LEAD.sub("", text)
    bare = _BARE.fullmatch(said)
    if bare and _place(bare[1]) < len(options):
        return _place(bare[1])
    for whole in (text, said):
        same = _same(whole, options)
        if same:
            return same[0] if len({options[n] for n in same}) == 1 else _several(same)
    if bare:
        return f"there is no option {bare[1].upper()}"
    labelled = _LABELLED.fullmatch(said)
    place = _place(labelled[1] or labelled[2]) if labelled else len(options)
    if labelled and place < len(options):
        same = _same(labelled[3], options)
        if same:
            return place if place in same else _torn(place, same[0])
    return _read(text, options)


def _read(text: str, options: Sequence[str]) -> int | str:
    """The option that a sentence is about."""
    named = [n for n, option in enumerate(options) if len(option) > 2 and _within(option, text)]
    # What stands in an option's text is no letter of an option.
    for n in sorted(named, key=lambda n: -len(options[n])):
        text = re.sub(re.escape(options[n]), " … ", text, flags=re.IGNORECASE)
    if _NOT.search(text):
        return "it says what is not so"
    letters = [*_CAPITAL.findall(text), *(a or b for a, b in _SMALL.findall(text))]
    places = sorted({_place(letter) for letter in letters if _place(letter) < len(options)})
    if len(places) != 1:
        return _several(places) if places else "it names no option"
    return places[0] if not named or places[0] in named else _torn(places[0], named[0])


def _same(text: str, options: Sequence[str]) -> list[int]:
    """The options that have this text, capitals and an end mark aside where none has it exactly."""
    exact = [n for n, option in enumerate(options) if option == text]
    wanted = folded(text)
    return exact or [n for n, option in enumerate(options) if wanted and folded(option) == wanted]


def _within(option: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text, re.IGNORECASE) is not None


def _place(letter: str) -> int:
    return LETTERS.index(letter.upper())


def _several(places: Sequence[int]) -> str:
    return f"several options: {', '.join(LETTERS[n] for n in sorted(places))}"


def _torn(letter: int, text: int) -> str:
    return f"the letter {LETTERS[letter]} with the text of {LETTERS[text]}"
