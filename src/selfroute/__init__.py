"""selfroute: small models that know when to ask.

    import selfroute

    with selfroute.load("runs/demo", budget=0.3) as pair:
        print(pair.answer("numbers 3, 7, 25; target 46"))

The functions live in `selfroute.api` and are imported on first use, so that `import selfroute` is free.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Pair", "Reply", "calibrate", "evaluate", "load", "report", "train", "warmstart"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from selfroute import api

        return getattr(api, name)
    raise AttributeError(f"module 'selfroute' has no attribute {name!r}")
