"""Killed at any point, on a full disk, in a read-only folder: nothing finished is lost, and the next run goes on."""

import collections
import contextlib
import errno
import fcntl
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SEED, times, tiny_llama
from saved import CONFIG, WEIGHTS, read, save_gralora, write
from tqdm import tqdm

import gralora
from gralora.checkpoints import convert, files, merge, targets
from gralora.tool.finetune import FinetuneArguments, finetune

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork, kill and mounts"),
]
QUICK, SLOW = 4, 60  # kills at random times, of each operation
# events of Python's audit hooks that touch files; at each of them a process can be killed
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def in_child(action: Callable[[], Any], kill_at: int = 0, kill_after: float = 0.0) -> int:
    """Run `action` in a forked process and kill it, as `kill -9` does, at its n-th file event or after a time.

    Returns:
        How many file events it had, if it was not killed; else 0.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            # the inherited lock is one of all processes: whoever is killed holding it would hold it for ever
            tqdm.set_lock(threading.RLock())
            count = 0

            def hook(event: str, args: tuple[Any, ...]) -> None:
                nonlocal count
                if event in FILE_EVENTS:
                    count += 1
                    if count == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            action()
            os.write(writer, str(count).encode())
        finally:
            os._exit(0)
    os.close(writer)
    if kill_after:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as pipe:
        count = int(pipe.read() or 0)
    assert count or os.WIFSIGNALED(status), "the action raised an error"
    return count


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with an adapter `in` and a base model `base` of several files."""
    save_gralora(tmp_path / "in")
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="4KB")
    return tmp_path


OPERATIONS: dict[str, Callable[[Path, Path], Any]] = {
    "merge": lambda inputs, out: gralora.merge_adapter(inputs / "in", out, inputs / "base"),
    "export": lambda inputs, out: gralora.to_lora(inputs / "in", out),
    "convert": lambda inputs, out: gralora.convert_adapter(inputs / "in", out, to="peft"),
}


def check_killed(operation: str, inputs: Path, expected: dict[str, bytes], **when: Any) -> bool:
    """Kill an operation and run it again; returns whether it was killed before it was done."""
    out, run = inputs / "out", OPERATIONS[operation]
    before = contents(inputs / "in") | contents(inputs / "base")
    killed = not in_child(lambda: run(inputs, out), **when)
    if out.exists():
        assert contents(out) == expected, when
        with pytest.raises(FileExistsError, match="exists; choose another name"):
            run(inputs, out)
    else:
        assert killed
        run(inputs, out)
        assert contents(out) == expected, when
    assert contents(inputs / "in") | contents(inputs / "base") == before
    shutil.rmtree(out)
    for left in inputs.glob(".out.*"):  # what a killed export or conversion leaves, for the user to delete
        assert operation != "merge"
        shutil.rmtree(left)
    return killed


def try_kills(operation: str, inputs: Path, count: int, every_event: bool) -> None:
    out = inputs / "out"
    started = time.monotonic()
    OPERATIONS[operation](inputs, out)
    duration, expected = time.monotonic() - started, contents(out)
    shutil.rmtree(out)
    events = in_child(lambda: OPERATIONS[operation](inputs, out))
    assert contents(out) == expected and events > 5
    shutil.rmtree(out)
    r = random.Random(SEED)
    numbers = range(1, events + 1) if every_event else sorted(r.sample(range(1, events), count))
    killed = sum(check_killed(operation, inputs, expected, kill_at=n) for n in numbers)
    assert killed >= len(numbers) - 1
    at_random = 0
    while at_random < count:
        at_random += check_killed(operation, inputs, expected, kill_after=r.uniform(0, duration))
    print(f"{operation}: killed at {killed} of its {events} file events, and {at_random} times at random")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_and_run_again(inputs: Path, operation: str) -> None:
    try_kills(operation, inputs, QUICK, every_event=False)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_every_file_event(inputs: Path, operation: str) -> None:
    try_kills(operation, inputs, times(SLOW), every_event=True)


def test_merge_killed_again_and_again(inputs: Path) -> None:
    """Each run goes on where the last was killed, so that short runs get there."""
    out = inputs / "out"
    OPERATIONS["merge"](inputs, out)
    expected = contents(out)
    shutil.rmtree(out)
    events = in_child(lambda: OPERATIONS["merge"](inputs, out))
    shutil.rmtree(out)
    shards = len(list((inputs / "base").glob("*.safetensors")))
    finished = 0
    for _ in range(200):
        if in_child(lambda: OPERATIONS["merge"](inputs, out), kill_at=events * 3 // 4):
            break
        now = len(list((inputs / ".out.partial").glob("*.safetensors")))
        assert now > finished or now == shards
        finished = now
        events += 5  # of the rest that is left to do, fewer each time
    assert contents(out) == expected and finished == shards


def check_killed_save(tmp_path: Path, model: Any, old: dict[str, bytes], new: dict[str, bytes], after: float) -> str:
    """Kill PEFT's save_pretrained over an older adapter; returns what is there."""
    folder = tmp_path / "saved"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in old.items():
        (folder / name).write_bytes(content)
    in_child(lambda: model.save_pretrained(folder), kill_after=after)
    found = contents(folder)
    if all(found[name] == old[name] for name in (CONFIG, WEIGHTS)):
        return "old"
    if all(found[name] == new[name] for name in (CONFIG, WEIGHTS)):
        return "new"
    with pytest.raises((ValueError, OSError), match="adapter_"):
        gralora.load_adapter(tiny_llama(), folder)
    return "refused"


def try_killed_saves(tmp_path: Path, count: int) -> None:
    save_gralora(tmp_path / "in")
    model = gralora.load_adapter(tiny_llama(), tmp_path / "in")
    model.save_pretrained(tmp_path / "old")
    for p in model.parameters():
        p.data *= 2
    started = time.monotonic()
    model.save_pretrained(tmp_path / "new")
    duration, r = time.monotonic() - started, random.Random(SEED)
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    found = [check_killed_save(tmp_path, model, old, new, r.uniform(0, duration)) for _ in range(count)]
    print(f"save_pretrained killed {count} times: {', '.join(f'{found.count(x)} {x}' for x in sorted(set(found)))}")


def test_killed_save(tmp_path: Path) -> None:
    """PEFT writes in place, first the weights: what is half written is refused, never half loaded."""
    try_killed_saves(tmp_path, QUICK)


@pytest.mark.slow
def test_many_killed_saves(tmp_path: Path) -> None:
    try_killed_saves(tmp_path, times(SLOW))


def test_replacing_an_adapter_killed_anywhere(tmp_path: Path) -> None:
    """The old one, the new one, or a refusal that says where the new one is; going on gives the new one."""
    save_gralora(tmp_path / "old")
    save_gralora(tmp_path / "new", lora_alpha=1)
    config, tensors = read(tmp_path / "new")
    write(tmp_path / "new", config, {name: 2 * t for name, t in tensors.items()})  # else a mix would not show
    old, new, folder = contents(tmp_path / "old"), contents(tmp_path / "new"), tmp_path / "adapter"
    found, events = [], 0
    for n in range(0, 100):  # 0: not killed, to count
        if n > events:
            break
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        (folder / "other").write_bytes(b"kept")
        shutil.copytree(tmp_path / "new", folder / ".new")
        events = in_child(lambda: files.replace_files(folder / ".new", folder), kill_at=n) or events
        state = contents(folder)
        here = {name: state.get(name) for name in (CONFIG, WEIGHTS)}
        if here == {name: old[name] for name in here}:
            found.append("old")
        elif here == {name: new[name] for name in here}:
            found.append("new")
        else:
            found.append("refused")
            with pytest.raises(FileNotFoundError, match="The new one is complete: move the files"):
                gralora.load_adapter(tiny_llama(), folder)
            files.finish_replacing(folder)
            assert contents(folder) == new | {"other": b"kept"}
    assert set(found) == {"old", "new", "refused"} and events > 5


# Two at once


def race(*actions: Callable[[], Any], delays: tuple[float, ...]) -> list[str]:
    """Run actions in processes of their own, each after a delay; returns for each "done" or the error's name."""
    children = []
    for action, delay in zip(actions, delays, strict=True):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                tqdm.set_lock(threading.RLock())
                time.sleep(delay)
                action()
                os.write(writer, b"done")
            except BaseException as error:
                os.write(writer, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(0)
        os.close(writer)
        children.append((pid, reader))
    results = []
    for pid, reader in children:
        with os.fdopen(reader) as pipe:
            results.append(pipe.read())
        os.waitpid(pid, 0)
    return results


def try_races(operation: str, inputs: Path, count: int) -> dict[str, int]:
    """Two operations with different results into one folder: one is done and its files are there, the other is told.

    Returns:
        How often the other was told that the first was writing, that it had written, or that it was faster.
    """
    save_gralora(inputs / "other", lora_alpha=1)
    first, second = OPERATIONS[operation], OTHERS[operation]
    results = {}
    for name, run in {"first": first, "second": second}.items():
        started = time.monotonic()
        run(inputs, inputs / name)
        results[name] = contents(inputs / name), time.monotonic() - started
    assert results["first"][0] != results["second"][0]
    r, told = random.Random(SEED), {"being written": 0, "exists": 0, "meanwhile": 0}
    duration = max(seconds for _, seconds in results.values())
    for _ in range(count):
        delays = (0.0, r.uniform(0, 1.2 * duration)) if r.random() < 0.5 else (r.uniform(0, 0.2 * duration), 0.0)
        out = inputs / "out"
        ended = race(lambda: first(inputs, out), lambda: second(inputs, out), delays=delays)  # noqa: B023
        assert ended.count("done") == 1, ended
        winner = list(results)[ended.index("done")]
        named = {n: x for n, x in contents(out).items() if n != "export_report.json"}  # has the output's name in it
        assert named == {n: x for n, x in results[winner][0].items() if n != "export_report.json"}
        loser = next(one for one in ended if one != "done")
        told[next(word for word in told if word in loser)] += 1
        assert not list(inputs.glob(".out*"))
        shutil.rmtree(out)
    print(f"{operation}: {count} races of two; the slower one was told: {told}")
    return told


OTHERS: dict[str, Callable[[Path, Path], Any]] = {
    "merge": lambda inputs, out: gralora.merge_adapter(inputs / "other", out, inputs / "base", dtype=torch.bfloat16),
    "export": lambda inputs, out: gralora.to_lora(inputs / "other", out),
    "convert": lambda inputs, out: gralora.convert_adapter(inputs / "other", out),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_two_at_once_into_one_folder(inputs: Path, operation: str) -> None:
    try_races(operation, inputs, 2 * QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_many_races(inputs: Path, operation: str) -> None:
    try_races(operation, inputs, 2 * times(SLOW))


def test_same_merge_started_twice(inputs: Path) -> None:
    """With nothing different, too: one writes, and the other says which process does."""
    out, started = inputs / "out", inputs / "started"
    run = OPERATIONS["merge"]

    def slowly() -> None:
        with pytest.MonkeyPatch.context() as patch:
            copy = merge.copy_other_files
            patch.setattr(merge, "copy_other_files", lambda *a: (started.touch(), time.sleep(3), copy(*a)))
            run(inputs, out)

    def after() -> None:
        while not started.exists():
            time.sleep(0.01)
        run(inputs, out)

    first, second = race(slowly, after, delays=(0, 0))
    assert first == "done"
    assert "out' is being written by process " in second and "BlockingIOError" in second


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    def hold() -> None:
        with files.locked(tmp_path / "lock", tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    in_child(hold, kill_after=5)
    assert (tmp_path / "lock").exists()
    with (
        files.locked(tmp_path / "lock", tmp_path),
        pytest.raises(BlockingIOError, match=f"by process {os.getpid()} "),
        files.locked(tmp_path / "lock", tmp_path),
    ):
        pass
    assert not (tmp_path / "lock").exists()


def test_many_wait_for_one_lock(tmp_path: Path) -> None:
    """Never two at a time, also while the file is removed and made again."""
    count = tmp_path / "count"
    count.write_text("0")

    def add() -> None:
        done = 0
        while done < 50:
            with contextlib.suppress(BlockingIOError), files.locked(tmp_path / "lock", tmp_path):
                count.write_text(str(int(count.read_text()) + 1))
                done += 1

    assert race(*[add] * 4, delays=(0,) * 4) == ["done"] * 4
    assert count.read_text() == "200" and sorted(path.name for path in tmp_path.iterdir()) == ["count"]


# What can be known before


@pytest.mark.parametrize("operation", OPERATIONS)
def test_outputs_that_cannot_be_made(inputs: Path, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told at once: before a tensor is computed, and nothing is left."""
    for module, name in ((merge, "write_safetensors"), (targets, "write_safetensors"), (convert, "write_safetensors")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a file was written"))
    before = {path.name for path in inputs.iterdir()} | {"file", "link", "deep"}
    (inputs / "file").write_text("kept")
    (inputs / "link").symlink_to(inputs / "base")
    (inputs / "deep").symlink_to(inputs / "file" / "nowhere")
    for out, error in {
        "base": FileExistsError,
        "file": FileExistsError,
        "link": FileExistsError,
        "file/out": NotADirectoryError,
        "deep": NotADirectoryError,
        "n" * 300: OSError,
    }.items():
        with pytest.raises(error):
            OPERATIONS[operation](inputs, inputs / out)
    assert {path.name for path in inputs.iterdir()} == before


@pytest.mark.parametrize("operation", OPERATIONS)
def test_output_through_a_link(inputs: Path, operation: str) -> None:
    """A link to a place that is free is followed, and stays."""
    (inputs / "link").symlink_to(inputs / "elsewhere" / "out")
    OPERATIONS[operation](inputs, inputs / "link")
    assert (inputs / "link").is_symlink() and (inputs / "elsewhere" / "out").is_dir()


def test_space_is_looked_at_before_a_merge(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is there already of an interrupted one is not needed again."""
    size = sum(path.stat().st_size for path in (inputs / "base").glob("*.safetensors"))
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=size // 2))
    with pytest.raises(OSError, match=r"No space left for '.*out': it needs [\d,]+ bytes, and .* has [\d,]+ free"):
        OPERATIONS["merge"](inputs, inputs / "out")
    assert sorted(path.name for path in inputs.iterdir()) == ["base", "in"]
    gralora.merge_adapter(inputs / "in", inputs / "out", inputs / "base", dtype=torch.bfloat16)  # half as large


def test_device_that_is_not_there(inputs: Path) -> None:
    with pytest.raises(ValueError, match="device='nowhere' cannot be used"):
        gralora.merge_adapter(inputs / "in", inputs / "out", inputs / "base", device="nowhere")
    assert sorted(path.name for path in inputs.iterdir()) == ["base", "in"]


# Finetune


def finetune_arguments(tmp_path: Path, base: Path, **changes: Any) -> FinetuneArguments:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(f'{{"instruction": "say {x}", "output": "{x}{x}"}}' for x in range(20)))
    fields = {"base_model": str(base), "data_path": str(data), "output_dir": str(tmp_path / "out"), "max_steps": 6}
    fields |= {"batch_size": 2, "micro_batch_size": 2, "max_seq_length": 64, "val_set_size": 0, "save_steps": 2}
    fields |= {"lora_r": 8, "use_gralora": True, "lora_target_modules": ["q_proj"], "learning_rate": 1e-2}
    if "overwrite" in FinetuneArguments.__dataclass_fields__:
        fields["overwrite"] = True
    return FinetuneArguments(**fields | changes)


def adapter_files(folder: Path) -> dict[str, bytes | None]:
    return {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in (CONFIG, WEIGHTS)}


def quiet_finetune(args: FinetuneArguments) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    finetune(args)


def finetune_in_child(args: FinetuneArguments, kill_after: float | None = None) -> bool:
    """In a process forked from one that has imported everything and run nothing, since autograd's threads do not
    survive a fork; returns whether it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gralora.tool.finetune", __name__])
    process = context.Process(target=quiet_finetune, args=(args,))
    process.start()
    process.join(kill_after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def try_finetune_kills(tmp_path: Path, base: Path, count: int) -> None:
    """Over a finished adapter: it stays, or the new one is there; a checkpoint goes on or is refused."""
    out, r, found = tmp_path / "out", random.Random(SEED), []
    assert not finetune_in_child(finetune_arguments(tmp_path, base, seed=1))
    first = tmp_path / "first"
    shutil.copytree(out, first, ignore=shutil.ignore_patterns("checkpoint-*"))
    started = time.monotonic()
    assert not finetune_in_child(finetune_arguments(tmp_path, base))
    duration, old, new = time.monotonic() - started, adapter_files(first), adapter_files(out)
    assert old[WEIGHTS] != new[WEIGHTS] and None not in (*old.values(), *new.values())
    while len(found) < count:
        shutil.rmtree(out)
        shutil.copytree(first, out)
        if not finetune_in_child(finetune_arguments(tmp_path, base), duration * (0.3 + 0.7 * r.random())):
            continue  # it was done before
        state = adapter_files(out)
        if state != old and state != new:  # killed while the files were moved: nothing is lost
            files.finish_replacing(out)
            state = adapter_files(out)
        assert state in (old, new)
        found.append("old" if state == old else "new")
        checkpoints = sorted(out.glob("checkpoint-*"))
        if checkpoints and len(found) % 5 == 0:
            args = finetune_arguments(tmp_path, base, resume_from_checkpoint=str(checkpoints[-1]))
            try:
                finetune(args)
            except (ValueError, OSError) as error:
                assert "checkpoint" in str(error) and adapter_files(out) == state
                found[-1] += ", its checkpoint refused"
            else:
                assert adapter_files(out)[WEIGHTS] == new[WEIGHTS]
                found[-1] += ", resumed to the end of the whole run"
    print(f"finetune killed {count} times: {', '.join(f'{found.count(x)} {x}' for x in sorted(set(found)))}")


def test_finetune_into_a_folder_that_is_being_written(tmp_path: Path, tiny_model: Path) -> None:
    """Told before anything is loaded; the folder that the other run writes is as it was."""
    args = finetune_arguments(tmp_path, tiny_model)
    out = tmp_path / "out"
    with (
        files.locked(tmp_path / ".out.lock", out),
        pytest.raises(BlockingIOError, match=f"out' is being written by process {os.getpid()} "),
    ):
        finetune(args)
    assert not out.exists()


@pytest.mark.slow
def test_two_finetunes_into_one_folder(tmp_path: Path, tiny_model: Path) -> None:
    """One of them ends, with its adapter whole; the other has changed nothing of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gralora.tool.finetune", __name__])
    expected = []
    for seed in (1, 2):
        assert not finetune_in_child(finetune_arguments(tmp_path, tiny_model, seed=seed))
        expected.append(adapter_files(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    for _ in range(times(4)):
        runs = [finetune_arguments(tmp_path, tiny_model, seed=seed, overwrite=False) for seed in (1, 2)]
        processes = [context.Process(target=quiet_finetune, args=(args,)) for args in runs]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        assert sorted(codes) == [0, 1]
        assert adapter_files(tmp_path / "out") == expected[codes.index(0)]
        shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
def test_finetune_killed_often(tmp_path: Path, tiny_model: Path) -> None:
    try_finetune_kills(tmp_path, tiny_model, times(SLOW))


# Full disks and read-only folders


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """mount(*options) -> a folder that is a file system of its own."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def do(*options: str) -> Path:
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting is not permitted here")
        return folder

    yield do
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)  # a file there may still be mapped


@pytest.mark.parametrize("operation", OPERATIONS)
def test_full_disk(inputs: Path, operation: str, mount: Callable[..., Path]) -> None:
    """A small file system fills up in the middle; with room, the next run succeeds."""
    size = {"merge": "24k", "export": "8k", "convert": "8k"}[operation]
    folder = mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    (folder / "precious").write_bytes(b"kept")
    before = contents(inputs / "in")
    with pytest.raises(OSError, match="No space left"):
        OPERATIONS[operation](inputs, folder / "out")
    assert not (folder / "out").exists() and (folder / "precious").read_bytes() == b"kept"
    assert contents(inputs / "in") == before
    if operation != "merge":  # which keeps what is done, to go on
        assert [path.name for path in folder.iterdir()] == ["precious"]
    subprocess.run(["mount", "-o", "remount,size=10M", str(folder)], check=True)
    OPERATIONS[operation](inputs, folder / "out")
    OPERATIONS[operation](inputs, inputs / "elsewhere")
    skipped = {"export_report.json"}  # has the output's name in it
    found, expected = contents(folder / "out"), contents(inputs / "elsewhere")
    assert {n: x for n, x in found.items() if n not in skipped} == {
        n: x for n, x in expected.items() if n not in skipped
    }


@pytest.mark.parametrize("size", [1, 300, 2000])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_write_that_fails_in_the_middle(inputs: Path, operation: str, size: int) -> None:
    """No file may grow beyond `size` bytes, as on a full disk; needs no mount."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            OPERATIONS[operation](inputs, inputs / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (inputs / "out").exists()
    OPERATIONS[operation](inputs, inputs / "out")
    assert not list(inputs.glob(".out.*"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_read_only_folder(inputs: Path, operation: str, mount: Callable[..., Path]) -> None:
    (inputs / "source").mkdir()
    (inputs / "source" / "precious").write_bytes(b"kept")
    folder = mount("--bind", str(inputs / "source"))
    subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        OPERATIONS[operation](inputs, folder / "out")
    assert contents(folder) == {"precious": b"kept"}


def test_finetune_looks_at_the_space_first(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step; the adapter is needed once more where there are to be checkpoints."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 8191))
    with pytest.raises(OSError, match=r"it needs 8,192 bytes, and .* has 8,191 free") as error:
        finetune(finetune_arguments(tmp_path, tiny_model))
    assert error.value.errno == errno.ENOSPC and not list((tmp_path / "out").glob("*"))
    finetune(finetune_arguments(tmp_path, tiny_model, trainer={"save_strategy": "no"}))


@pytest.mark.parametrize(
    "size, strategy, said",
    [
        ("32k", "steps", "No checkpoint is complete: free some space, and repeat the command with --overwrite."),
        ("16k", "no", "No checkpoint is complete: free some space, and repeat the command."),
        ("200k", "steps", r"Free some space, and go on from step \d with --resume_from_checkpoint latest\."),
    ],
    ids=["checkpoint", "adapter", "later checkpoint"],
)
def test_finetune_on_a_full_disk(
    tmp_path: Path, tiny_model: Path, mount: Callable[..., Path], size: str, strategy: str, said: str
) -> None:
    """It says that the disk is full and how to go on, whoever's write failed; with room, that is what goes on."""
    out = mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    fields = {"output_dir": str(out), "trainer": {"save_strategy": strategy}, "overwrite": False}
    with pytest.raises(OSError, match="No space left on device: ") as error:
        finetune(finetune_arguments(tmp_path, tiny_model, **fields))
    assert re.search(f"'{out}' could not be written. {said}", str(error.value))
    assert not (out / ".probe").exists() and not (tmp_path / ".mounted.lock").exists()
    subprocess.run(["mount", "-o", "remount,size=10M", str(out)], check=True)
    advice = {"resume_from_checkpoint": "latest"} if "latest" in said else {"overwrite": "--overwrite" in said}
    finetune(finetune_arguments(tmp_path, tiny_model, **fields | advice))
    assert read(out)


def test_finetune_whose_report_finds_no_space(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained is there, and said to be; no report stands beside an adapter of another run."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for overwritten in (False, True):
        with (
            monkeypatch.context() as patch,
            pytest.raises(OSError, match="The adapter there is trained and complete; a report or chart beside it"),
        ):
            patch.setattr("gralora.tool.finetune.write_json", full)
            finetune(finetune_arguments(tmp_path, tiny_model, seed=int(overwritten)))
        assert read(tmp_path / "out") and not (tmp_path / "out" / "metrics.json").exists()
        finetune(finetune_arguments(tmp_path, tiny_model))
        assert (tmp_path / "out" / "metrics.json").exists()
    before = contents(tmp_path / "out")
    monkeypatch.setattr("transformers.GenerationConfig.save_pretrained", full)
    with pytest.raises(OSError, match="there is that of an earlier run. Free some space, and go on from step 6"):
        finetune(finetune_arguments(tmp_path, tiny_model))
    after = contents(tmp_path / "out")
    assert [n for n in before if before[n] != after[n] and not n.startswith("checkpoint-")] == []
    monkeypatch.setattr("gralora.tool.finetune.train_or_interrupt", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(finetune_arguments(tmp_path, tiny_model))
    assert read(tmp_path / "out")


def test_json_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})
    for n in range(1, 4):
        in_child(lambda: files.write_json(path, {"a": 2}), kill_at=n)
        assert files.read_json(path) in ({"a": 1}, {"a": 2})


def test_adapter_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file, and the folder, is flushed to the disk before the folder gets its name."""
    synced, order = set(), []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(os.readlink(f"/proc/self/fd/{fd}")))
    replace = os.replace

    def replaced(source: Any, target: Any) -> None:
        if Path(source).is_dir():
            order.append({str(path) for path in [Path(source), *Path(source).iterdir()]} - synced)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    with files.new_folder(tmp_path / "out") as folder:
        (folder / "a").write_bytes(b"1")
        files.write_safetensors(folder / "b", {"x": torch.ones(3)})
    assert order == [set()] and str(tmp_path) in synced


# Windows, which has no locks, opens no folders, flushes no file that is open for reading, replaces no folder, and
# moves and deletes nothing that is open: an imitation on Linux, since the tests run there


def in_use(folder: Path) -> list[str]:
    """What of a folder this process has open or mapped."""
    descriptors = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    mapped = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return [path for path in {*descriptors, *mapped} if Path(path).is_relative_to(folder)]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, replace, fsync, unlink = os.open, os.replace, os.fsync, os.unlink

    def refuse(why: str, path: Any) -> None:
        raise PermissionError(13, why, str(path))

    def open_(path: Any, flags: int, *others: Any, **options: Any) -> int:
        if os.path.isdir(path) and "dir_fd" not in options:  # shutil.rmtree's, which does otherwise on Windows
            refuse("a folder is opened", path)
        return opened(path, flags, *others, **options)

    def replace_(source: Any, target: Any) -> None:
        if os.path.isdir(source) and os.path.exists(target):
            refuse("a folder is replaced", target)
        if found := in_use(Path(source)) + in_use(Path(target)):
            refuse("what is open is moved", found)
        replace(source, target)

    def unlink_(path: Any, **options: Any) -> None:
        if "dir_fd" not in options and in_use(Path(path)):
            refuse("what is open is deleted", path)
        unlink(path, **options)

    def fsync_(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "a file is flushed that is open for reading only")
        fsync(descriptor)

    for name, function in {"open": open_, "replace": replace_, "fsync": fsync_, "unlink": unlink_}.items():
        monkeypatch.setattr(os, name, function)
    monkeypatch.setattr(files, "fcntl", None)


ALSO_ON_WINDOWS = OPERATIONS | {
    "export and compare": lambda inputs, out: gralora.to_lora(inputs / "in", out, base=inputs / "base"),
    "gguf": lambda inputs, out: gralora.to_lora(inputs / "in", out, "llamacpp", base=inputs / "base"),
}


@pytest.mark.parametrize("operation", ALSO_ON_WINDOWS)
@pytest.mark.parametrize("is_there", [False, True], ids=["absent", "empty"])
def test_as_on_windows(inputs: Path, operation: str, is_there: bool, windows: None) -> None:
    """The same files, and a warning in place of the lock; into an empty folder, too."""
    if is_there:
        (inputs / "out").mkdir()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        ALSO_ON_WINDOWS[operation](inputs, inputs / "out")
    said = [str(w.message) for w in warned if "locked" in str(w.message)]
    assert len(said) == (operation == "merge") and all("do not write one twice at once" in text for text in said)
    assert sorted(path.name for path in inputs.iterdir()) == ["base", "in", "out"]
    if operation == "gguf":
        assert list((inputs / "out").glob("*.gguf"))
    elif operation == "merge":
        assert (inputs / "out" / "config.json").exists()
    else:
        assert read(inputs / "out")


def test_finetune_as_on_windows(tmp_path: Path, tiny_model: Path, windows: None) -> None:
    """Over an adapter of an earlier run, with checkpoints."""
    args = finetune_arguments(tmp_path, tiny_model)
    for _ in range(2):
        with pytest.warns(UserWarning, match="do not write one twice at once"):
            finetune(args)
    assert None not in adapter_files(tmp_path / "out").values() and list((tmp_path / "out").glob("checkpoint-*"))
