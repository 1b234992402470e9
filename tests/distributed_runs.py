"""Runs of `gralora finetune` in one of several processes; what each process saw goes into files for the tests.

    accelerate launch --config_file CONFIG --num_processes N tests/distributed_runs.py PLAN.json

The plan has a `folder`, and as `runs` the arguments of each run by its name. Written: `folder/NAME.RANK.pt`.
"""

import copy
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmarks.multi_gpu import take_cpu_for_gpus
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments

FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"
DEEPSPEED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
if FSDP or DEEPSPEED:
    take_cpu_for_gpus()  # before anything asks accelerate for the device

from helpers import Case, adapted, adapter_parameters, case_config, one_layer, random_input  # noqa: E402
from peft import get_peft_model_state_dict  # noqa: E402

from gralora import fast_path  # noqa: E402
from gralora.tool import finetune as module  # noqa: E402
from gralora.tool.arguments import FinetuneArguments  # noqa: E402

fused_calls: list[bool] = []  # of each fused operation, whether it was given a DTensor
gralora_linear = fast_path.gralora_linear


def watched(x: torch.Tensor, weight: torch.Tensor, bias: Any, factors: Any, *dropout: Any) -> torch.Tensor:
    fused_calls.append(any(isinstance(operand, DTensor) for operand in (x, weight, bias, *factors)))
    return gralora_linear(x, weight, bias, factors, *dropout)


class Recorder(module.AdapterTrainer):
    """Keeps the trainer of the last run, to look at what this process holds; see `interrupted`."""

    interrupted = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Recorder.last = self
        if Recorder.interrupted:
            self.add_callback(Interrupt())


class Arguments(FinetuneArguments):
    """With DeepSpeed, as if there were a GPU: the Trainer leaves it out where it is told to use the CPU."""

    def training_arguments(self) -> TrainingArguments:
        if not DEEPSPEED:
            return super().training_arguments()
        with mock.patch("torch.accelerator.is_available", return_value=True):
            training = super().training_arguments()
        training.dataloader_pin_memory = False
        return training


class Interrupt(TrainerCallback):
    """Ctrl-C in the second process, in the second step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1 and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)


def local(t: torch.Tensor) -> torch.Tensor:
    """This process's share of a tensor: FSDP2's, ZeRO-3's, or all of it."""
    return t.to_local() if isinstance(t, DTensor) else getattr(t, "ds_tensor", t)


def local_bytes(tensors: Any) -> int:
    return sum(local(t).numel() * t.element_size() for t in tensors)


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """What this process saw of a run: losses, its share of the tensors, and the whole adapter at the end."""
    fused_calls.clear()
    Recorder.interrupted = arguments.pop("interrupted", False)
    args = Arguments(**arguments)
    stopped = None
    try:
        module.finetune(args)
    except KeyboardInterrupt as stop:
        stopped = str(stop)
    trainer = Recorder.last
    model, optimizer = trainer.accelerator.unwrap_model(trainer.model), trainer.optimizer
    states = [s for state in optimizer.state.values() for name, s in state.items() if name != "step"]
    return {
        "stopped": stopped,
        "log": trainer.state.log_history,
        # under ZeRO-3 the tensors are empty outside of a step
        "adapter": None if DEEPSPEED else {name: whole(t) for name, t in get_peft_model_state_dict(model).items()},
        "parameter_bytes": local_bytes(model.parameters()),
        "optimizer_bytes": local_bytes(states),
        "dtypes": {p.requires_grad: p.dtype for p in model.parameters()},
        "units": [name for name, module in model.named_modules() if isinstance(module, FSDPModule)],
        "fused": len(fused_calls),
        "fused_got_dtensor": any(fused_calls),
    }


def shard_by_hand(case: Case) -> None:
    """fully_shard on the layer, and on each factor alone: output and gradients of the whole layer.

    Sharding a module changes its class, so a factor that is sharded alone must not be read past its hooks.
    """
    for units in (["base_model.model.layer"], ["lora_A.default", "lora_B.default"]):
        model = adapted(one_layer(case), case_config(case))
        exact = copy.deepcopy(model)
        for unit in units:
            fully_shard(model.get_submodule(unit if len(units) == 1 else f"base_model.model.layer.{unit}"))
        fused_calls.clear()
        x = random_input(6, case.in_features)
        y, y_exact = model(x), exact(x)
        assert fused_calls == ([False, False] if len(units) == 1 else [False]), "and one call is of the exact layer"
        torch.testing.assert_close(y, y_exact)
        dy = random_input(*y.shape, seed=4)
        y.backward(dy)
        y_exact.backward(dy)
        gradients = {name: p.grad for name, p in adapter_parameters(exact).items()}
        for name, p in adapter_parameters(model).items():
            assert isinstance(p, DTensor) and gradients[name].any()
            torch.testing.assert_close(p.grad.full_tensor(), gradients[name])


def main() -> None:
    fast_path.gralora_linear = watched
    module.AdapterTrainer = Recorder
    plan = json.loads(Path(sys.argv[1]).read_text())
    for name, arguments in plan["runs"].items():
        seen = run(arguments)
        torch.save(seen, Path(plan["folder"], f"{name}.{os.environ['RANK']}.pt"))
    if FSDP:
        for case in (Case(1, 5, 2, 20, 12), Case(4, 10, 2, 16, 28)):
            shard_by_hand(case)
    Recorder.last = None  # what communicates, before what it communicates through
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # not by way of Python's end, where a thread of gloo's that still holds a tensor aborts the process
    # (https://github.com/pytorch/pytorch/pull/179291); all that was asked for is written by now
    os._exit(0)


if __name__ == "__main__":
    main()
