"""PEFT's plain LoRA with and without `gralora.accelerate`: the same losses and files, in less time on a GPU.

python examples/faster_lora.py
python examples/faster_lora.py --short
"""

import hashlib
import time
from pathlib import Path

import torch
from common import batches, load, parse, parser, sums, train
from peft import LoraConfig, get_peft_model

import gralora


def main(argv: list[str] | None = None) -> float:
    """Returns the greatest difference between two losses of the same step."""
    args = parse(parser("PEFT's LoRA, accelerated.", steps=20), argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    losses, adapters = {}, {}
    for name in ("PEFT", "accelerated"):
        torch.manual_seed(0)
        base, tokenizer = load(args)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base.to(device), config)
        model.save_pretrained(Path(args.out) / name)  # untrained, so that no rounding tells the files apart
        if name == "accelerated":
            gralora.accelerate(model)
            model.save_pretrained(Path(args.out) / name)
        adapters[name] = hashlib.sha256((Path(args.out) / name / "adapter_model.safetensors").read_bytes()).hexdigest()

        data = [batch.to(device) for batch in batches(tokenizer, sums(tokenizer, 32), args.steps + 1)]
        first = train(model, data[:1])  # compiles kernels, where there are any
        started = time.monotonic()
        losses[name] = first + train(model, data[1:])
        print(f"{name}: {(time.monotonic() - started) / args.steps * 1e3:.0f} ms a step; {gralora.describe(model)}")

    assert len(set(adapters.values())) == 1, "the saved adapters differ"
    worst = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    print(f"loss {losses['PEFT'][0]:.3f} -> {losses['PEFT'][-1]:.3f}, at most {worst:.1e} apart; the same files")
    return worst


if __name__ == "__main__":
    main()
