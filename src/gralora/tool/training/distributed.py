"""A run on several processes: what they save together, and what they agree on."""

from typing import Any

import torch
from torch import distributed, nn
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
    """The Trainer, with held-out losses and saved adapters that do not depend on the number of processes."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As the Trainer's; a held-out loss is the mean over the tokens of this process's batch.

        The Trainer's is that over the batches that all processes have at that time, so their number would change it.
        """
        tokens = num_items_in_batch if self.model.training else None
        return super().compute_loss(model, inputs, return_outputs, tokens)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; under FSDP2 the adapter whole, and without gathering the base model for it.

        With SHARDED_STATE_DICT the Trainer saves no adapter, neither in checkpoints nor at the end, and does not say
        so; with FULL_STATE_DICT it gathers all of the base model in one process.
        """
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        adapter = get_model_state_dict(self.model, options=options)  # asked of all processes, given to the first
        if self.args.should_save:
            self._save(output_dir, state_dict=adapter)
