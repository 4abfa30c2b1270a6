from __future__ import annotations

import pytest
from tests.witness import judge

from selfroute.errors import TaskError
from selfroute.tasks.sandbox import Sandbox
from selfroute.tasks.seccomp import seccomp_filter

SYSCALLS = {
    "unshare a user namespace": "unshare(0x10000000)",
    "unshare a mount namespace": "unshare(0x20000)",
    "clone into a user namespace": "syscall(56, 0x10000011, 0, 0, 0, 0)",
    "clone3": "syscall(435, 0, 0)",
    "mount": "mount(b'none', b'/tmp', b'tmpfs', 0, 0)",
    "remount": "mount(b'none', b'/', b'none', 0x20 | 0x1000, 0)",
    "umount": "umount2(b'/proc', 2)",
    "chroot": "chroot(b'/tmp')",
    "ptrace": "ptrace(16, 1, 0, 0)",
    "process_vm_readv": "syscall(310, 1, 0, 0, 0, 0, 0)",
    "keyctl": "syscall(250, 0, -3, 0)",
    "bpf": "syscall(321, 0, 0, 0)",
    "perf_event_open": "syscall(298, 0, 0, -1, -1, 0)",
    "userfaultfd": "syscall(323, 0)",
    "io_uring_setup": "syscall(425, 1, 0)",
    "memfd_create": "syscall(319, b'x', 0)",
    "shmget": "shmget(0, 1 << 30, 0o1600)",
    "shared memory": "mmap(0, 4096, 3, 0x21, -1, 0)",
    "shared memory, its flags checked": "mmap(0, 4096, 3, 0x23, -1, 0)",
    "huge pages": "mmap(0, 4096, 3, 0x40022, -1, 0)",
    "setuid": "setuid(0)",
    "reboot": "reboot(0)",
    "x32 open": "syscall(0x40000002, b'/etc/passwd', 0)",
}


@pytest.mark.parametrize("name", SYSCALLS)
def test_system_calls_that_are_refused(sandbox: Sandbox, name: str) -> None:
    call = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nresult = libc.{SYSCALLS[name]}\n"
    [ran] = judge(sandbox, call + "print(result, ctypes.get_errno())")
    # The filter kills on calls of another architecture, and refuses the others; setuid fails for lack of a mapped root.
    allowed = {"clone3": "-1 38\n", "setuid": "-1 22\n", "x32 open": ""}.get(name, "-1 1\n")
    assert ran.stdout == allowed, ran.stderr
    assert ran.status == (-31 if name == "x32 open" else 0)


def test_the_filter_of_each_processor_is_whole() -> None:
    for machine in ("x86_64", "aarch64"):
        steps = seccomp_filter(machine)
        assert len(steps) % 8 == 0
        assert len(steps) < 4096
    with pytest.raises(TaskError, match="no table of system calls for riscv64"):
        seccomp_filter("riscv64")
