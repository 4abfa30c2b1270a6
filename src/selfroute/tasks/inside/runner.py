"""Starts a fresh process for each case of one program, and reports what became of it.

A program runs in one of four modes. `script`: as a script, with the case as its standard input. `call`: one of its
functions is called with the case's arguments, and what it returns goes to a pipe of its own, which prints do not reach.
`serve` and `tests`: two sandboxes, linked by two pipes (see `linked`).
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import sys

from selfroute.tasks.inside.linked import serve, tests
from selfroute.tasks.inside.program import end, load
from selfroute.tasks.inside.wire import pack, read, unpack, write

TYPE_CHECKING = False  # importing typing would take as long as all the others
if TYPE_CHECKING:
    from typing import Any

# Modules that programs often import: imported before the first case, so that each case has them for nothing.
_WARM = {
    "bisect", "collections", "copy", "dataclasses", "decimal", "enum", "fractions", "functools", "heapq", "io",
    "itertools", "math", "operator", "random", "re", "string", "typing",
}  # fmt: skip


def main() -> None:
    """Serve cases until the other side hangs up; in a case's own process, run the program and return."""
    requests, replies, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    start = read(requests)
    _close_but({requests, replies, *start["link"]})
    _give_away(start)
    sys.path.remove("")
    for line in (start["setup"] + "\n" + start["program"]).splitlines():
        words = line.replace(",", " ").split()
        for name in words[1:] if words[:1] in (["import"], ["from"]) else ():
            if name in _WARM:
                __import__(name)
    write(replies, {"ready": True})
    while True:
        frame = read(requests)
        case = _Case(start, frame["case"])
        if case.pid == 0:
            break
        write(replies, case.watch())
    _close_but(case.kept)
    end(lambda: _MODES[start["mode"]](start, frame["case"], case.answers[1]))


def _close_but(kept: set[int]) -> None:
    """Close all files but the standard ones and these."""
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in kept:
            try:
                os.close(number)
            except OSError:
                pass  # the listing's own


def _give_away(start: dict[str, Any]) -> None:
    """Limits of this process and of all that come from it, which nobody here can raise again."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass  # only a hint to the kernel: of all, kill these first
    # With 0, a program that the host has for core dumps would still be started; with 1 it is not.
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    resource.setrlimit(resource.RLIMIT_NOFILE, (start["open_files"] + 16,) * 2)
    # Room for this process itself, and what it holds of a case.
    space = start["memory_bytes"] + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    if start["isolated"]:
        # A user namespace of its own counts its own processes only: this one and its parent on top.
        resource.setrlimit(resource.RLIMIT_NPROC, (start["processes"] + 3,) * 2)


class _Case:
    """One case in a process of its own; `pid` is 0 in that process."""

    def __init__(self, start: dict[str, Any], text: str) -> None:
        self.start = start
        # The input is a file: programs may ask for its size, and no pipe can fill up.
        given = os.open(".input", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.unlink(".input")
        rest = memoryview(text.encode("utf-8", "replace") if start["mode"] == "script" else b"")
        while rest:
            rest = rest[os.write(given, rest) :]
        os.lseek(given, 0, os.SEEK_SET)
        self.out, self.err, self.answers = os.pipe(), os.pipe(), os.pipe()
        self.kept = {self.answers[1], *start["link"]}
        self.pid = os.fork()
        if self.pid == 0:
            self._become(given)
            return
        for number in (given, self.out[1], self.err[1], self.answers[1], *start["link"]):
            os.close(number)

    def _become(self, given: int) -> None:
        """In the case's own process: its standard files, its limits, and a `__main__` without this file's names."""
        for standard, number in enumerate((given, self.out[1], self.err[1])):
            os.dup2(number, standard)
        for standard, (name, mode, errors) in enumerate(
            [("stdin", "r", "surrogateescape"), ("stdout", "w", "surrogateescape"), ("stderr", "w", "backslashreplace")]
        ):
            file = open(standard, mode, encoding="utf-8", errors=errors, closefd=False)
            setattr(sys, name, file)
            setattr(sys, f"__{name}__", file)
        start = self.start
        cpu_s = math.ceil(start["cpu_s"])
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (start["file_bytes"],) * 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (start["open_files"],) * 2)
        resource.setrlimit(resource.RLIMIT_AS, (start["memory_bytes"],) * 2)
        if not start["isolated"]:
            # Without a namespace nothing could find its processes again, so it starts none.
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))

    def watch(self) -> dict[str, Any]:
        """Read what the program writes, up to the limits, until it ends; then end all that it left behind."""
        kept: dict[int, bytearray] = {self.out[0]: bytearray(), self.err[0]: bytearray(), self.answers[0]: bytearray()}
        over, ended = False, os.pidfd_open(self.pid)
        poll = select.poll()
        for number in (*kept, ended):
            poll.register(number, select.POLLIN)
        status, cpu_s, running = 0, 0.0, True
        waiting = set(kept)
        while waiting or running:
            for number, _ in poll.poll():
                if number == ended:
                    _, code, used = os.wait4(self.pid, 0)
                    status, cpu_s, running = os.waitstatus_to_exitcode(code), used.ru_utime + used.ru_stime, False
                    poll.unregister(ended)
                    self._kill_all()
                    continue
                data = os.read(number, 1 << 16)
                if not data:
                    poll.unregister(number)
                    waiting.discard(number)
                    continue
                held = kept[number]
                held += data
                if number == self.err[0]:
                    del held[: -self.start["stderr_bytes"]]
                elif len(held) > self.start["output_bytes"]:
                    del held[self.start["output_bytes"] :]
                    over = True
                    if running:
                        self._kill_all()
        for number in (*kept, ended):
            os.close(number)
        out, err, answers = (bytes(held).decode("utf-8", "replace") for held in kept.values())
        folders = (".", "/dev/shm") if self.start["isolated"] else (".",)
        return {
            "stdout": out,
            "stderr": err,
            "answers": answers,
            "status": status,
            "cpu_s": cpu_s,
            "flooded": over,
            "dirty": any(os.listdir(folder) for folder in folders),
        }

    def _kill_all(self) -> None:
        try:
            # In its own process namespace -1 is everything but this process and the first.
            os.kill(-1 if self.start["isolated"] else self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nothing was left


def _script(start: dict[str, Any], case: str, answers: int) -> None:
    load(start["program"], "__main__")


def _call(start: dict[str, Any], case: str, answers: int) -> None:
    names = load(start["program"], "solution", start["setup"])
    # As on LeetCode, a method of the class Solution; else a function.
    wanted = start["function"]
    method = hasattr(names.get("Solution"), wanted)
    function = getattr(names["Solution"](), wanted) if method else names[wanted]
    result = function(*unpack(json.loads(case)))
    with open(answers, "w", encoding="utf-8") as file:
        file.write(json.dumps(pack(result)))


_MODES = {"script": _script, "call": _call, "serve": serve, "tests": tests}
