"""Optional dependencies, and the commands that install them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from selfroute.errors import SelfrouteError

_OPTIONAL = (
    *("peft", "psutil", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "sklearn", "gguf"),
    *("prometheus_client", "sqlalchemy", "starlette", "uvicorn"),
)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn a missing optional dependency into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in _OPTIONAL:
            raise SelfrouteError(
                f"this needs {error.name}: pip install 'selfroute[{extra}]' (in a checkout: pip install '.[{extra}]')"
            ) from error
        raise
