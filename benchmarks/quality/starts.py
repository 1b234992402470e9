"""How the adapters of a run start: as PEFT draws them, or by one of its initialisations, with what that takes."""

from typing import TYPE_CHECKING, Any

import peft
import torch
from peft import EvaConfig, LoraGAConfig, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor

if TYPE_CHECKING:
    from .train import Cell

ROWS, AT_ONCE = 64, 8  # of the training data that gradients, covariances and components are taken of


def adapted(model: Any, cell: "Cell", rows: Tensor) -> Any:
    """Adapt a causal LM as its cell says.

    Args:
        model: in float32, on the device.
        cell: with an `init` of PEFT's, or an empty one.
        rows: training rows, `[N, length + 1]`; the first ROWS are looked at if the initialisation takes data.

    Returns:
        The same model, with LoRA layers in it.
    """
    config = cell.config()
    batches = rows[:ROWS].to(next(model.parameters()).device).split(AT_ONCE)
    if cell.init:
        config.init_lora_weights = cell.init
    if cell.init == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(model, config, lambda: [model(b, labels=b).loss.backward() for b in batches] and None)
    elif cell.init == "corda":
        config.corda_config = CordaConfig(prune_temporary_fields=False)
        preprocess_corda(
            model, config, lambda: [model(row[None]) for row in rows[:ROWS].to(batches[0].device)] and None
        )
    elif cell.init == "eva":
        config.eva_config = EvaConfig(rho=1.0)
    torch.manual_seed(0)
    lm = peft.get_peft_model(model, config)
    if cell.init == "eva":
        data = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in batches]
        initialize_lora_eva_weights(lm, data, show_progress_bar=False)
    return lm.base_model.model
