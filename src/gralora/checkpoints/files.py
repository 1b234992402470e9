"""Read and write safetensors tensor by tensor, and make folders that appear whole or not at all.

Only safetensors and JSON are ever read; pickled checkpoints (`.bin`, `.pt`) can run code and are refused.
"""

import contextlib
import errno
import json
import os
import platform
import secrets
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..strings import printable

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FINISHED = ".finished"  # subfolder of an adapter's folder while its files are replaced
DEPTH = 32  # levels of nested JSON; configs need a few
LONGEST = 1 << 25  # bytes of JSON; the index of a model with 100,000 tensors takes a third of it
MOST_TENSORS = 1 << 18  # in one file
DTYPES = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class LazyTensors(Mapping[str, Tensor]):
    """A mapping of names to tensors that are read or computed each time they are asked for.

    Attributes:
        specs: name -> shape and dtype, as a tensor on any device whose values are not used.
    """

    def __init__(self, specs: Mapping[str, Tensor], load: Callable[[str], Tensor]) -> None:
        self.specs = dict(specs)
        self._load = load

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.specs:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def renamed(self, sources: Mapping[str, str]) -> "LazyTensors":
        """Return the tensors `sources.values()` under the names `sources.keys()`; others are left out."""
        specs = {new: self.specs[old] for new, old in sources.items()}
        return LazyTensors(specs, lambda name: self._load(sources[name]))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "LazyTensors":
        return tensors if isinstance(tensors, cls) else cls(tensors, tensors.__getitem__)


def spec(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Make a tensor that has a shape and a dtype but takes no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def read_safetensors(path: Path) -> LazyTensors:
    """Open a file; tensors are read when asked for.

    Raises:
        ValueError: if it is damaged, or has a dtype that torch lacks.
    """
    try:
        file = safe_open(path, framework="pt")
        specs = {}
        if len(file.keys()) > MOST_TENSORS:
            raise ValueError(f"{str(path)!r} has {len(file.keys()):,} tensors, more than {MOST_TENSORS:,}.")
        for name in list(file.keys()):
            entry = file.get_slice(name)
            if entry.get_dtype() not in DTYPES:
                raise ValueError(f"tensor {name!r} in {str(path)!r} has the unsupported dtype {entry.get_dtype()}.")
            specs[name] = spec(tuple(entry.get_shape()), DTYPES[entry.get_dtype()])
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a valid safetensors file: {error}") from error
    return LazyTensors(specs, file.get_tensor)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], done: Callable[[], Any] | None = None) -> None:
    """Write `tensors` to a file, holding one of them at a time.

    Args:
        path: the file. It is written in place, so put it into a folder from `new_folder`.
        tensors: name -> tensor, e.g. LazyTensors.
        done: called after each tensor.

    Raises:
        ValueError: if shape or dtype of a tensor differ from its spec.
    """
    specs = LazyTensors.of(tensors).specs
    names = sorted(specs, key=lambda name: -specs[name].element_size())  # aligns each tensor to its element size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + specs[name].numel() * specs[name].element_size()
        dtype = DTYPE_NAMES[specs[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(specs[name].shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            tensor = tensors[name].detach().cpu().contiguous()
            if tensor.shape != specs[name].shape or tensor.dtype != specs[name].dtype:
                raise ValueError(
                    f"tensor {name!r} is {tuple(tensor.shape)} {tensor.dtype}, announced as "
                    f"{tuple(specs[name].shape)} {specs[name].dtype}."
                )
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            if done is not None:
                done()
        sync(file)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: if it holds anything else, names a field twice, nests deeper than DEPTH or is longer than LONGEST.
    """
    if path.stat().st_size > LONGEST:
        raise ValueError(f"{str(path)!r} has {path.stat().st_size:,} bytes, more than {LONGEST:,}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError(f"{str(path)!r} nests deeper than {DEPTH} levels.") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a JSON {type(content).__name__}, not an object.")
    level: list[Any] = [content]
    for _ in range(DEPTH):
        level = [v for x in level for v in (x.values() if isinstance(x, dict) else x) if isinstance(v, dict | list)]
    if level:
        raise ValueError(f"{str(path)!r} nests deeper than {DEPTH} levels.")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the field {name!r} is there twice")
    return found


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a file to write, which replaces the one at `path` after the block; an error keeps the older file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a file that afterwards is complete or, after an error, as it was before."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
        sync(file)


def read_adapter_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], LazyTensors]:
    """Read config and tensors of an adapter of any format, as they are in its folder.

    Raises:
        OSError: if the folder or one of its two files is missing.
        ValueError: if a file is damaged, or the weights are pickled.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"adapter {str(folder)!r} is not a folder; a Hub id must be downloaded first.")
    if not (folder / CONFIG).is_file() and (folder / FINISHED).is_dir():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {CONFIG}: a program was killed while it replaced the adapter. The new one is "
            f"complete: move the files of {str(folder / FINISHED)!r} into {str(folder)!r}."
        )
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {CONFIG}, so it is not an adapter.")
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(path.name for ending in ("bin", "pt", "pth") for path in folder.glob(f"*.{ending}"))
        if pickled:
            raise ValueError(
                f"{str(folder)!r} has pickled weights ({', '.join(pickled)}), which can run code when read; load the "
                f"adapter where you trust it and save it as safetensors ({WEIGHTS})."
            )
        raise FileNotFoundError(f"{str(folder)!r} has no {WEIGHTS}.")
    return read_json(folder / CONFIG), read_safetensors(folder / WEIGHTS)


def check_absent(path: Path) -> None:
    """Raise OSError, with the reason, if a new folder cannot be made at `path`; an empty one may be there.

    Call this before work that takes long, and resolve links first, with `Path.resolve`.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"output {str(path)!r} exists; choose another name, or remove it.")
    if path.is_mount():
        raise FileExistsError(f"output {str(path)!r} is where a file system is mounted; give a folder inside of it.")
    existing_parent(path)


def existing_parent(path: Path) -> Path:
    """Return the nearest existing folder above `path`; NotADirectoryError if that is a file."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"output {str(path)!r} cannot be made: {str(parent)!r} is a file.")
    return parent


def check_space(path: Path, needed: int) -> None:
    """Raise OSError if the file system that will hold `path` has less than `needed` bytes free."""
    parent = existing_parent(path)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"No space left for {str(path)!r}: it needs {needed:,} bytes, and {str(parent)!r} has {free:,} free",
        )


@contextmanager
def locked(lock: Path, place: Path) -> Iterator[None]:
    """Keep other processes out of a place during the block; the system releases the lock if this process dies.

    On Windows, which has no such locks, and on file systems without them, this warns and keeps nobody out.

    Args:
        lock: the lock file, which is made here and removed after the block.
        place: the place that is locked, for messages.

    Raises:
        BlockingIOError: if another process has the lock; the message says which.
    """
    existing_parent(place)
    if fcntl is None:
        _warn_of_no_locks(f"{sys.platform} has no flock")
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(descriptor):
            holder = printable(os.read(descriptor, 500).decode(errors="replace")) or "another process"
            os.close(descriptor)
            raise BlockingIOError(
                f"{str(place)!r} is being written by {holder}; wait for it to end, or choose another name."
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
        os.close(descriptor)  # the process that had the lock has removed the file meanwhile
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file; False if another process has locked it. If its file system has no locks, warn and go on."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _warn_of_no_locks(str(error))
    return True


def _warn_of_no_locks(why: str) -> None:
    warnings.warn(f"outputs cannot be locked here ({why}); do not write one twice at once.", stacklevel=4)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder to write into, which is moved to `path` after the block, and removed after an error.

    Raises:
        FileExistsError: if `path` exists and is not an empty folder, before the block or after it.
        OSError: if it cannot be made.
    """
    path = Path(path).resolve()
    check_absent(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        check_absent(path)  # again: another process may have been faster
        publish(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_files(folder: Path, path: Path) -> None:
    """Replace the files of an adapter in `path` by those of a newer one, written to `folder`, a subfolder of `path`.

    The two adapters are never mixed: the old config is removed first, and the new one is moved last. If the process is
    killed in between, the new files are complete in `path` and its subfolder FINISHED, and `finish_replacing` goes on.
    """
    finish_replacing(path)
    sync_files(folder)
    os.replace(folder, path / FINISHED)
    finish_replacing(path)


def finish_replacing(path: Path) -> None:
    """Finish what `replace_files` began, if it was interrupted."""
    finished = path / FINISHED
    if not finished.is_dir():
        return
    (path / CONFIG).unlink(missing_ok=True)
    for file in sorted(finished.iterdir(), key=lambda file: file.name == CONFIG):
        os.replace(file, path / file.name)
        sync_folder(path)
    finished.rmdir()


def publish(folder: Path, path: Path) -> None:
    """Move a finished folder to its place durably, so that even after a power failure it is whole or absent.

    Raises:
        FileExistsError: if another process has put something there since `check_absent`; it stays.
    """
    sync_files(folder)
    try:
        if path.is_dir():
            path.rmdir()  # if it is empty; Windows does not replace a folder
        os.replace(folder, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(f"output {str(path)!r} was made by another process meanwhile.") from error
        raise
    sync_folder(path.parent)


def sync_files(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb+") as opened:  # Windows flushes none that is open for reading only
            os.fsync(opened.fileno())
    sync_folder(folder)


def sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    if fcntl is None:  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
