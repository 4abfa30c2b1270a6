"""One sandbox: the process that runs `inside`, how it is shut in, watched from outside, and ended.

Everything that protects the machine stands here or is given away in `inside` before the program begins. What the
inside reports is believed in nothing that matters to the machine.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from selfroute.errors import TaskError
from selfroute.tasks.isolation import bubblewrap, filter_pipe, python, shut_in, unprivileged
from selfroute.tasks.processes import TICK_S, OwnTime, family, resident_mb

# Makes modules of the names and texts on its command line, since the sandbox sees no file of this package.
_BOOT = """
import sys, types
for name, text in zip(sys.argv[1::2], sys.argv[2::2]):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
module.main()
"""
_START_S = 60.0
# How many times its limit a program may take by the clock, however busy the machine is.
_PATIENCE = 10
_STDERR_BYTES = 4096
_SLACK_MB = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """What one case may take. The limits on time and memory decide verdicts; the others only stop abuse."""

    cpu_s: float = 4.0
    """Processor seconds of the case's process."""
    wall_s: float = 20.0
    """Seconds of its own time (`processes.OwnTime`) until everything is killed, for programs that wait: those that a
    busy machine lets it wait for its turn do not count."""
    memory_mb: int = 512
    """Address space of a process, and resident memory of all together, in MiB."""
    processes: int = 16
    """Processes and threads at a time."""
    file_mb: int = 16
    """Size of a file, in MiB; /tmp and /dev/shm hold four times that each."""
    open_files: int = 64
    """Open files of a process."""
    output_kb: int = 4096
    """Standard output, in KiB; a program that prints more is stopped."""


Limit = Literal["cpu", "wall", "memory", "output"]


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a case.

    `stdout` is cut at the limit and `stderr` holds its end; `answers` is what `inside` says beside them. `status` is
    the exit status, or minus the signal; None where the program took its sandbox down with it, or both were killed from
    outside. `limit` is the limit that it hit; `own_s` is the time that was its own. `clean` means that no file was left
    for a next case to see.
    """

    stdout: str
    stderr: str
    answers: str
    status: int | None
    limit: Limit | None
    wall_s: float
    own_s: float
    cpu_s: float
    clean: bool


class Box:
    """A sandbox for one program: `begin` a case, then its `result`; close it, or use it in a `with` block.

    It must be closed by the thread that made it, and dies with that thread.

    Args:
        mode: what `inside` does with a case.
        program: the program's text.
        setup: Python that runs before it.
        function: with mode `call`, what is called.
        limits: what a case may take.
        isolated: shut in by bubblewrap; else with resource limits only.
        link: pipes to another sandbox, to read from and to write to, which the caller closes.

    Raises:
        TaskError: something that it needs is missing.
    """

    def __init__(
        self,
        mode: str,
        program: str,
        *,
        setup: str = "",
        function: str = "",
        limits: Limits,
        isolated: bool,
        link: Sequence[int] = (),
    ) -> None:
        self.limits = limits
        self._isolated, self._ready = isolated, False
        self._first: int | None = None
        self._first_file, self._info = -1, b""
        self._folder: str | None = None
        self._received = bytearray()
        command, inside = unprivileged(), [python(), "-s", "-S", "-B", "-c", _BOOT, *_inside()]
        passed, ours = list(link), -1
        if isolated:
            command.append(bubblewrap())
            rules = filter_pipe()
            ours, info = os.pipe()
            os.set_blocking(ours, False)
            command += shut_in(rules, info, file_system_bytes=limits.file_mb << 22)
            passed += [rules, info]
        else:
            self._folder = tempfile.mkdtemp(prefix="selfroute-")
            os.chmod(self._folder, 0o777)
        self._info_pipe = ours
        try:
            self._process = subprocess.Popen(
                command + inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                pass_fds=passed, cwd=self._folder or "/", env={"PYTHONHASHSEED": "0"}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            if isolated:
                os.close(ours)
            else:
                shutil.rmtree(self._folder or "", ignore_errors=True)
            raise TaskError(f"a sandbox did not start: {error}") from error
        finally:
            for number in passed[len(link) :]:
                os.close(number)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        self._pending = bytearray()
        self._send(
            {
                "mode": mode, "program": program, "setup": setup, "function": function, "link": list(link),
                "isolated": isolated, "cpu_s": limits.cpu_s, "memory_bytes": limits.memory_mb << 20,
                "processes": limits.processes, "file_bytes": limits.file_mb << 20, "open_files": limits.open_files,
                "output_bytes": limits.output_kb << 10, "stderr_bytes": _STDERR_BYTES,
            }
        )  # fmt: skip

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def begin(self, case: str) -> None:
        """Hand a case over; `result` tells what became of it."""
        self._send({"case": case})

    def result(self, *others: Box) -> Ran:
        """What became of the case; meanwhile, `others` that it waits for are watched too.

        Raises:
            TaskError: the sandbox did not start.
        """
        if not self._ready:
            said = self._receive(OwnTime(_START_S, _PATIENCE * _START_S), (self, *others))
            if said != {"ready": True}:
                raise TaskError(f"a sandbox did not start: {self._complaint()}")
            self._ready = True
            # Known before the program can end anything.
            self._first_process()
        started, own = time.monotonic(), OwnTime(self.limits.wall_s, _PATIENCE * self.limits.wall_s + 60)
        said = self._receive(own, (self, *others))
        wall_s = time.monotonic() - started
        own_s = min(wall_s, own.seconds + TICK_S)
        if said == "wall" or said == "memory":
            return Ran("", "", "", None, said, wall_s, own_s, 0.0, clean=False)
        try:
            return self._read(said, wall_s, own_s)
        except (KeyError, TypeError, ValueError):
            # It ended, or says what `inside` never would: the program is to blame.
            return Ran("", "", "", None, None, wall_s, own_s, 0.0, clean=False)

    def _read(self, said: Any, wall_s: float, own_s: float) -> Ran:
        cpu_s, stderr = float(said["cpu_s"]), str(said["stderr"])
        limit: Limit | None = None
        if said["flooded"]:
            limit = "output"
        elif cpu_s > self.limits.cpu_s or said["status"] == -signal.SIGXCPU:
            limit = "cpu"
        elif stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
            limit = "memory"
        return Ran(
            stdout=str(said["stdout"]),
            stderr=stderr,
            answers=str(said["answers"]),
            status=int(said["status"]),
            limit=limit,
            wall_s=wall_s,
            own_s=own_s,
            cpu_s=cpu_s,
            clean=said["dirty"] is False,
        )

    def _send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        self._pending += len(data).to_bytes(8, "big") + data

    def _receive(self, own: OwnTime, boxes: Sequence[Box]) -> Any:
        """The next message; "wall" or "memory" where a limit is hit first, None where the inside has ended.

        What `boxes`, this one among them, are still to be told is told meanwhile, and their memory and time are looked
        at.
        """
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        for box in boxes:
            if box._pending:
                poll.register(box._stdin, select.POLLOUT)
        inputs = {box._stdin: box for box in boxes}
        # A message holds two outputs, which JSON may write as six characters each, and little else.
        most = 12 * ((self.limits.output_kb << 10) + _STDERR_BYTES) + 4096
        looked = time.monotonic()
        while True:
            size = int.from_bytes(self._received[:8], "big")
            if len(self._received) >= 8 and size > most:
                return None
            if len(self._received) >= 8 + size > 8:
                message = bytes(self._received[8 : 8 + size])
                del self._received[: 8 + size]
                try:
                    return json.loads(message)
                except (ValueError, RecursionError):
                    return None
            for number, _ in poll.poll(1000 * TICK_S):
                if number in inputs:
                    if inputs[number]._tell():
                        poll.unregister(number)
                    continue
                data = os.read(self._stdout, 1 << 20)
                if not data:
                    return None
                self._received += data
            now = time.monotonic()
            if now - looked > TICK_S:
                looked = now
                families = [box._family() for box in boxes]
                for box, members in zip(boxes, families, strict=True):
                    if sum(map(resident_mb, members)) > box.limits.memory_mb + _SLACK_MB:
                        return "memory"
                own.look(number for members in families for number in members)
                if own.over:
                    return "wall"

    def _tell(self) -> bool:
        """Write what it takes of what it is to be told; whether that is all."""
        try:
            del self._pending[: os.write(self._stdin, self._pending[: 1 << 16])]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            # It has ended, as the other pipe will tell.
            self._pending.clear()
        return not self._pending

    def _family(self) -> list[int]:
        """All of its processes."""
        first = self._first_process()
        return family(self._process.pid if first is None else first)

    def _first_process(self) -> int | None:
        """The process that all of the program's descend from, by its number out here; None before it is known."""
        if not self._isolated:
            return self._process.pid
        if self._first is None:
            # Not a number means: bubblewrap has not said it yet.
            with suppress(BlockingIOError, ValueError, ProcessLookupError):
                self._info += os.read(self._info_pipe, 4096)
                number = int(json.loads(self._info)["child-pid"])
                self._first_file = os.pidfd_open(number)
                self._first = number
        return self._first

    def _complaint(self) -> str:
        assert self._process.stderr is not None
        self._process.kill()
        return self._process.stderr.read(4096).decode("utf-8", "replace").strip() or "it said nothing"

    def close(self) -> None:
        """Kill everything in it, wait until it is dead, and take its folder away."""
        if not self._isolated:
            for number in reversed(family(self._process.pid)):
                with suppress(ProcessLookupError):
                    _end(os.pidfd_open(number))
        elif self._first_process() is not None:
            # The first process of a namespace takes all others with it, and ends when they have ended. bubblewrap
            # itself may end before.
            _end(self._first_file)
            if self._process.poll() is None:
                # Let to end by itself, it takes its dead child away.
                file = os.pidfd_open(self._process.pid)
                _await_end(file, timeout_ms=5000)
                os.close(file)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        if self._isolated:
            os.close(self._info_pipe)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _end(process_file: int) -> None:
    """Kill a process, wait until it has ended, and close its file."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process_file, signal.SIGKILL)
    _await_end(process_file)
    os.close(process_file)


def _await_end(process_file: int, timeout_ms: int | None = None) -> None:
    poll = select.poll()
    poll.register(process_file, select.POLLIN)
    poll.poll(timeout_ms)


@cache
def _inside() -> tuple[str, ...]:
    """Names and texts of what runs inside, each after what it imports."""
    folder = resources.files("selfroute.tasks.inside")
    files = ("wire", "program", "linked", "runner")
    return tuple(
        part
        for file in files
        for part in (f"selfroute.tasks.inside.{file}", (folder / f"{file}.py").read_text(encoding="utf-8"))
    )
