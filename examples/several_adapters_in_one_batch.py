"""Two GraLoRA adapters, a plain LoRA and the bare base model in one batch: each row names its adapter.

python examples/several_adapters_in_one_batch.py
python examples/several_adapters_in_one_batch.py --short
"""

import torch
from common import batches, load, parse, parser, sums, train
from peft import get_peft_model

from gralora import LoraConfig

COMMON = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ADAPTERS = {  # name -> config, and what it learns to add
    "plus_one": (LoraConfig(use_gralora=True, gralora_k=2, **COMMON), 1),
    "plus_two": (LoraConfig(use_gralora=True, gralora_k=4, hybrid_r=4, **COMMON), 2),
    "plus_three": (LoraConfig(**COMMON), 3),  # plain
}
NAMES = [*ADAPTERS, "__base__"]


@torch.no_grad()
def main(argv: list[str] | None = None) -> float:
    """Returns the greatest difference between a row in the mixed batch and the same row with its adapter alone."""
    args = parse(parser("An adapter per row.", steps=20), argv)
    base, tokenizer = load(args)
    model = None
    for name, (config, difference) in ADAPTERS.items():
        if model is None:
            model = get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        with torch.enable_grad():
            losses = train(model, batches(tokenizer, sums(tokenizer, 32, difference), args.steps))
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model.eval()
    prompt = tokenizer(["Next after 20:"] * len(NAMES), return_tensors="pt")
    mixed = model(**prompt, adapter_names=NAMES).logits
    worst = 0.0
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(**prompt).logits[row]
        else:
            model.set_adapter(name)
            alone = model(**prompt).logits[row]
        worst = max(worst, (mixed[row] - alone).abs().max().item())
    print(f"mixed batch against one adapter at a time: {worst:.1e}")

    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    for name, answer in zip(NAMES, model.generate(**prompt, adapter_names=NAMES, **options), strict=True):
        print(f"{name:12} {tokenizer.decode(answer, skip_special_tokens=True)!r}")
    return worst


if __name__ == "__main__":
    main()
