"""Export an adapter as the plain LoRA that it equals, and run it in a process that has stock PEFT and no gralora.

python examples/export_and_serve.py
python examples/export_and_serve.py --short

For vLLM, SGLang, llama.cpp, Ollama and MLX, the same with another target; docs/serving.md.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from common import batches, load, parse, parser, sums, train
from peft import get_peft_model

from gralora import LoraConfig, to_lora

SERVER = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
tokens = json.loads(sys.argv[2])
with torch.no_grad():
    logits = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])(torch.tensor([tokens])).logits[0, -1]
assert "gralora" not in sys.modules
print("logits", json.dumps(logits.tolist()))
"""


def main(argv: list[str] | None = None) -> float:
    """Returns the greatest difference of the logits, relative to the greatest logit."""
    args = parse(parser("Export, and stock PEFT.", steps=20), argv)
    model, tokenizer = load(args)
    config = LoraConfig(
        use_gralora=True,
        gralora_scaling="matched",
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    losses = train(model, batches(tokenizer, sums(tokenizer, 64), args.steps))
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    adapter, plain = Path(args.out, "adapter"), Path(args.out, "plain")
    model.save_pretrained(adapter)

    shutil.rmtree(plain, ignore_errors=True)
    report = to_lora(adapter, plain, "peft")
    print(f"plain LoRA of rank {report['rank']}, dW off by {report['parity']['relative_difference']:.1e}")

    tokens = tokenizer("Next after 20:")["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, -1]
    command = [sys.executable, "-c", SERVER, str(plain), json.dumps(tokens)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    served = torch.tensor(json.loads(printed.split("logits ")[-1]))
    difference = ((served - expected).abs().max() / expected.abs().max()).item()
    print(f"logits of stock PEFT in another process: off by {difference:.1e} of the greatest")
    assert difference < 1e-4
    return difference


if __name__ == "__main__":
    main()
