"""How a sandbox is shut in: the user that it runs as, and bubblewrap's command line."""

from __future__ import annotations

import os
import shutil
from functools import cache

from selfroute.errors import TaskError
from selfroute.tasks.seccomp import seccomp_filter

NOBODY = 65534
"""The user and group that programs run as."""


@cache
def python() -> str:
    """The Python that programs run on: one that the sandbox sees."""
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.access(path, os.X_OK):
            return os.path.realpath(path)
    raise TaskError("programs run on the system's Python, but there is no /usr/bin/python3 or /usr/local/bin/python3")


def _command(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise TaskError(f"there is no `{name}` (on Debian and Ubuntu: apt-get install {package})")
    return found


def unprivileged() -> list[str]:
    """As root: a command that becomes nobody first, since limits and file permissions bind others only."""
    if os.getuid() != 0:
        return []
    return [_command("setpriv", "util-linux"), f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]


def bubblewrap() -> str:
    """Where bubblewrap is."""
    return _command("bwrap", "bubblewrap")


def shut_in(rules: int, info: int, *, file_system_bytes: int) -> list[str]:
    """What bubblewrap is told, but for what it runs.

    Args:
        rules: a file that holds the filter on system calls.
        info: a file to write the first process's number to.
        file_system_bytes: how much /tmp and /dev/shm hold, each.
    """
    size = str(file_system_bytes)
    links = [name for name in ("bin", "lib", "lib64") if os.path.islink(f"/{name}")]
    return [
        "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent",
        "--new-session", "--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL",
        "--clearenv", "--setenv", "PYTHONHASHSEED", "0", "--hostname", "sandbox", "--ro-bind", "/usr", "/usr",
        *(word for name in links for word in ("--symlink", f"usr/{name}", f"/{name}")),
        "--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", "/dev/shm", "--size", size, "--tmpfs", "/tmp",
        # A shared mapping of /dev/zero is memory that no limit counts; on a mount of this kind no device can be opened.
        "--ro-bind", "/dev/null", "/dev/zero",
        # What bubblewrap makes on its way is writable, and as large as memory.
        "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp",
        "--seccomp", str(rules), "--info-fd", str(info),
    ]  # fmt: skip


def filter_pipe() -> int:
    """A pipe that holds the filter on system calls, which fits into it."""
    rules = seccomp_filter()
    read, write = os.pipe()
    os.write(write, rules)
    os.close(write)
    return read
