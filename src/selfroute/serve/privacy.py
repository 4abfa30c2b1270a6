"""The gateway's settings of what may leave the machine, and in which form."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from selfroute.config import Config
from selfroute.types import Redact


class Privacy(Config):
    """What may leave the machine, and in which form."""

    redact: Redact = "never"
    """Whether personal data leaves as placeholders: `never`, `asked` (where a request says so), or `always`."""
    rules: str = ""
    """A rule file (docs/privacy.md): what keeps its request here, or leaves as a placeholder. It is always in force."""
    entities: tuple[str, ...] = (
        *("CREDIT_CARD", "CRYPTO", "EMAIL_ADDRESS", "IBAN_CODE", "IP_ADDRESS", "MAC_ADDRESS", "MEDICAL_LICENSE"),
        *("PHONE_NUMBER", "UK_NHS", "UK_NINO", "US_BANK_NUMBER", "US_ITIN", "US_PASSPORT", "US_SSN"),
    )
    """Presidio's entity types that are redacted; a `model` adds `PERSON`, `LOCATION`, `ORGANIZATION` and `NRP`."""
    language: str = "en"
    """The language whose words help to tell a number from another, as spaCy calls it."""
    model: str = ""
    """A spaCy model that is installed, by name, or its folder: it finds names of people and places, too."""
    min_score: float = Field(0.4, ge=0, le=1)
    """How sure a recogniser must be. Weak ones reach 0.4 where a word such as "account" stands before the number."""
    unreadable: Literal["block", "pass"] = "block"
    """Images and audio, in which nothing can be found, where a request is redacted or there are rules."""
    max_chars: int = Field(50_000, ge=100)
    """Characters of a hand-off; a longer one stays here."""
    timeout_s: float = Field(5.0, gt=0, le=30)
    """Seconds that the check may take, waiting included; a hand-off that is not checked then stays here."""
