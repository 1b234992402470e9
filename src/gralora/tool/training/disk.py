"""Disks that fill up: foreseen where that is possible, and otherwise said in plain words."""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from transformers import TrainingArguments

from ...checkpoints.files import WEIGHTS, existing_parent, sync
from .resume import checkpoints, fault

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PROBE = 1 << 20  # bytes


def least_space(model: PeftModel, args: TrainingArguments) -> int:
    """The bytes that a run writes at least: the adapter, and once more in a checkpoint if there are to be any."""
    adapter = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return adapter * (1 if args.save_strategy == "no" else 2)


@contextmanager
def full_disk_is_said(folder: Path) -> Iterator[None]:
    """Raise an OSError that says so, and how to go on, where the block fails because the disk of `folder` is full.

    torch and safetensors report a write that failed in their own words ("unexpected pos 64 vs 0"), without the
    system's reason. A small file shows it.
    """
    began = time.time()
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error if isinstance(error, OSError) and error.errno in FULL else why_not_written(folder)
        if reason is None or reason.errno not in FULL:
            raise
        raise OSError(
            reason.errno, f"{reason.strerror}: {str(folder)!r} could not be written. {kept(folder, began)}"
        ) from error


def why_not_written(folder: Path) -> OSError | None:
    """The system's error when a file is written to a folder; None if there is none."""
    path = (folder if folder.is_dir() else existing_parent(folder)) / ".probe"
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE))
            sync(file)
    except OSError as error:
        return error
    finally:
        path.unlink(missing_ok=True)
    return None


def kept(folder: Path, began: float) -> str:
    """What there is of a run that began at a time, and how to go on."""
    weights, found = folder / WEIGHTS, checkpoints(folder)
    if weights.is_file() and weights.stat().st_mtime >= began:
        return "The adapter there is trained and complete; a report or chart beside it is not."
    earlier = f"{WEIGHTS} there is that of an earlier run. " if weights.is_file() else ""
    whole = next((path for path in found if fault(path) is None), None)
    if whole is not None:
        step = whole.name.split("-")[1]
        return f"{earlier}Free some space, and go on from step {step} with --resume_from_checkpoint latest."
    again = "repeat the command with --overwrite" if found or earlier else "repeat the command"
    return f"{earlier}No checkpoint is complete: free some space, and {again}."
