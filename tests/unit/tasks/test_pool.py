"""The pool with functions that sleep, crash and lie, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from selfroute.errors import TaskError
from selfroute.tasks.pool import Done, Pool, _Worker


def act(what: str, amount: float = 0) -> object:
    """What a worker is told to do."""
    if what == "sleep":
        time.sleep(amount)
    elif what == "spin":
        # In C, holding the interpreter's lock.
        pow(7, 10**9)
    elif what == "raise":
        raise ValueError("as told")
    elif what == "nest":
        return act("nest")
    elif what == "memory":
        return len(bytearray(int(amount)))
    elif what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    elif what == "print":
        print("noise")
    elif what == "unsayable":
        return object()
    return os.getpid()


PATH = f"{__name__}:act"


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(PATH, size=2, memory_bytes=2**30)
    yield made
    made.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_nothing_starts_before_the_first_call_and_a_worker_is_kept(pool: Pool) -> None:
    assert pool.process_ids == []
    first = pool.call("pid", limit_s=5)
    assert pool.process_ids == [first.result]
    assert pool.call("print", limit_s=5) == first == pool.call("signals", limit_s=5)
    pool.close()
    assert pool.process_ids == []
    assert not alive(first.result)
    assert pool.call("pid", limit_s=5).result not in (first.result, None)


def test_a_worker_may_start_before_it_is_needed(pool: Pool) -> None:
    pool.start()
    [early] = pool.process_ids
    pool.start()
    assert pool.call("pid", limit_s=5).result == early
    with pytest.raises(TaskError, match="No module named 'no'"):
        Pool("no.such:thing", size=1).start()


def test_a_function_may_be_in_a_folder_that_this_process_does_not_look_into(tmp_path: Path) -> None:
    (tmp_path / "apart_from_us.py").write_text("def double(n): return 2 * n")
    # What is found elsewhere comes first.
    (tmp_path / "json.py").write_text("raise SystemExit")
    pool = Pool("apart_from_us:double", size=1, folders=(str(tmp_path),))
    assert pool.call(4, limit_s=5) == Done(8)
    pool.close()
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize("what", ["sleep", "spin"])
def test_a_late_worker_is_killed_and_costs_its_own_call_alone(pool: Pool, what: str) -> None:
    late = pool.call("pid", limit_s=5).result
    started = time.monotonic()
    assert pool.call(what, 60, limit_s=0.3) == Done(None, "undecided after 0.3 s")
    assert time.monotonic() - started < 2
    assert not alive(late)
    assert pool.call("pid", limit_s=5).result not in (late, None)


@pytest.mark.parametrize(
    ("what", "amount", "failure"),
    [
        ("raise", 0, "undecided: ValueError: as told"),
        ("nest", 0, "undecided: RecursionError"),
        ("memory", 2**32, "undecided: MemoryError"),
        ("unsayable", 0, "undecided: TypeError: Object of type object is not JSON serializable"),
        ("die", 0, "undecided: the worker died of it"),
    ],
)
def test_a_failing_worker_is_replaced(pool: Pool, what: str, amount: float, failure: str) -> None:
    failed = pool.call("pid", limit_s=5).result
    assert pool.call(what, amount, limit_s=20).failure.startswith(failure)
    assert not alive(failed)
    assert pool.call("pid", limit_s=5).result is not None


def test_threads_share_the_workers_and_never_each_others_replies(pool: Pool) -> None:
    def call(n: int) -> bool:
        # Some are late, whose replies must reach nobody.
        if n % 5 == 0:
            return pool.call("sleep", 3, limit_s=0.05).result is None
        return pool.call("memory", n, limit_s=20) == Done(n)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(call, range(1, 41)))
    assert len(pool.process_ids) <= 2


def test_a_call_that_ctrl_c_breaks_off_leaves_no_reply_behind(pool: Pool) -> None:
    pool.call("pid", limit_s=5)
    # What was started in a shell's background has been told to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool.call("sleep", 1, limit_s=10)
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert pool.call("memory", 7, limit_s=20) == Done(7)


def test_a_fork_has_workers_of_its_own(pool: Pool) -> None:
    ours = pool.call("pid", limit_s=5).result
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            theirs = pool.call("pid", limit_s=5).result
            os.write(write, f"{theirs}".encode())
            pool.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert int(os.read(read, 20)) != ours
    os.close(read)
    os.close(write)
    assert pool.call("pid", limit_s=5).result == ours


def test_what_cannot_be_imported_is_an_error_and_no_verdict() -> None:
    for path, message in (("no.such:thing", "No module named 'no'"), (f"{__name__}:nothing", "no attribute 'nothing'")):
        with pytest.raises(TaskError, match=message):
            Pool(path, size=1).call(limit_s=1)


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_workers_do_not_outlive_their_parent(end: str) -> None:
    script = f"""
import os, signal, sys, threading, time
sys.path.append({str(Path(__file__).parent)!r})
from selfroute.tasks.pool import Pool
pool = Pool({PATH!r}, size=2)
print(pool.call("pid", limit_s=5).result, flush=True)
threading.Thread(target=lambda: pool.call("sleep", 60, limit_s=1), daemon=True).start()
time.sleep(0.3)
{end}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    worker = int(done.stdout)
    # One that was at work ends by its own watch.
    deadline = time.monotonic() + 30
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(worker), done.stderr


def test_a_worker_begins_with_its_first_call() -> None:
    pool = Pool(PATH, size=1, memory_bytes=2**30, first=("raise",))
    with pytest.raises(TaskError, match="cannot start: undecided: ValueError: as told"):
        pool.start()
    assert pool.process_ids == []
    pool.first = ("sleep", 0.3)
    # It belongs to the start, which has its own limit.
    assert not pool.call("pid", limit_s=0.25).failure
    pool.close()


def test_a_worker_is_ended_once_whoever_ends_it() -> None:
    worker = _Worker("math:sqrt", 2**31, [])
    with ThreadPoolExecutor(8) as threads:
        for ended in [threads.submit(worker.kill) for _ in range(8)]:
            ended.result()
    assert worker.line.closed
