"""The command line in this process: torch is imported once, however many commands a test runs."""

from __future__ import annotations

from typer.testing import CliRunner

from selfroute.cli import app


def selfroute(*args: object) -> str:
    """What a command prints; what it raises is raised here."""
    # As wide as any table, whatever a library put into the environment.
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output
