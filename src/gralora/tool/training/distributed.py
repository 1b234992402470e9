"""A run on several processes: whether each holds a share of the model, and what they agree on."""

import torch
from torch import distributed
from transformers import Trainer


def holds_share(trainer: Trainer) -> bool:
    """Whether a process may hold only a share of the model, so that all must run it together (FSDP, ZeRO)."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any process; the same answer in all, which must all ask."""
    if not distributed.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)
