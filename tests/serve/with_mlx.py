"""Greedy generations, and logits, of mlx-lm with a LoRA adapter, on the CPU.

Runs in an environment of its own: `make test-mlx`.

Arguments: the base model's folder, the adapter's folder or "none", prompts as JSON lists of token ids, number of new
tokens, a file for the results as JSON: "tokens", the new tokens of each prompt, and "logits" of the first prompt.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model


def main(base: str, adapter: str, prompts: str, new_tokens: str, output: str) -> None:
    model, _ = load_model(Path(base))
    if adapter != "none":
        load_adapters(model, adapter)
    model.set_dtype(mx.float32)  # exact; MLX computes with the weights as they are stored
    model.eval()
    tokens = [
        [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=int(new_tokens))]
        for prompt in json.loads(prompts)
    ]
    logits = model(mx.array([json.loads(prompts)[0]]))[0]
    Path(output).write_text(json.dumps({"tokens": tokens, "logits": logits.tolist()}))


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    main(*sys.argv[1:])
