"""Generated code can do no harm: every attempt succeeds outside of the sandbox and fails inside."""

import ctypes
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import pytest

from gralora.tool.tasks import confine, sandbox
from gralora.tool.tasks.sandbox import check_sandbox, readable_folders, run_program

if sys.platform != "linux" or ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:
    pytest.skip("programs are confined by Landlock, which is not here", allow_module_level=True)

REFUSED = "PermissionError: [Errno 1] Operation not permitted"
NO_ACCESS = "PermissionError: [Errno 13] Permission denied"


def outside(program: str) -> subprocess.CompletedProcess:
    """The program as an ordinary process."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def assert_only_outside(program: str, refusal: str) -> None:
    """The program does what it wants outside; inside, it fails, and first, so that what it did outside is not used."""
    result = run_program(program)
    assert not result.passed and refusal in result.reason, result
    free = outside(program)
    assert free.returncode == 0, free.stderr


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends (and is reaped, or a zombie) within so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_what_is_harmless_runs():
    check_sandbox()
    program = "import collections, decimal, hashlib, heapq, json, math, random, re, typing\nprint(math.isqrt(50))"
    assert run_program(program) == (True, "", "7\n")
    assert run_program("import numpy\nprint(int((numpy.ones((9, 9)) @ numpy.ones(9)).sum()))").output == "81\n"
    assert run_program("assert __name__ == '__main__'\nimport sys\nassert sys.stdin.read() == ''").passed


@pytest.mark.parametrize(
    "program, reason",
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("assert 1 + 1 == 3, 'sum'", "AssertionError: sum"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended before its end"),
        ("import os; os.abort()", "ended before its end"),
        ("import os; os.close(1); os.close(2)", "OSError"),
    ],
)
def test_only_a_program_that_comes_to_its_end_passes(program, reason):
    result = run_program(program)
    assert not result.passed and (reason in result.reason or "ended before its end" in result.reason)


def test_files_in_the_home_folder_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "secret").write_text("password")
    assert_only_outside(f"assert open({str(tmp_path / 'secret')!r}).read() == 'password'", NO_ACCESS)
    assert_only_outside(f"import os; assert os.listdir({str(tmp_path)!r}) == ['secret']", NO_ACCESS)


def test_the_real_home_folder_cannot_be_listed():
    assert_only_outside(f"import os; os.listdir({str(Path.home())!r})", NO_ACCESS)


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "/dev/urandom", "/tmp"])
def test_the_rest_of_the_system_cannot_be_read(path):
    assert_only_outside(f"import os; os.close(os.open({path!r}, os.O_RDONLY))", NO_ACCESS)


def test_environment_is_not_handed_on(monkeypatch):
    monkeypatch.setenv("API_TOKEN", "secret")
    program = "import os; assert os.environ['API_TOKEN'] == 'secret'"
    assert_only_outside(program, "KeyError: 'API_TOKEN'")
    assert_only_outside("import os; assert 'PATH' in open(f'/proc/{os.getppid()}/environ').read()", NO_ACCESS)


@pytest.mark.parametrize(
    "change",
    [
        "open('{file}', 'a').write('more')",
        "open('{new}', 'w').write('x' * 10**7)",
        "os.remove('{file}')",
        "os.rename('{file}', '{new}')",
        "os.link('{file}', '{new}')",
        "os.symlink('{file}', '{new}')",
        "os.mkdir('{new}')",
        "os.mkfifo('{new}')",
        "os.truncate('{file}', 0)",
        "os.close(os.open('{file}', os.O_RDONLY | os.O_TRUNC))",
        "os.chmod('{file}', 0o700)",
        "os.utime('{file}', (0, 0))",
        "os.chown('{file}', os.getuid(), os.getgid())",
    ],
)
def test_files_cannot_be_changed(tmp_path, monkeypatch, change):
    """Not even in a folder that can be read: Python's library is one, and Landlock does not cover all of these."""
    file = tmp_path / "file"
    file.write_text("content")
    file.chmod(0o640)
    os.utime(file, (1, 1))
    readable = readable_folders()
    monkeypatch.setattr(sandbox, "readable_folders", lambda: [*readable, str(tmp_path)])
    assert run_program(f"assert open('{file}').read() == 'content'").passed
    program = "import os; " + change.format(file=file, new=tmp_path / "new")
    result = run_program(program)
    assert not result.passed and (REFUSED in result.reason or NO_ACCESS in result.reason), result
    assert file.read_text() == "content" and os.listdir(tmp_path) == ["file"]
    assert (file.stat().st_mode & 0o777, file.stat().st_mtime) == (0o640, 1)
    assert outside(program).returncode == 0


def test_working_folder_is_empty_and_not_writable():
    assert run_program("import os; assert os.getcwd() == os.environ['HOME']").passed
    assert_only_outside("import os, tempfile; os.chdir(tempfile.mkdtemp()); open('x', 'w')", "Error")
    assert REFUSED in run_program("open('x', 'w').write('x')").reason


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert_only_outside(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)", REFUSED)
    assert_only_outside("import socket; socket.socketpair()", REFUSED)
    assert_only_outside("import socket; socket.socket(socket.AF_UNIX)", REFUSED)


def test_no_processes():
    fork_bomb = """
        import os, signal
        children = []
        for _ in range(20):
            child = os.fork()
            if not child:
                signal.pause()
            children.append(child)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        """
    assert_only_outside(textwrap.dedent(fork_bomb), REFUSED)
    assert_only_outside("import subprocess; subprocess.run([__import__('sys').executable, '-V'], check=True)", REFUSED)
    assert_only_outside("import os, sys; os.execv(sys.executable, [sys.executable, '-V'])", REFUSED)
    assert_only_outside("import threading; threading.Thread(target=print).start()", "can't start new thread")


def test_no_child_is_left_behind(tmp_path):
    mark = tmp_path / "alive"
    daemon = f"""
        import os, time
        if not os.fork():
            os.setsid()
            if not os.fork():
                os.close(1), os.close(2)
                time.sleep(0.5)
                open({str(mark)!r}, "w")
            os._exit(0)
        """
    result = run_program(textwrap.dedent(daemon))
    assert not result.passed and REFUSED in result.reason
    time.sleep(1)
    assert not mark.exists()
    assert outside(textwrap.dedent(daemon)).returncode == 0
    time.sleep(1)
    assert mark.exists(), "outside, such a child lives on"


def test_other_processes_are_out_of_reach():
    assert_only_outside("import os; os.kill(os.getppid(), 0)", REFUSED)
    assert_only_outside("import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_CORE)", REFUSED)


def test_system_calls_without_python():
    """ctypes goes around Python's functions, not around the filter."""
    program = "import ctypes; l = ctypes.CDLL(None, use_errno=True); l.syscall({}, 0, 0, 0); e = ctypes.get_errno()\n"
    clone3, io_uring_setup, openat2 = 435, 425, 437
    for number in (clone3, io_uring_setup, openat2):
        assert run_program(program.format(number) + "assert e == 1").passed
        assert outside(program.format(number) + "assert e != 1").returncode == 0


def test_memory_is_limited():
    program = "import mmap; mmap.mmap(-1, 2 << 30)"
    assert_only_outside(program, "Cannot allocate memory")
    assert run_program(program, memory=4 << 30).passed
    assert "MemoryError" in run_program("bytearray(10 << 30)").reason


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(1000)",
        "while True: pass",
        "import signal, time\nfor s in (2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: time.sleep(1)",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    ],
)
def test_time_is_limited(program):
    started = time.monotonic()
    result = run_program(f"import os; print(os.getpid(), flush=True)\n{program}", timeout=0.5)
    assert result.reason == "timed out after 0.5 s" and time.monotonic() - started < 10
    assert gone(int(result.output))


def test_output_is_limited():
    result = run_program("while True: print('x' * 1000)", timeout=30)
    assert result.reason == "printed more than 65536 bytes" and len(result.output) == sandbox.OUTPUT
    assert run_program("print('x' * 60000)").passed and not run_program("print('x' * 66000)").passed


def test_a_program_that_closes_its_output_does_not_live_on(monkeypatch):
    pids = []
    watch = sandbox.watch
    monkeypatch.setattr(sandbox, "watch", lambda process, *rest: pids.append(process.pid) or watch(process, *rest))
    result = run_program("import os, time; os.close(1); os.close(2); time.sleep(1000)", timeout=30)
    assert not result.passed and gone(pids[0])


def test_it_dies_with_the_process_that_started_it():
    script = """
        from gralora.tool.tasks import sandbox
        watch = sandbox.watch
        sandbox.watch = lambda process, *rest: print(process.pid, flush=True) or watch(process, *rest)
        sandbox.run_program("import time; time.sleep(1000)", timeout=1000)
        """
    # sandbox.py by itself, since importing all of gralora takes seconds
    script = textwrap.dedent(script).replace("from gralora.tool.tasks import sandbox", "import sandbox")
    folder = str(Path(sandbox.__file__).parent)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}){script}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        confined = int(process.stdout.readline())
        time.sleep(0.5)
        assert not gone(confined, 0.1)
        process.send_signal(signal.SIGKILL)
    assert gone(confined)


@pytest.mark.parametrize(
    "broken, message",
    [
        ("LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE = 9999, 9999\n", "Landlock, which keeps a program from files"),
        ("SECCOMP_MODE_FILTER = 99\n", "seccomp: Invalid argument"),
        ("platform.machine = lambda: 'riscv64'\n", "machine 'riscv64'"),
        ("PR_SET_NO_NEW_PRIVS = 9999\n", "no new privileges"),
    ],
)
def test_nothing_runs_where_a_guarantee_is_missing(tmp_path, monkeypatch, broken, message):
    source = Path(confine.__file__).read_text()
    (tmp_path / "confine.py").write_text(source.replace("if __name__", f"{broken}if __name__"))
    monkeypatch.setattr(sandbox, "CONFINE", tmp_path / "confine.py")
    with pytest.raises(OSError, match=f"cannot be confined on this machine: .*{message}"):
        run_program("print('ran')")


def test_order(tmp_path, monkeypatch):
    """What the confined process is told, and how Python is started; a stand-in prints it."""
    echo = "import json, os, sys; order = json.load(sys.stdin); token = order['token']\n"
    echo += "flags = [sys.flags.no_user_site, sys.flags.dont_write_bytecode, hash('a'), dict(os.environ)]\n"
    (tmp_path / "echo.py").write_text(echo + "print(token + json.dumps([order, flags]) + token, end='')")
    monkeypatch.setattr(sandbox, "CONFINE", tmp_path / "echo.py")
    (first, flags), (second, again) = (
        json.loads(run_program("pass", timeout=2.5, memory=1 << 29).output) for _ in range(2)
    )
    assert len(first["token"]) == 32 and first.pop("token") != second.pop("token"), "a program cannot know it"
    told = {"parent": os.getpid(), "program": "pass", "readable": readable_folders(), "memory": 1 << 29}
    assert first == second == told | {"seconds": sandbox.START_SECONDS + 3}
    assert flags[:2] == [1, 1] and flags[2] == again[2], "the order of sets does not change"
    assert not os.path.exists(flags[3]["HOME"]) and flags[3]["HOME"] != again[3]["HOME"]


def test_limits_of_resources():
    """Those that seccomp, Landlock and the clock leave nothing to do for as long as they hold."""
    program = Path(confine.__file__).read_text().split("if __name__")[0] + "limit_resources(1 << 31, 7)\n"
    names = {"AS": 1 << 31, "CPU": 7, "CORE": 0, "FSIZE": 0, "NOFILE": confine.OPEN_FILES}
    result = outside(program + f"print([resource.getrlimit(getattr(resource, 'RLIMIT_' + n)) for n in {[*names]}])")
    assert result.stdout.strip() == str([(n, n) for n in names.values()]), result.stderr


def test_it_is_not_run_for_a_process_that_has_ended():
    order = {"token": "t", "parent": 1, "program": "print('ran')", "readable": [], "memory": 1 << 30, "seconds": 9}
    command = [sys.executable, "-c", Path(confine.__file__).read_text()]
    done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True)
    assert "the process that started this one has ended" in done.stderr and done.stdout == ""


def filtered(machine: str, architecture: int, call: int, third: int = 0) -> int:
    """What the kernel does with a system call, by running the filter; 64-bit arguments follow 16 bytes."""
    data = struct.pack("=IIQ6Q", call, architecture, 0, 0, 0, third, 0, 0, 0)
    program = list(struct.iter_unpack("=HBBI", confine.system_call_filter(machine)))
    position = value = 0
    while True:
        code, if_true, if_false, operand = program[position]
        position += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
        else:
            position += if_true if {0x15: value == operand, 0x45: value & operand}[code] else if_false


@pytest.mark.parametrize("machine", confine.MACHINES)
def test_filter_of_system_calls(machine):
    """On each machine, without having it: what is listed is allowed, all else fails, other machines' calls kill."""
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050001
    column, architecture = confine.MACHINES[machine]
    listed = {numbers[column] for numbers in confine.ALLOWED.values()} - {None}
    for call in set(range(600)) - {confine.OPENAT[column]}:
        assert filtered(machine, architecture, call) == (allow if call in listed else refuse), call
        assert filtered(machine, 0x40000003, call) == kill, "32-bit calls have other numbers"
    for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
        assert filtered(machine, architecture, confine.OPENAT[column], flag) == refuse
    for flag in (os.O_RDONLY, os.O_DIRECTORY, os.O_CLOEXEC):
        assert filtered(machine, architecture, confine.OPENAT[column], flag) == allow


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="cannot be confined on darwin: this needs Linux"):
        check_sandbox()


def test_home_folder_within_what_must_be_readable(monkeypatch):
    monkeypatch.setenv("HOME", sysconfig.get_path("stdlib"))
    with pytest.raises(OSError, match="the home folder .* is in it"):
        run_program("pass")


def test_numbers_of_system_calls():
    """The table, against the headers of this machine."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no Linux headers for x86_64")
    known = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    table = {name: numbers[0] for name, numbers in confine.ALLOWED.items()} | {"openat": confine.OPENAT[0]}
    assert table == {name: int(known[name]) for name in table}
