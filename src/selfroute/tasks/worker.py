"""A worker process: runs one function for its pool until the pool is gone.

Started as `python -m selfroute.tasks.worker FD package.module:function MEMORY_BYTES`. Over the socket FD goes JSON:
first `{}` or an error, then a reply to each request `[most_s, arguments]`.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

GRACE_S = 5.0
"""How long after what a call may take at most a worker ends by itself, for which the pool must be gone."""


def main(fd: int, path: str, memory_bytes: int) -> None:
    """Import the function, say so, and serve."""
    # To stop is the pool's business, which hangs up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with Connection(fd) as line, open(os.devnull, "w") as nowhere:
        module, _, name = path.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:
            _say(line, json.dumps({"error": f"{type(error).__name__}: {error}"}))
            return
        # Where a system keeps no such limit, that on time holds all the same.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        _say(line, "{}")
        while True:
            try:
                most_s, arguments = json.loads(line.recv_bytes())
            except (EOFError, OSError):
                return
            # A watchdog that needs no interpreter lock: a worker that hangs must not outlive a pool that was killed.
            faulthandler.dump_traceback_later(most_s + GRACE_S, exit=True, file=nowhere)
            try:
                # A result that JSON cannot hold is an error of the function, too.
                reply = json.dumps({"result": function(*arguments)})
            except Exception as error:
                reply = json.dumps({"error": f"{type(error).__name__}: {str(error)[:2000]}"})
            faulthandler.cancel_dump_traceback_later()
            _say(line, reply)


def _say(line: Connection, reply: str) -> None:
    with suppress(OSError):
        line.send_bytes(reply.encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
