"""LoRA, GraLoRA and hybrids with the same number of trainable parameters, batches and seed, side by side.

python examples/hybrid_sweep.py
python examples/hybrid_sweep.py --short

A comparison at one learning rate says little; docs/quality.md has each method at its own best.
"""

import torch
from common import batches, load, parse, parser, sums, train
from peft import get_peft_model

from gralora import LoraConfig

R = 32
SETTINGS = [
    {"use_gralora": False},
    {"use_gralora": True, "gralora_k": 2, "hybrid_r": 0},
    {"use_gralora": True, "gralora_k": 2, "hybrid_r": R // 4},
    {"use_gralora": True, "gralora_k": 2, "hybrid_r": R // 2},
    {"use_gralora": True, "gralora_k": 4, "hybrid_r": 0},
]


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Returns the trainable parameters by setting: all the same."""
    args = parse(parser("A sweep over k and hybrid_r.", steps=20), argv)
    parameters = {}
    for setting in SETTINGS:
        torch.manual_seed(0)
        model, tokenizer = load(args)
        config = LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear", task_type="CAUSAL_LM", **setting)
        model = get_peft_model(model, config)
        losses = train(model, batches(tokenizer, sums(tokenizer, 64), args.steps))
        last = losses[-5:]
        name = " ".join(f"{key}={value}" for key, value in setting.items())
        parameters[name] = model.get_nb_trainable_parameters()[0]
        print(f"{name:48} {parameters[name]:>10,} parameters  loss of the last steps {sum(last) / len(last):.3f}")
    return parameters


if __name__ == "__main__":
    main()
