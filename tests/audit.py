"""Known vulnerabilities among the pinned dependencies: python -m tests.audit

Exit status 0: none is known. 1: some are, or a package could not be looked up. 3: nothing was audited, for the service
that knows of vulnerabilities cannot be reached. pip-audit takes a service that knows nothing for good news, so a
version that is known to be vulnerable is looked up with the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FILES = ("constraints.txt", "tests/clients/requirements.txt")

CANARY = ("jinja2", "2.11.2")
"""CVE-2020-28493, CVE-2024-22195 and others."""

IGNORED: dict[str, str] = {}
"""Findings that do not concern selfroute, by id, each with the reason."""

NOT_RUN = 3


def judge(canary: list[dict[str, Any]], found: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """The exit status, and what to say; both lists are `dependencies` of pip-audit's JSON."""
    if not any(package.get("vulns") for package in canary):
        return NOT_RUN, ["NOT AUDITED: the service that knows of vulnerabilities cannot be reached from here"]
    said = []
    for package in found:
        name = f"{package['name']} {package.get('version', '')}".strip()
        if reason := package.get("skip_reason"):
            said.append(f"{name}: not audited: {reason}")
        for finding in package.get("vulns", ()):
            if finding["id"] not in IGNORED:
                fixed = ", ".join(finding["fix_versions"]) or "no version yet"
                said.append(f"{name}: {finding['id']}, fixed in {fixed}: {finding['description'][:200]}")
    return (1 if said else 0), said or [f"{len(found)} packages, no known vulnerability"]


def look_up(pins: list[str]) -> list[dict[str, Any]]:
    """What pip-audit says of these; nothing where it breaks off."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "-r", file.name, "-f", "json"]
        done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True, timeout=600)
    if not done.stdout.startswith("{"):
        print(done.stderr[-500:], file=sys.stderr)
        return []
    return list(json.loads(done.stdout)["dependencies"])


def main() -> int:
    """Audit all files."""
    import pip_audit  # noqa: F401 (else its absence would look like that of the service)

    canary = look_up(["==".join(CANARY)])
    known = any(package.get("vulns") for package in canary)
    found = [package for name in FILES for package in look_up(Path(name).read_text().splitlines())] if known else []
    status, said = judge(canary, found)
    print("\n".join(said))
    return status


if __name__ == "__main__":
    sys.exit(main())
