"""What vLLM's own loader makes of a LoRA adapter of experts: the factors that it hands to its kernels.

vLLM applies them with kernels for GPUs, so its functions that read and pack them run here. Arguments: the adapter's
folder, number of experts, their names in vLLM as JSON (gate, down, up; or [] if it reads PEFT's layout), a file for
the results of torch: module of experts -> the lists of A and B that vLLM packs.
"""

import json
import sys
from types import SimpleNamespace

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper


def main(adapter: str, number: str, names: str, output: str) -> None:
    experts, projections = int(number), json.loads(names)
    expected = {f"experts.{e}.{name}" for e in range(experts) for name in projections} | {"experts", "q_proj"}
    helper = PEFTHelper.from_local_dir(adapter, None)
    assert helper.vllm_lora_scaling_factor == 1 and not helper._validate_features()
    model = LoRAModel.from_local_checkpoint(adapter, expected, helper, lora_model_id=1, device="cpu")
    modules = {name.partition(".experts")[0] + ".experts" for name in model.loras if ".experts" in name}
    packed = {}
    for module in sorted(modules):
        if projections:
            pairs = [model.get_lora(f"{module}.{e}.{name}") for e in range(experts) for name in projections]
            lora = PackedLoRALayerWeights.pack_moe(pairs, module)
        else:
            manager = SimpleNamespace(
                _is_3d_moe_model=True, _get_lora_layer_weights=lambda model, name: model.get_lora(name)
            )
            buffer = torch.empty(1, experts, 1, 1)
            layer = SimpleNamespace(w13_lora_a_stacked=[buffer], global_num_experts=experts, ep_rank=0)
            LoRAModelManager._stack_moe_lora_weights(manager, model, layer, module)
            lora = model.get_lora(module)
        packed[module] = list(lora.lora_a), list(lora.lora_b)
    torch.save(packed, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
