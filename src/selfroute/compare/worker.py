"""One part of a comparison in a process of its own; `compare.jobs` starts it and says how they talk."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> None:
    # Whatever else prints must not get between the lines of JSON.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Ctrl-C while torch is imported ends the worker without a word.
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(1))
    from selfroute import errors
    from selfroute.compare.config import CompareConfig
    from selfroute.compare.run import Matrix
    from selfroute.config import validate

    signal.signal(signal.SIGINT, signal.default_int_handler)

    def say(**message: Any) -> None:
        print(json.dumps(message), file=channel, flush=True)

    part = json.loads(sys.stdin.readline())
    threading.Thread(target=_watch, daemon=True).start()
    try:
        config = validate(CompareConfig, part["config"], "a part of the comparison")
        Matrix(config, Path(part["testbed"]), lambda *at: say(progress=at)).run()
    except errors.SelfrouteError as error:
        # A user's own subclass is named by the one that the parent knows.
        say(error=next(c.__name__ for c in type(error).__mro__ if hasattr(errors, c.__name__)), text=str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # The parent lets go when the channel closes, and nothing is left to stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _watch() -> None:
    """Stop, as by Ctrl-C, when the parent is gone."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
