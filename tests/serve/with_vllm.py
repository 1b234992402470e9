"""Greedy generations of vLLM with a LoRA adapter. Runs in an environment of its own: `make test-vllm`.

Arguments: the base model's folder, the adapter's folder or "none", the value of max_lora_rank, prompts as JSON lists
of token ids, number of new tokens, a file for the new tokens as JSON.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(model: str, adapter: str, max_lora_rank: str, prompts: str, new_tokens: str, output: str) -> None:
    llm = LLM(
        model=model,
        enable_lora=True,
        max_lora_rank=int(max_lora_rank),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
    )
    results = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in json.loads(prompts)],
        SamplingParams(temperature=0, max_tokens=int(new_tokens), ignore_eos=True),
        lora_request=None if adapter == "none" else LoRARequest("adapter", 1, adapter),
    )
    Path(output).write_text(json.dumps([list(result.outputs[0].token_ids) for result in results]))


if __name__ == "__main__":
    main(*sys.argv[1:])
