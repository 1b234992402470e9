"""Run generated Python programs where they can do no harm, or not at all; `confine.py` says how.

What is guaranteed, and what not, is in docs/evaluation.md.
"""

import json
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

CONFINE = Path(__file__).with_name("confine.py")
MEMORY = 1 << 30  # bytes of address space
OUTPUT = 1 << 16  # bytes that a program may print
START_SECONDS = 60  # until a process is confined and its program's time begins
CHUNK = 4096


class Result(NamedTuple):
    """What became of a program.

    Attributes:
        passed: whether it ran to its end without an exception.
        reason: why it did not pass, in one line; empty if it passed.
        output: what it printed to standard output and error, at most `OUTPUT` bytes.
    """

    passed: bool
    reason: str
    output: str


def readable_folders() -> list[str]:
    """What a confined program may read: Python's own library, installed packages, and shared libraries.

    Raises:
        OSError: if the home folder is below one of them.
    """
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [f"{sys.base_prefix}/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
    folders = sorted({os.path.realpath(folder) for folder in folders if os.path.exists(folder)})
    home = Path(os.path.expanduser("~")).resolve()  # Path.home() raises for a user who has none
    for folder in folders:
        if home.is_relative_to(folder):
            raise OSError(
                f"generated code must be able to read Python's library, {folder!r}, and the home folder {str(home)!r} "
                "is in it; install Python elsewhere."
            )
    return folders


def check_sandbox() -> None:
    """Raise OSError, with what is missing, unless programs can be confined on this machine."""
    if sys.platform != "linux":
        raise OSError(
            f"generated code cannot be confined on {sys.platform}: this needs Linux 5.13 or later; use a Linux "
            "container or virtual machine."
        )
    result = run_program("pass")
    if not result.passed:
        raise OSError(f"generated code cannot be run on this machine, an empty program fails: {result.reason}")


def run_program(program: str, timeout: float = 3.0, memory: int = MEMORY) -> Result:
    """Run the source of a program, confined, as a process of its own. May be called from several threads.

    Args:
        program: Python source.
        timeout: seconds that it may take, by the clock; the start of Python is not counted.
        memory: bytes of address space, Python's own included.

    Raises:
        OSError: if it could not be confined; it was not run then.
    """
    token = secrets.token_hex(16)
    order = {
        "token": token,
        "parent": os.getpid(),
        "program": program,
        "readable": readable_folders(),
        "memory": memory,
        "seconds": START_SECONDS + math.ceil(timeout),  # a last resort: this process ends it by the clock
    }
    with tempfile.TemporaryDirectory(prefix="gralora-sandbox-") as folder:
        environment = {
            "HOME": folder,
            "LANG": "C.UTF-8",
            "OPENBLAS_NUM_THREADS": "1",  # numpy's import would start threads
            "PYTHONHASHSEED": "0",  # the same order of sets in each run
        }
        process = subprocess.Popen(
            [sys.executable, "-s", "-B", "-c", CONFINE.read_text(encoding="utf-8")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        assert process.stdin and process.stdout
        try:
            with process.stdin as stdin:
                stdin.write(json.dumps(order).encode())
        except BrokenPipeError:
            pass  # it ended early, and has said why
        try:
            return watch(process, token.encode(), timeout)
        finally:
            # also where it closed its output and goes on
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def watch(process: subprocess.Popen[bytes], token: bytes, timeout: float) -> Result:
    """Read what a process prints until it ends, or has used up its time or output; see `confine.main`."""
    output, confined = b"", False
    deadline = time.monotonic() + START_SECONDS
    assert process.stdout
    while True:
        chunk = read_before(process.stdout.fileno(), deadline)
        output += chunk or b""
        if not confined and output.startswith(token):
            confined, output = True, output.removeprefix(token)
            deadline = time.monotonic() + timeout
        said = output.decode(errors="replace").strip()
        if not confined and not chunk:
            raise OSError(f"generated code cannot be confined on this machine: {last_line(said) or 'no answer'}")
        if chunk is None:
            return Result(False, f"timed out after {timeout:g} s", said[:OUTPUT])
        if len(output) > OUTPUT + len(token):
            return Result(False, f"printed more than {OUTPUT} bytes", said[:OUTPUT])
        if not chunk:
            if output.endswith(token):
                return Result(True, "", output.removesuffix(token).decode(errors="replace"))
            return Result(False, last_line(said) or "ended before its end, without an exception", said)


def read_before(descriptor: int, deadline: float) -> bytes | None:
    """Some bytes; none at the end of the output; None if there were none before the deadline."""
    ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
    return os.read(descriptor, CHUNK) if ready else None


def last_line(text: str) -> str:
    return text.splitlines()[-1].strip() if text else ""
