"""One of a gateway's workers: `python -m selfroute.serve.worker FD`, as `workers` starts it.

FD is the socket to serve on. The standard input has one line of JSON, the config and the parent's import path, and ends
when the parent does. The standard output gets one line: that it serves, or what keeps it from that.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys


def main() -> None:
    """Serve until a signal, or until the parent is gone."""
    log_format = "%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=log_format)
    # Whatever else prints goes to the standard error, which everybody reads.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(error: str = "") -> None:
        with answers:
            answers.write(json.dumps({"error": error}) + "\n")

    told = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = told["path"]

    from selfroute.errors import SelfrouteError
    from selfroute.serve.config import GatewayConfig
    from selfroute.serve.server import serve

    try:
        with socket.socket(fileno=int(sys.argv[1])) as listener:
            serve(GatewayConfig.model_validate(told["config"]), listener, say, parent=sys.stdin.fileno())
    except SelfrouteError as error:
        if answers.closed:
            raise
        say(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
