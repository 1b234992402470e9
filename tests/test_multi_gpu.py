"""`gralora finetune` on two GPUs, as accelerate starts it with configs/accelerate: NCCL, DDP and FSDP2.

As test_distributed.py, which runs more of it on CPUs: losses must be those of one GPU, also of a run that goes on from
another number of GPUs' checkpoint.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import (
    arguments,  # noqa: F401 (a fixture)
    assert_same_losses,
    finetune_command,
    launcher,
    log_of,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

STEP = 3  # of the checkpoint that others go on from
RUNS = {
    "one": (None, 1, None),
    "ddp-two": ("ddp", 2, None),
    "fsdp2-two": ("fsdp2", 2, None),
    "fsdp2-one": ("fsdp2", 1, None),
    "ddp two to one": (None, 1, "ddp-two"),
    "ddp one to two": ("ddp", 2, "one"),
    "fsdp2 two to one": ("fsdp2", 1, "fsdp2-two"),
    "fsdp2 one to two": ("fsdp2", 2, "fsdp2-one"),
}
# sums in another order; in bfloat16 FSDP2 also rounds the loss and sums of gradients, see test_distributed.py
TOLERANCE = {"plain": 1e-4, "bf16": 2**-7, "nf4": 2**-7}
OPTIONS = {"plain": {}, "bf16": {"bf16": True}, "nf4": {"bf16": True, "quantization": "4bit"}}


def start(engine: str | None, processes: int, options: dict[str, Any]) -> subprocess.Popen:
    command = [sys.executable] if engine is None else launcher(engine, processes)
    gpus = ",".join(map(str, range(processes)))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([*command, *finetune_command(options)], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module", params=TOLERANCE)
def runs(request, arguments, tmp_path_factory):  # noqa: F811
    """Folders of all runs of one kind, by their names; side by side, since starting takes longer than training."""
    folder = tmp_path_factory.mktemp(request.param)
    for going_on in (False, True):
        started = {}
        for name, (engine, processes, source) in RUNS.items():
            if bool(source) == going_on:
                options = arguments(name, folder, **OPTIONS[request.param])
                if source:
                    options["resume_from_checkpoint"] = str(folder / source / f"checkpoint-{STEP}")
                started[name] = start(engine, processes, options)
        for name, process in started.items():
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, f"{name}: {errors[-4000:]}"
    return request.param, folder


@pytest.mark.parametrize("name", [name for name in RUNS if name != "one"])
def test_losses_are_those_of_one_gpu(name, runs):
    kind, folder = runs
    after = STEP if RUNS[name][2] else 0
    assert_same_losses(log_of(folder / name), log_of(folder / "one"), TOLERANCE[kind], after)


def test_devices(runs):
    """The checkpoint of two GPUs is of two shards: the runs above did use both."""
    folder: Path = runs[1]
    assert (folder / "fsdp2-two" / f"checkpoint-{STEP}" / "optimizer_0" / "__1_0.distcp").exists()
    assert not (folder / "fsdp2-one" / f"checkpoint-{STEP}" / "optimizer_0" / "__1_0.distcp").exists()
