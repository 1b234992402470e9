"""TRL's SFTTrainer for an adapter: factors stay in float32, sharded ones are saved whole, and a CPU computes less."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from trl import SFTTrainer

from ..data.tokens import IGNORED, has_answer

MOST_LOGITS = 1 << 27  # that are held at once on a CPU: 0.5 GiB in float32


class AdapterTrainer(SFTTrainer):
    """TRL's SFTTrainer for an adapter.

    The SFTTrainer multiplies hidden states with the weight of the output layer, in pieces, so that the logits of a
    batch never exist together. `compute_loss` asks the model for its logits instead, only those of learnt tokens,

    - where the output layer is adapted: the SFTTrainer would not see the adapter, and refuses it;
    - on a CPU, for batches of few tokens: there the SFTTrainer also computes the logits of tokens that are not learnt,
      computes all again in the backward pass, and takes 15 to 25% more time and 0.3 GiB more memory (SmolLM2-135M,
      batches of 4 x 96 tokens).

    Attributes:
        recent_losses: of forward passes since somebody looked.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        """As the SFTTrainer's, which rounds the adapter to bfloat16 where the base model is quantised.

        Updates of the factors are smaller than bfloat16 can tell apart, so they keep the dtype that PEFT gave them.
        """
        factors = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        self.recent_losses: list[Tensor] = []
        self.adapts_output = isinstance(model.get_output_embeddings(), BaseTunerLayer)
        if self.adapts_output:
            model.get_output_embeddings = lambda: None  # the SFTTrainer refuses what it would not see
        try:
            super().__init__(model=model, **options)
        finally:
            if self.adapts_output:
                del model.get_output_embeddings
        if self.args.packing:  # strategies that divide texts make rows of a long prompt alone, whose loss would be 0
            self.train_dataset = self.train_dataset.filter(has_answer)
        for name, p in model.named_parameters():
            if name in factors:
                p.data = factors[name].to(p.device)  # the Trainer has moved the model
        takes = inspect.signature(model.get_base_model().forward).parameters
        plain = self.args.loss_type != "dft" and self.label_smoother is None and not self.aux_loss_enabled
        self.asks_for_logits = plain and "logits_to_keep" in takes
        if self.adapts_output and not self.asks_for_logits:
            raise ValueError(
                f"the output layer of {type(model.get_base_model()).__name__} is adapted, and then the loss is known "
                "for models that take logits_to_keep, and without loss_type='dft', label_smoothing_factor and "
                "router_aux_loss_coef; leave these or the output layer (lm_head) out."
            )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean cross-entropy of the learnt tokens, or their sum over `num_items_in_batch`; see the class."""
        labels: Tensor = inputs["labels"][:, 1:]  # [B, T - 1]
        learnt = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)  # positions that a row of the batch learns
        size = len(labels) * len(learnt) * self.model.config.get_text_config().vocab_size
        on_cpu = labels.device.type == "cpu" and size <= MOST_LOGITS
        if return_outputs or not (self.adapts_output or (on_cpu and self.asks_for_logits)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        others = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**others, use_cache=False, logits_to_keep=learnt).logits  # [B, learnt, V]
        kept = labels[:, learnt].to(logits.device)
        loss = F.cross_entropy(logits.float().flatten(0, 1), kept.flatten(), ignore_index=IGNORED, reduction="sum")
        count = (kept != IGNORED).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = loss / count.to(loss.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of all, and gradients are averaged
        return loss

    def training_step(self, *args: Any, **options: Any) -> Tensor:
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
