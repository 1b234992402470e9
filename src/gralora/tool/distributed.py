"""A run on several processes: what they save together, and what they agree on."""

from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
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


class AdapterTrainer(Trainer):
    """The Trainer, which under FSDP2 saves the adapter whole and without gathering the base model for it.

    The Trainer itself saves no adapter with SHARDED_STATE_DICT, neither in checkpoints nor at the end, and says
    nothing; with FULL_STATE_DICT it gathers all of the base model in one process.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        adapter: dict[str, Any] = get_model_state_dict(
            self.model, options=options
        )  # all processes, filled in the first
        if self.args.should_save:
            self._save(output_dir, state_dict=adapter)
