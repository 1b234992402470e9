"""A run on several processes: what they save together, and what they agree on."""

from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer
from trl import SFTTrainer


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


class AdapterTrainer(SFTTrainer):
    """TRL's SFTTrainer for an adapter: factors stay in float32, and sharded ones are saved whole."""

    def __init__(self, model: Any, **options: Any) -> None:
        """As the SFTTrainer's, which rounds the adapter to bfloat16 where the base model is quantised.

        Updates of the factors are smaller than bfloat16 can tell apart, so they keep the dtype that PEFT gave them.
        """
        factors = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        self.recent_losses: list[torch.Tensor] = []  # of forward passes since somebody looked
        super().__init__(model=model, **options)
        for name, p in model.named_parameters():
            if name in factors:
                p.data = factors[name]

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """As the Trainer's; the loss is also kept for `stopping.StopAtNonFinite`."""
        loss = super().training_step(*args, **options)
        self.recent_losses.append(loss.detach())
        return loss

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write nothing: `report.write_card` does, and the SFTTrainer would write over a card of the user's."""

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
