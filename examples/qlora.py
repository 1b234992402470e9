"""A GraLoRA adapter on a 4-bit base (nf4, double quantisation), merged into the base in floating point afterwards.

python examples/qlora.py            # needs pip install 'gralora[quantized]'
python examples/qlora.py --short
"""

import shutil
from pathlib import Path

import torch
from common import batches, load, parse, parser, sums, train
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gralora import LoraConfig, merge_adapter


def main(argv: list[str] | None = None) -> list[float]:
    """Returns the losses of training, and last that of the merged model."""
    args = parse(parser("QLoRA with GraLoRA.", steps=30), argv)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model, tokenizer = load(args, quantization_config=quantization)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        use_gralora=True,
        gralora_scaling="matched",
        r=32,
        lora_alpha=64,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    data = batches(tokenizer, sums(tokenizer, 64), args.steps)
    losses = train(model, data)
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    model.save_pretrained(args.out)

    # not merge_and_unload: the sum would be quantised again, and small updates lost (docs/quantized.md)
    merged = Path(args.out, "merged")
    shutil.rmtree(merged, ignore_errors=True)
    merge_adapter(args.out, merged, base=args.model)
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(merged)(**data[-1]).loss.item()
    print(f"merged into the base in floating point, on the last batch: {loss:.3f}")
    return [*losses, loss]


if __name__ == "__main__":
    main()
