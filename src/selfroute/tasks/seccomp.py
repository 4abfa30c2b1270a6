"""The system calls that a sandboxed program may not make, as a filter that the kernel reads (classic BPF).

A list of what is refused, not of what is allowed: a Python program may need any harmless call. Refused are those that
reach the network, other processes' memory, namespaces, mounts, keys, performance counters, io_uring and other large
parts of the kernel, memory that no limit counts (System V shared memory, memfd, shared mappings without a file, huge
pages), and a process's place in the queue for the processor, by which it could keep itself from running and its time
from passing. They fail with EPERM, as for any user without the right; clone3, whose arguments no filter can see, fails
with ENOSYS, so that the C library uses clone.
"""

from __future__ import annotations

import errno
import platform
import struct

from selfroute.errors import TaskError

# Names and numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux.
_REFUSED = {
    "x86_64": {
        "shmget": 29, "semget": 64, "msgget": 68, "ptrace": 101, "syslog": 103, "uselib": 134, "personality": 135,
        "modify_ldt": 154, "pivot_root": 155, "adjtimex": 159, "chroot": 161, "acct": 163, "settimeofday": 164,
        "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "iopl": 172, "ioperm": 173,
        "init_module": 175, "delete_module": 176, "quotactl": 179, "clock_settime": 227, "mbind": 237,
        "set_mempolicy": 238, "mq_open": 240, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
        "migrate_pages": 256, "unshare": 272, "vmsplice": 278, "move_pages": 279, "perf_event_open": 298,
        "fanotify_init": 300, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310,
        "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "memfd_create": 319, "kexec_file_load": 320,
        "bpf": 321, "userfaultfd": 323, "setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144,
        "sched_setaffinity": 203, "sched_setattr": 314,
    },
    "aarch64": {
        "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "quotactl": 60, "vmsplice": 75, "acct": 89,
        "personality": 92, "unshare": 97, "kexec_load": 104, "init_module": 105, "delete_module": 106,
        "clock_settime": 112, "syslog": 116, "ptrace": 117, "reboot": 142, "settimeofday": 170, "adjtimex": 171,
        "mq_open": 180, "msgget": 186, "semget": 190, "shmget": 194, "add_key": 217, "request_key": 218, "keyctl": 219,
        "swapon": 224, "swapoff": 225, "mbind": 235, "set_mempolicy": 237, "migrate_pages": 238, "move_pages": 239,
        "perf_event_open": 241, "fanotify_init": 262, "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "memfd_create": 279,
        "bpf": 280, "userfaultfd": 282, "kexec_file_load": 294, "sched_setparam": 118, "sched_setscheduler": 119,
        "sched_setaffinity": 122, "setpriority": 140, "sched_setattr": 274,
    },
}  # fmt: skip
_REFUSED_EVERYWHERE = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "process_madvise": 440,
    "mount_setattr": 442, "memfd_secret": 447, "process_mrelease": 448,
}  # fmt: skip
_CLONE3 = 435
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_CLONE = {"x86_64": 56, "aarch64": 220}
_NEW_NAMESPACES = 0x7E020000
_MMAP = {"x86_64": 9, "aarch64": 222}
_MAP_SHARED, _MAP_ANONYMOUS, _MAP_HUGETLB = 0x01, 0x20, 0x40000
_AF_UNIX = 1
_X32 = 0x40000000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
# Offsets in struct seccomp_data; of an argument the low half.
_NUMBER, _ARCH, _FIRST_ARGUMENT, _FOURTH_ARGUMENT = 0, 4, 16, 40


def seccomp_filter(machine: str | None = None) -> bytes:
    """The filter for a processor, by default this one's: an array of `struct sock_filter`, for `bwrap --seccomp`.

    Raises:
        TaskError: there is no table of system calls for this processor.
    """
    machine = machine or platform.machine()
    if machine not in _REFUSED:
        raise TaskError(f"no table of system calls for {machine} processors (there are: {', '.join(_REFUSED)})")

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    def refuse(number: int, error: int) -> bytes:
        return step(_EQUAL, number, 0, 1) + step(_RETURN, _ERRNO | error)

    # Calls of another architecture have other numbers.
    parts = [step(_LOAD, _ARCH), step(_EQUAL, _AUDIT_ARCH[machine], 1, 0), step(_RETURN, _KILL), step(_LOAD, _NUMBER)]
    if machine == "x86_64":
        parts += [step(_AT_LEAST, _X32, 0, 1), step(_RETURN, _KILL)]
    numbers = {**_REFUSED[machine], **_REFUSED_EVERYWHERE}.values()
    parts += [refuse(number, errno.EPERM) for number in sorted(numbers)]
    parts.append(refuse(_CLONE3, errno.ENOSYS))
    # After a match on its number, one of the call's arguments decides.
    parts += [step(_EQUAL, _SOCKET[machine], 0, 4), step(_LOAD, _FIRST_ARGUMENT), step(_EQUAL, _AF_UNIX, 1, 0)]
    parts += [step(_RETURN, _ERRNO | errno.EPERM), step(_RETURN, _ALLOW)]
    # Of shared memory, what a process has unmapped but for one page is not resident in it, and there all the same.
    parts += [step(_EQUAL, _MMAP[machine], 0, 6), step(_LOAD, _FOURTH_ARGUMENT), step(_ANY_BIT, _MAP_HUGETLB, 2, 0)]
    parts += [step(_ANY_BIT, _MAP_SHARED, 0, 2), step(_ANY_BIT, _MAP_ANONYMOUS, 0, 1)]
    parts += [step(_RETURN, _ERRNO | errno.EPERM), step(_RETURN, _ALLOW)]
    parts += [step(_EQUAL, _CLONE[machine], 0, 3), step(_LOAD, _FIRST_ARGUMENT), step(_ANY_BIT, _NEW_NAMESPACES, 0, 1)]
    parts += [step(_RETURN, _ERRNO | errno.EPERM), step(_RETURN, _ALLOW)]
    return b"".join(parts)
