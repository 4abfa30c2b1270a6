"""What of a hand-off is personal, or named by a rule: found in a worker process, which can be killed when it is late.

`find` is what the workers run (see `tasks.pool`): Presidio's pattern recognisers and RE2 want processor time, and would
hold up the gateway's loop in its own process. What is found is told as places, never as text, and so are failures.
Left out on purpose: what is done with it (`redaction`, `border`).
"""

from __future__ import annotations

import json
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

from selfroute.serve.rules import Rule, matcher

Span = tuple[int, int, str]
"""Where it stands in its text (start, end), and what it is: an entity's label, or "rule:" and the rule's name."""

LABELS: Mapping[str, str] = {
    "EMAIL_ADDRESS": "EMAIL",
    "PHONE_NUMBER": "PHONE",
    "IBAN_CODE": "IBAN",
    "IP_ADDRESS": "IP",
    "MAC_ADDRESS": "MAC",
}
"""Entities whose placeholder is shorter than their name."""

# Any address that has the form of one: Presidio's own checks the top-level domain against a list that it fetches from
# the network, lets those of private networks pass, and takes quadratic time.
_MAIL = r"(?<![\w.!#$%&'*+/=?^`{|}~-])[\w.!#$%&'*+/=?^`{|}~-]{1,64}@\w[\w-]{0,62}(?:\.\w[\w-]{0,62})+"

_NAMED = frozenset({"PERSON", "LOCATION", "ORGANIZATION", "NRP"})
"""What a model finds beside the patterns."""

_PROMISING = re.compile(r"[\d@:]|\w\.\w")
"""What every text has in which a pattern finds something; most names and words of tools have none of it."""

_CACHED, _SHORT = 4096, 1000
"""Texts of so many characters at most whose findings a worker remembers."""

_SHORTEST = 4
"""Characters of what is looked for again, where no recogniser saw it."""


def find(settings: str, texts: Sequence[str], redact: bool) -> dict[str, Any]:
    """What stands in the texts, by settings (JSON of `_Finder`'s arguments): `{"blocked": rule, "spans": [[...]]}`.

    Raises:
        ValueError: the settings cannot be used.
        RuntimeError: it failed; no text is told.
    """
    finder = _made(settings)
    try:
        return finder.find(texts, redact)
    except Exception as error:
        # Messages of libraries may repeat what they read.
        raise RuntimeError(type(error).__name__) from None


def entities(language: str, model: str) -> list[str]:
    """The entity types that can be found.

    Raises:
        ValueError: no such language, or no such model is installed.
    """
    _pipeline(language, model)
    return sorted(_known(language, model))


@lru_cache(maxsize=2)
def _made(settings: str) -> _Finder:
    return _Finder(**json.loads(settings))


class _Finder:
    """Finds.

    Args:
        wanted: entity types to redact.
        rules: what must never leave, as `rules.Rule` has it.
        language: of the texts.
        model: a spaCy model that is installed, or its folder; "": patterns alone.
        min_score: how sure a recogniser must be.

    Raises:
        ValueError: no such language, no such entity type, or no such model is installed.
    """

    def __init__(
        self, wanted: Sequence[str], rules: Sequence[Mapping[str, Any]], language: str, model: str, min_score: float
    ) -> None:
        self._min_score, self._by_patterns = min_score, not model
        made = [Rule(**rule) for rule in rules]
        self._matchers = [(rule, matcher(rule)) for rule in made if not rule.entity]
        self._entities = [rule for rule in made if rule.entity]
        self._order = [rule.name for rule in made]
        self._wanted = frozenset(wanted) | (_NAMED if wanted and model else frozenset())
        self._analyse: Analyse | None = None
        if self._wanted or self._entities:
            self._analyse = _analyser(language, model, self._wanted | {rule.entity for rule in self._entities})
        # Tools and the beginning of a conversation come again with every request.
        self._known = lru_cache(maxsize=_CACHED)(self._personal)

    def find(self, texts: Sequence[str], redact: bool) -> dict[str, Any]:
        """The first rule (in their order) that keeps the texts here, or the places of what is to be redacted."""
        always = {rule.entity for rule in self._entities}
        wanted = tuple(sorted(always | self._wanted if redact else always))
        blocked: set[str] = set()
        spans: list[list[Span]] = []
        for text in texts:
            found: list[Span] = []
            for start, end, entity in (self._known if len(text) <= _SHORT else self._personal)(text, wanted):
                names = {rule.name: rule.action for rule in self._entities if rule.entity == entity}
                blocked |= {name for name, action in names.items() if action == "block"}
                found.append((start, end, LABELS.get(entity, entity)))
            for rule, matches in self._matchers:
                places = matches(text)
                if places and rule.action == "block":
                    blocked.add(rule.name)
                found += [(start, end, f"rule:{rule.name}") for start, end in places]
            spans.append(merged(found))
        if blocked:
            return {"blocked": next(name for name in self._order if name in blocked), "spans": []}
        return {"blocked": "", "spans": spread(texts, spans)}

    def _personal(self, text: str, wanted: tuple[str, ...]) -> list[Span]:
        if not wanted or self._analyse is None or (self._by_patterns and not _PROMISING.search(text)):
            return []
        return [(r.start, r.end, r.entity_type) for r in self._analyse(text, list(wanted), self._min_score)]


def merged(spans: Sequence[Span]) -> list[Span]:
    """Spans in order, those that overlap made one, of the kind of the longest.

    >>> merged([(0, 9, "PHONE"), (4, 6, "IP"), (20, 22, "IP")])
    [(0, 9, 'PHONE'), (20, 22, 'IP')]
    """
    result: list[Span] = []
    longest = 0
    for start, end, kind in sorted(spans):
        if not result or start >= result[-1][1]:
            result.append((start, end, kind))
            longest = end - start
            continue
        first, last, before = result[-1]
        result[-1] = (first, max(last, end), kind if end - start > longest else before)
        longest = max(longest, end - start)
    return result


def spread(texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[list[Span]]:
    """The spans, and wherever the same stands again: what needed its context to be seen is seen without it, too.

    >>> spread(["My SSN is 536-90-4399.", "536-90-4399, not 1536-90-4399"], [[(10, 21, "US_SSN")], []])
    [[(10, 21, 'US_SSN')], [(0, 11, 'US_SSN')]]
    """
    known = {text[start:end]: kind for text, found in zip(texts, spans, strict=True) for start, end, kind in found}
    # Looked for in all texts at once: one after the other, many values in many texts would take seconds.
    whole = "\0".join(texts)
    begins = list(accumulate((len(text) + 1 for text in texts), initial=0))
    again: list[list[Span]] = [[] for _ in texts]
    for value, kind in known.items():
        for at in _places(whole, value) if len(value) >= _SHORTEST else ():
            n = bisect_right(begins, at) - 1
            start, end = at - begins[n], at - begins[n] + len(value)
            if end <= len(texts[n]):
                again[n].append((start, end, kind))
    return [merged([*found, *more]) for found, more in zip(spans, again, strict=True)]


def _places(text: str, value: str) -> list[int]:
    """Where a text has a value that is no part of a longer word."""
    places, at = [], text.find(value)
    while at >= 0:
        end = at + len(value)
        if not (_word(text[at - 1 : at]) and _word(value[0])) and not (_word(text[end : end + 1]) and _word(value[-1])):
            places.append(at)
        at = text.find(value, end)
    return places


def _word(character: str) -> bool:
    return bool(re.match(r"\w", character))


def _pipeline(language: str, model: str) -> Any:
    """The spaCy pipeline: a blank one, or a model that is there already; none is ever downloaded."""
    if not _has_transformer(model):
        # Neither is needed then, and each costs seconds and hundreds of megabytes to import.
        for heavy in ("torch", "transformers"):
            sys.modules.setdefault(heavy, None)  # type: ignore[arg-type]
    import spacy.language
    import spacy.tokenizer
    import spacy.util

    if not model:
        try:
            pipeline = spacy.blank(language)
        except ImportError:
            raise ValueError(f"spaCy knows no language {language!r} (privacy.language)") from None
        # spaCy's own takes quadratic time for what is no prose.
        pipeline.tokenizer = spacy.tokenizer.Tokenizer(pipeline.vocab, infix_finditer=re.compile(r"\W").finditer)
    elif spacy.util.is_package(model) or Path(model).is_dir():
        pipeline = spacy.load(model)
    else:
        raise ValueError(f"no spaCy model {model!r} is installed: python -m spacy download {model} (privacy.model)")
    if "lemmatizer" not in pipeline.pipe_names:
        spacy.language.Language.component("selfroute_lower_case", func=_lower_case)
        pipeline.add_pipe("selfroute_lower_case")
    return pipeline


def _has_transformer(model: str) -> bool:
    """Whether a spaCy model says that it needs one."""
    meta = Path(model) / "meta.json"
    if model and meta.is_file():
        needs = json.loads(meta.read_text(encoding="utf-8")).get("requirements") or []
    else:
        needs = metadata.requires(model) or [] if model and find_spec(model) else []
    return any("transformers" in need for need in needs)


def _lower_case(document: Any) -> Any:
    """Words in lower case as their lemmas: Presidio looks for its context words among these."""
    for token in document:
        token.lemma_ = token.lower_
    return document


def _known(language: str, model: str) -> dict[str, list[Any]]:
    """Recognisers by entity type, of all countries; of these, none asks the network."""
    from presidio_analyzer import Pattern, PatternRecognizer, predefined_recognizers

    mail = Pattern("address", _MAIL, 0.5)
    known: dict[str, list[Any]] = {
        "EMAIL_ADDRESS": [PatternRecognizer("EMAIL_ADDRESS", patterns=[mail], supported_language=language)]
    }
    for name in predefined_recognizers.__all__:
        kind = getattr(predefined_recognizers, name)
        if isinstance(kind, type) and (issubclass(kind, PatternRecognizer) or name == "PhoneRecognizer"):
            made = kind(supported_language=language)
            if made.supported_entities != ["EMAIL_ADDRESS"]:
                known.setdefault(made.supported_entities[0], []).append(made)
    if model:
        named = predefined_recognizers.SpacyRecognizer(supported_language=language)
        for entity in named.supported_entities:
            known.setdefault(entity, []).append(named)
    return known


Analyse = Callable[[str, list[str], float], list[Any]]


def _analyser(language: str, model: str, wanted: Collection[str]) -> Analyse:
    """What finds entities in a text."""
    # Before Presidio is imported, see there.
    pipeline = _pipeline(language, model)
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    engine: Any = SpacyNlpEngine()
    engine.nlp = {language: pipeline}
    known = _known(language, model)
    if unknown := sorted(set(wanted) - known.keys()):
        raise ValueError(f"there is no {', '.join(unknown)} (privacy.entities; known: {', '.join(sorted(known))})")
    recognisers = {id(r): r for entity in wanted for r in known[entity]}
    registry = RecognizerRegistry(list(recognisers.values()), supported_languages=[language])
    analyser = AnalyzerEngine(registry, engine, supported_languages=[language])
    return lambda text, wanted, score: analyser.analyze(text, language, wanted, score_threshold=score)
