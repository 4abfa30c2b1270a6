"""Programs that try to get out of the sandbox, outlast it or bring the machine down; what is outside is looked at after each."""
# ruff: noqa: E501 (a program a line)

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tests.witness import LIMITS, SHORT, judge

from selfroute.errors import TaskError
from selfroute.tasks.box import Box
from selfroute.tasks.processes import family
from selfroute.tasks.sandbox import Job, Sandbox


def test_a_plain_program(sandbox: Sandbox) -> None:
    [ran, other] = judge(sandbox, "import sys\nprint(input()[::-1])\nprint('oh', file=sys.stderr)", ["abc", "déf"])
    assert (ran.stdout, ran.stderr, ran.status, ran.limit, ran.clean) == ("cba\n", "oh\n", 0, None, True)
    assert other.stdout == "féd\n"
    assert 0 < ran.cpu_s < 0.5
    assert 0 < ran.wall_s < 2


SECRET = "canary-8d1f"


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/etc/shadow",
        "/root",
        "/home",
        "/opt",
        "/var/log",
        "/sys/kernel",
        "/proc/1/environ",
        "/run",
        "/mnt",
        "HERE",
    ],
)
def test_host_files_are_not_there(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "secret.txt").write_text(SECRET)
    monkeypatch.setenv("DEEPSEEK_API_KEY", SECRET)
    path = path.replace("HERE", str(tmp_path / "secret.txt"))
    [ran] = judge(
        sandbox, f"import os\nprint(os.path.isdir({path!r}) and os.listdir({path!r}) or open({path!r}).read())"
    )
    # The first process's environment is that of bubblewrap, which was started with one variable.
    assert ran.status == 1 or ran.stdout.strip() in ("", "PYTHONHASHSEED=0\0")
    assert SECRET not in ran.stdout


def test_no_environment_and_no_process_of_the_host_is_seen(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", SECRET)
    [ran] = judge(
        sandbox,
        "import glob, os\nprint(dict(os.environ))\nprint(len(glob.glob('/proc/[0-9]*')))\n"
        "for name in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline'):\n"
        "    try: print(open(name).read())\n    except OSError: pass\nprint(open('/proc/self/mountinfo').read())",
    )  # fmt: skip
    assert SECRET not in ran.stdout
    assert ran.stdout.splitlines()[0] == "{'PYTHONHASHSEED': '0', 'PWD': '/tmp', 'LC_CTYPE': 'C.UTF-8'}"
    assert int(ran.stdout.splitlines()[1]) <= 4
    assert str(Path.home()) not in ran.stdout


def test_nothing_outside_can_be_written(sandbox: Sandbox, tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("whole")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    [ran] = judge(
        sandbox,
        f"import os\nfor path in ['/x', '/usr/x', '/usr/bin/x', '/dev/x', '/proc/x', '/proc/sys/kernel/hostname', '/proc/sysrq-trigger', {str(victim)!r}, {str(tmp_path)!r} + '/x', '/usr/bin/python3', '/tmp/selfroute-escape', '/dev/shm/selfroute-escape']:\n"
        "    try:\n        with open(path, 'w') as file: file.write('x')\n        print('wrote', path)\n    except OSError: pass\n",
    )  # fmt: skip
    assert ran.stdout.split() == ["wrote", "/tmp/selfroute-escape", "wrote", "/dev/shm/selfroute-escape"]
    assert victim.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [victim]
    assert not Path("/tmp/selfroute-escape").exists()
    assert not Path("/dev/shm/selfroute-escape").exists()
    assert not ran.clean


def test_no_case_sees_what_another_left(sandbox: Sandbox) -> None:
    leave = "import os, sys\nprint(os.path.exists('/tmp/left'), os.path.exists('/dev/shm/left'), globals().get('x'))\nx = 1\nimport math\nmath.pi = 3\nopen(input(), 'w').write('x')"
    runs = judge(sandbox, leave, ["/tmp/left", "/dev/shm/left", "/dev/null", "/dev/null"])
    assert [ran.stdout for ran in runs] == ["False False None\n"] * 4
    assert [ran.clean for ran in runs] == [False, False, True, True]
    [_, ran] = judge(sandbox, "import math\nprint(math.pi)\nmath.pi = 3", ["", ""])
    assert ran.stdout.startswith("3.14159")


def test_no_network(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        [ran] = judge(
            sandbox,
            "import socket\nfor family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_UNIX):\n"
            "    try:\n        socket.socket(family)\n        print('made', family.name)\n    except OSError as error: print(error.errno)\n"
            f"try:\n    socket.create_connection(('127.0.0.1', {port}), 1)\n    print('connected')\nexcept OSError: pass\n"
            "s = socket.socket(socket.AF_UNIX)\nfor name in ['\\0/tmp/.X11-unix/X0', '/run/docker.sock', '/run/dbus/system_bus_socket']:\n"
            "    try:\n        s.connect(name)\n        print('connected', name)\n    except OSError: pass\n",
        )  # fmt: skip
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
    assert ran.stdout.split() == ["1", "1", "1", "1", "made", "AF_UNIX"]


DIE_HARD = "import os, signal, sys, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"


@pytest.mark.parametrize(
    ("program", "limit"),
    [
        ("while True: pass", "cpu"),
        (DIE_HARD + "while True: pass", "cpu"),
        ("import time\ntime.sleep(100)", "wall"),
        (DIE_HARD + "time.sleep(100)", "wall"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "wall"),
        ("import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(100)", "wall"),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "wall"),
        ("import os\nwhile True: os.fork()", None),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[100]).start()", "wall"),
        ("x = bytearray(10 ** 9)", "memory"),
        ("x = []\nwhile True: x.append(bytearray(10 ** 6))", "memory"),
        ("import os, time\nfor _ in range(4):\n    if os.fork() == 0: break\nx = bytearray(b'x') * (90 << 20)\ntime.sleep(100)", "memory"),
        ("while True: print('x' * 10 ** 4)", "output"),
        ("import os\nwhile True: os.write(2, b'x' * 10 ** 4)", "cpu"),
        ("import sys\nsys.stderr.write('x' * 10 ** 7)\nprint(1)", None),
        ("open('/tmp/x', 'wb').write(bytes(10 ** 8))", None),
        ("for n in range(100):\n    with open(f'/tmp/{n}', 'wb') as file: file.write(bytes(10 ** 7))", None),
        ("files = [open('/dev/null') for _ in range(100)]", None),
        ("import os\nos.kill(os.getppid(), 9)\nimport time\ntime.sleep(100)", None),
        ("import os\nos.kill(-1, 9)", None),
        ("import os\nos.kill(1, 9)\nos.kill(1, 15)\nprint('alive')", None),
        ("import os, sys, time\nprint('out', flush=True)\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(100)\n    os._exit(0)", None),
        ("import os, subprocess\nsubprocess.Popen(['/usr/bin/sleep', '100'], start_new_session=True)\nprint('out')", None),
        ("import os\nos.close(0), os.close(1), os.close(2)", None),
        ("import os\nwhile True:\n    try: os.write(1, b'x' * 100)\n    except OSError: pass", "output"),
        ("import ctypes\nctypes.string_at(0)", None),
        ("import os\nfor n in range(3, 100):\n    try: os.write(n, b'\\xff' * 10 ** 5)\n    except OSError: pass\nprint('wrote')", "output"),
    ],
)  # fmt: skip
def test_programs_that_mean_harm(sandbox: Sandbox, program: str, limit: str | None) -> None:
    [ran] = judge(sandbox, program, limits=SHORT if limit == "wall" else LIMITS)
    assert ran.limit == limit, ran
    assert len(ran.stdout) <= LIMITS.output_kb << 10
    assert len(ran.stderr) <= 4096
    # The next program is none the wiser.
    assert sandbox.run(Job("print(6 * 7)", [""]))[0].stdout == "42\n"


HOLD = "import mmap, os, time\n%s\nfor at in range(0, 60 << 20, 4096): memory[at] = 1\nprint('held', flush=True)\ntime.sleep(9)"


@pytest.mark.parametrize(
    "program",
    [
        HOLD % "for _ in range(6):\n    if os.fork() == 0: break\nmemory = mmap.mmap(-1, 60 << 20)",
        HOLD % "memory = mmap.mmap(os.open('/dev/zero', os.O_RDWR), 60 << 20)",
        # Unmapped but for a page, it is resident in no process.
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.mmap.restype = ctypes.c_void_p\n"
        "for _ in range(10):\n"
        "    at = libc.mmap(None, 60 << 20, 3, 0x21, -1, 0)\n    if at == 2 ** 64 - 1: raise OSError(ctypes.get_errno(), 'x')\n"
        "    ctypes.memset(at, 1, 60 << 20)\n    libc.munmap(ctypes.c_void_p(at + 4096), (60 << 20) - 4096)\n"
        "print('held', flush=True)",
    ],
    ids=["in many processes", "a device's", "unmapped"],
)  # fmt: skip
def test_memory_that_no_limit_counts_is_refused(sandbox: Sandbox, program: str) -> None:
    [ran] = judge(sandbox, program, limits=SHORT)
    assert "PermissionError" in ran.stderr
    assert "held" not in ran.stdout


def test_memory_of_its_own_and_of_files_can_be_mapped(sandbox: Sandbox) -> None:
    [ran] = judge(
        sandbox,
        "import mmap, os\nown = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE)\nown[0] = 6\n"
        "file = os.open('/dev/shm/x', os.O_RDWR | os.O_CREAT)\nos.ftruncate(file, 4096)\nshared = mmap.mmap(file, 4096)\n"
        "if os.fork() == 0:\n    shared[0] = 7\n    os._exit(0)\nos.wait()\nprint(own[0] * shared[0])",
    )
    assert ran.stdout == "42\n", ran.stderr


def test_recursion_without_end(sandbox: Sandbox) -> None:
    [ran] = judge(sandbox, "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()")
    # Frames fill the memory, which Python tells in several ways.
    assert ran.status != 0


def test_processes_and_files_are_counted(sandbox: Sandbox) -> None:
    count = "n = 0\ntry:\n    while True:\n        %s\n        n += 1\nexcept OSError: print(n, flush=True)"
    [ran] = judge(sandbox, "import os, time\n" + count % "os.fork() or time.sleep(100)", limits=SHORT)
    assert 1 <= int(ran.stdout) <= SHORT.processes
    [ran] = judge(sandbox, "import os\n" + count % "os.open('/dev/null', 0)")
    assert 40 < int(ran.stdout) < LIMITS.open_files
    size = "import os\ndef size(path):\n    try:\n        with open(path, 'wb') as file:\n            while True: file.write(bytes(1 << 20))\n    except OSError: return os.path.getsize(path) >> 20\n"
    [ran] = judge(sandbox, size + "print(size('/tmp/x'), sum(size(f'/dev/shm/{n}') for n in range(9)))")
    assert ran.stdout.split() == ["16", "64"]


@pytest.mark.parametrize("mode", ["script", "call"])
def test_the_frames_and_files_of_what_runs_a_program_hold_no_secret(sandbox: Sandbox, mode: str) -> None:
    look = (
        "import gc, os, sys\nframe, found = sys._getframe(), []\nwhile frame:\n    found.append(repr(frame.f_locals))\n    frame = frame.f_back\n"
        "found += [repr(o) for o in gc.get_objects() if isinstance(o, dict)]\n"
        "for name in os.listdir('/proc/self/fd'):\n    try: found.append(os.readlink('/proc/self/fd/' + name))\n    except OSError: pass\n"
        "seen = ' '.join(found)\n"
    )
    job = Job(look + "print('other_case'.replace('_', ' ') in seen, len(seen) > 1000)", ["own case", "other case"])
    if mode == "call":
        job = Job(
            look + "def f(x): return ['other_case'.replace('_', ' ') in seen, len(seen) > 1000]",
            ['["own case"]', '["other case"]'],
            "call",
            "f",
        )
    ran = sandbox.run(job)[0]
    assert (ran.stdout + ran.answers).lower().replace(",", "").strip("[]\n") == "false true"


def test_it_stops_where_it_is_told_to_and_when_time_is_up(sandbox: Sandbox) -> None:
    job = Job("print(input())", list("abcd"), goes_on=lambda case, ran: ran.stdout != "b\n")
    assert [ran.stdout for ran in sandbox.run(job)] == ["a\n", "b\n"]
    job = Job("import time\ntime.sleep(0.3)", [""] * 20, total_s=0.5)
    assert 2 <= len(sandbox.run(job)) <= 3


def test_many_jobs_at_a_time_keep_their_order(sandbox: Sandbox) -> None:
    jobs = [Job("print(int(input()) ** 2)", [str(n), str(n + 1)]) for n in range(30)]
    runs = asyncio.run(sandbox.run_many(jobs, concurrency=4))
    assert [[ran.stdout for ran in one] for one in runs] == [[f"{n * n}\n", f"{(n + 1) ** 2}\n"] for n in range(30)]
    with ThreadPoolExecutor(8) as threads:
        assert [[r.stdout for r in one] for one in threads.map(sandbox.run, jobs)] == [
            [r.stdout for r in one] for one in runs
        ]


def test_a_killed_parent_takes_its_sandboxes_with_it() -> None:
    code = (
        "from selfroute.tasks.sandbox import *\nfrom selfroute.tasks.box import Limits\n"
        "Sandbox().run(Job('import time\\ntime.sleep(60)', [''], limits=Limits(wall_s=60)))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        members: list[int] = []
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            members = family(parent.pid)
            names = [Path(f"/proc/{n}/cmdline").read_bytes() for n in members[1:] if Path(f"/proc/{n}").exists()]
            # bubblewrap twice, the runner and the case's process.
            if (
                len(names) >= 4
                and sum(b"selfroute.tasks.inside" in name and b"bwrap" not in name for name in names) >= 2
            ):
                break
            time.sleep(0.05)
        assert len(members) >= 5
        parent.kill()
    ends = time.monotonic() + 20
    while any(Path(f"/proc/{n}").exists() for n in members[1:]) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not [n for n in members[1:] if Path(f"/proc/{n}").exists()]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is all of PATH, without bwrap, and readable for nobody."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "setpriv").symlink_to("/usr/bin/setpriv")
        monkeypatch.setenv("PATH", name)
        yield folder


def test_without_isolation_it_refuses_and_says_how_to_go_on(commands: Path) -> None:
    with pytest.raises(
        TaskError, match=r"no `bwrap` .*task.unsafe_sandbox=true \(or: selfroute train --unsafe-sandbox\)"
    ):
        Sandbox().run(Job("print(1)", [""]))
    # A bubblewrap that does not work, as where user namespaces are forbidden.
    broken = commands / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(TaskError, match="a sandbox did not start: bwrap: No permissions to create new namespace"):
        Sandbox().isolated()
    # One that isolates nothing.
    broken.write_text(
        '#!/bin/sh\nwhile [ "$1" != /usr/bin/python3.11 ] && [ "${1#/usr/bin/python3}" = "$1" ]; do shift; done\nexec "$@"\n'
    )
    with pytest.raises(TaskError, match="a sandbox is not tight"):
        Sandbox().isolated()


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ("words[words.index('--cap-drop')] = '--cap-add'", r"CapEff is 0*1\w+"),
        ("words[:0] = ['--dir', '/opt']", "RootFiles is bin dev .*opt proc tmp usr"),
        ("at = words.index('--seccomp'); del words[at:at + 2]", r"Seccomp is 0, Socket is \w+"),
    ],
)
def test_a_sandbox_that_is_not_tight_is_refused(commands: Path, change: str, wrong: str) -> None:
    bubblewrap = commands / "bwrap"
    # It does all that it is told but for one thing.
    bubblewrap.write_text(
        f"#!/usr/bin/python3\nimport os, sys\nwords = sys.argv[1:]\n{change}\nos.execv('/usr/bin/bwrap', ['bwrap', *words])\n"
    )
    bubblewrap.chmod(0o755)
    with pytest.raises(TaskError, match=rf"a sandbox is not tight \({wrong}\)"):
        Sandbox().isolated()


def test_limits_alone_where_the_user_says_so(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(commands))
    unsafe = Sandbox(unsafe=True)
    assert not unsafe.isolated()
    assert [r.stdout for r in judge(unsafe, "print(input()[::-1])", ["abc", "d"])] == ["cba\n", "d\n"]
    for program, limit in [
        ("while True: pass", "cpu"),
        ("import time\ntime.sleep(60)", "wall"),
        ("x = bytearray(10 ** 9)", "memory"),
    ]:
        assert judge(unsafe, program, limits=SHORT if limit == "wall" else LIMITS)[0].limit == limit
    # It can start no process that would be left behind.
    [ran] = judge(unsafe, "import os\nos.fork()")
    assert "BlockingIOError" in ran.stderr
    assert not judge(unsafe, "open('x', 'w').write('x')")[0].clean
    assert [path.name for path in commands.iterdir()] == ["setpriv"]
    # Another user than root.
    [ran] = judge(unsafe, "import os\nprint(os.getuid())")
    assert int(ran.stdout) == (os.getuid() or 65534)


@pytest.fixture
def box(sandbox: Sandbox) -> Iterator[Box]:
    with Box("script", "print(input())", limits=LIMITS, isolated=True) as made:
        yield made


def test_what_a_sandbox_says_is_not_believed_blindly(box: Box) -> None:
    box.begin("x")
    assert box.result().stdout == "x\n"
    for said in ({}, [], "wall!", {"cpu_s": "x"}, {"ready": True}, None):
        box._received += (data := json.dumps(said).encode()) and len(data).to_bytes(8, "big") + data
        ran = box.result()
        assert (ran.status, ran.limit, ran.clean) == (None, None, False)
    box._received += (1 << 60).to_bytes(8, "big")
    assert box.result().status is None
