"""Run one program that is not trusted, in this process, after giving up what it must not have. Linux only.

`sandbox.py` starts this file's source as a process of its own, so it imports the standard library only. Three layers,
each of which a program cannot undo:

- Landlock (Linux 5.13, https://docs.kernel.org/userspace-api/landlock.html): files can be read below `readable` only.
- seccomp: the system calls of `ALLOWED` and no others, so no processes, threads, sockets, signals to others, or
  writing to files. What is refused fails with EPERM, in Python a PermissionError.
- resource limits: memory, processor time, open files.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import traceback
from typing import Any

# system calls: number on x86_64, on aarch64 (None: not there); from asm/unistd_64.h and asm-generic/unistd.h
ALLOWED = {
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    # open files and, as far as Landlock allows, files; openat: see `system_call_filter`
    "read": (0, 63),
    "readv": (19, 65),
    "pread64": (17, 67),
    "write": (1, 64),
    "writev": (20, 66),
    "lseek": (8, 62),
    "close": (3, 57),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "stat": (4, None),
    "lstat": (6, None),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    # time and chance
    "time": (201, None),
    "times": (100, 153),
    "gettimeofday": (96, 169),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "getrandom": (318, 278),
    # the process itself
    "exit": (60, 93),
    "exit_group": (231, 94),
    "futex": (202, 98),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getrusage": (98, 165),
    "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "sigaltstack": (131, 132),
    "sysinfo": (99, 179),
    "uname": (63, 160),
}
OPENAT = (257, 56)
# openat's third argument must have none of these: files are opened for reading only
WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC

# machine -> column in the table above, and linux/audit.h's name of the architecture
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # on every machine
READ_FILE, READ_DIR = 1 << 2, 1 << 3
FILE_ACCESS = (1 << 13) - 1  # every kind of access that Landlock's first version knows
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
OPEN_FILES = 64

libc = ctypes.CDLL(None, use_errno=True)


def checked(what: str, result: int) -> int:
    """The result of a call into the C library; OSError if it failed."""
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def prctl(what: str, option: int, *arguments: Any) -> None:
    values = [argument if isinstance(argument, ctypes.Array) else ctypes.c_ulong(argument) for argument in arguments]
    checked(what, libc.prctl(option, *values, *[ctypes.c_ulong(0)] * (4 - len(values))))


def allow_reading_only_below(paths: list[str]) -> None:
    """Landlock: of all files and folders, only those at or below `paths` can be read, and none changed."""
    libc.syscall.restype = ctypes.c_long
    what = "Landlock, which keeps a program from files, needs Linux 5.13 or later with it switched on"
    attributes = struct.pack("=Q", FILE_ACCESS)
    ruleset = checked(what, libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    for path in paths:
        descriptor = os.open(path, os.O_PATH)
        access = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        rule = struct.pack("=Qi", access, descriptor)
        checked(f"Landlock rule for {path}", libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0))
        os.close(descriptor)
    checked(what, libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def system_call_filter(machine: str) -> bytes:
    """The BPF program for seccomp: only `ALLOWED`, and openat for reading; all else fails with EPERM.

    Raises:
        OSError: for a machine whose numbers are not in the table.
    """
    if machine not in MACHINES:
        raise OSError(f"machine {machine!r}: its system calls are not known; known are {', '.join(MACHINES)}.")
    column, architecture = MACHINES[machine]
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050000 | 1  # 1: EPERM
    number, arch, third_argument = 0, 4, 16 + 2 * 8  # offsets in struct seccomp_data
    # instruction: code, how many to skip if true, how many if false, operand
    program = [(load, 0, 0, arch), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, number)]
    for numbers in ALLOWED.values():
        if (call := numbers[column]) is not None:
            program += [(equal, 0, 1, call), (give, 0, 0, allow)]
    program += [(equal, 1, 0, OPENAT[column]), (give, 0, 0, refuse)]
    program += [(load, 0, 0, third_argument), (any_bit, 0, 1, WRITING), (give, 0, 0, refuse), (give, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def filter_system_calls() -> None:
    code = system_call_filter(platform.machine())
    instructions = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog, with native padding
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions))
    prctl("seccomp", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(program, len(program)))


def limit_resources(memory: int, seconds: int) -> None:
    limits = {"AS": memory, "CPU": seconds, "CORE": 0, "FSIZE": 0, "NOFILE": OPEN_FILES}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def main() -> None:
    """Read the order from standard input, confine this process, and run the program.

    Standard output gets the order's token once confined, and again if the program came to its end.
    """
    order = json.load(sys.stdin)
    token = order["token"].encode()
    prctl("death with the parent", PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != order["parent"]:
        raise OSError("the process that started this one has ended.")
    prctl("no new privileges", PR_SET_NO_NEW_PRIVS, 1)
    limit_resources(order["memory"], order["seconds"])
    allow_reading_only_below(order["readable"])
    filter_system_calls()
    os.write(1, token)
    status = 1
    try:
        exec(compile(order["program"], "<program>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
    if status == 0:
        os.write(1, token)
    os._exit(status)


if __name__ == "__main__":
    main()
