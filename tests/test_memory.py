"""Peak memory of a QLoRA training step, beside PEFT's LoRA: every storage that torch allocates is counted."""

import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import gralora

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PeakMemory(TorchDispatchMode):
    """Inside `with`: `peak`, the most bytes of new storages that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in given and key not in self.alive:
                    self.alive.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, key, size)
        return result

    def freed(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size


def test_peak_memory_counts_storages() -> None:
    """Two tensors at once and a view count as two; what was freed does not."""
    with PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1
        a.view(10, 100)
        del a
        c = b + 1  # noqa: F841
    assert memory.peak == 2 * 4000


def qlora_peak(folder: Path, config: peft.LoraConfig) -> int:
    """Bytes of one training step in bfloat16 autocast on an nf4 base, after one that made the optimizer's state."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.bfloat16)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    tokens = torch.randint(0, 32, (1, 512))
    for _ in range(2):
        with PeakMemory() as memory:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return memory.peak


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 1.0), (0.05, 0.8)])
def test_qlora_step_needs_no_more_than_plain_lora(dropout: float, share: float, tmp_path: Path) -> None:
    """r=64, nf4: no more than PEFT's QLoRA at the same rank, and far less with dropout, whose mask is not kept."""
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=512, intermediate_size=1408, num_hidden_layers=2).bfloat16().save_pretrained(tmp_path)
    common = {"r": 64, "lora_alpha": 64, "lora_dropout": dropout, "target_modules": LINEARS}
    ours = qlora_peak(tmp_path, gralora.LoraConfig(use_gralora=True, gralora_k=4, **common))
    assert ours <= share * qlora_peak(tmp_path, peft.LoraConfig(**common))
