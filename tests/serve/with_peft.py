"""Logits of stock PEFT with an exported adapter, in float64, in a process that never imports gralora.

Arguments: the base model's folder, the adapter's folder, token ids as a JSON list of lists, a file for the logits.
Prints the version of PEFT.
"""

import json
import sys

import peft
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(model: str, adapter: str, tokens: str, output: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    logits = PeftModel.from_pretrained(base, adapter).eval()(torch.tensor(json.loads(tokens))).logits
    assert "gralora" not in sys.modules
    torch.save(logits, output)
    print(peft.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
