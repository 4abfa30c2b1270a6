"""The program itself, in the process of one case: how it is loaded, and how its process ends."""

from __future__ import annotations

import atexit
import builtins
import os
import sys
from types import ModuleType

TYPE_CHECKING = False  # importing typing would take as long as all the others
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_loaded: list[dict[str, Any]] = []


def load(program: str, name: str, setup: str = "") -> dict[str, Any]:
    """Run a program's text as the module `name`; its names."""
    module = ModuleType(name)
    sys.modules[name] = module
    _loaded.append(module.__dict__)
    sys.argv = ["solution.py"]
    # Without the `site` module, which adds them.
    for leave in ("exit", "quit"):
        setattr(builtins, leave, sys.exit)
    for text, file in ((setup, "setup.py"), (program, "solution.py")):
        exec(compile(text, file, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def end(run: Callable[[], None]) -> None:
    """Run, and end this process as Python would, but for taking itself apart, which would cost most of a short case."""
    status = 0
    try:
        try:
            run()
        finally:
            if "threading" in sys.modules:
                sys.modules["threading"]._shutdown()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        if status == 1 and left.code != 1:
            print(left.code, file=sys.stderr)
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())
    try:
        atexit._run_exitfuncs()
        # Files that a program forgot to close are flushed when its names go.
        for names in _loaded:
            names.clear()
        for file in (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__):
            if file is not None and not file.closed:
                file.flush()
    except BaseException:
        status = status or 120
    os._exit(status & 255)
