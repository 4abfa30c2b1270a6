"""A PostgreSQL server of the tests' own: in a temporary folder, on a socket in there, on no port."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A test's database need not survive a power cut.
SETTINGS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "listen_addresses": "''"}


@contextmanager
def server() -> Iterator[str]:
    """The URL of a server's database `postgres`; needs the programs of Debian's package `postgresql`."""
    # Debian keeps them out of PATH, by version.
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    initdb = str(found[-1]) if found else shutil.which("initdb")
    assert initdb, "these tests need a PostgreSQL server: apt-get install postgresql"
    # It refuses to run as root; a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    other = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    if other:
        shutil.chown(folder, "postgres", "postgres")
    data = folder / "data"

    def run(program: str, *args: str) -> None:
        command = [str(Path(initdb).with_name(program)), "-D", str(data), *args]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, **other)
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        run("initdb", "-U", "selfroute", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        settings = " ".join(f"-c {name}={value}" for name, value in SETTINGS.items())
        run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", f"{settings} -k {folder}", "start")
        try:
            yield f"postgresql://selfroute@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
