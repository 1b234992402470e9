"""Greedy generations of llama.cpp with a LoRA adapter. Runs in an environment of its own: `make test-llamacpp`.

Arguments: the base model as GGUF of whatever quantisation, a folder for its float32 form, the adapter or "none",
prompts as JSON lists of token ids, number of new tokens. Prints the new tokens as JSON.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp

GGML_TYPE_F32 = 0


def in_float32(model: str, folder: str) -> str:
    """With quantised weights llama.cpp also quantises activations, so that even the bare base model differs."""
    path = Path(folder) / "float32.gguf"
    if not path.exists():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = 0, True
        status = llama_cpp.llama_model_quantize(model.encode(), str(path).encode(), ctypes.byref(options))
        assert status == 0, f"llama_model_quantize: {status}"
    return str(path)


def main(model: str, folder: str, adapter: str, prompts: str, new_tokens: str) -> None:
    llm = llama_cpp.Llama(
        in_float32(model, folder),
        lora_path=None if adapter == "none" else adapter,
        n_ctx=512,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    outputs = []
    for prompt in json.loads(prompts):
        llm.reset()
        tokens = llm.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        outputs.append([next(tokens) for _ in range(int(new_tokens))])
    print(json.dumps(outputs))


if __name__ == "__main__":
    main(*sys.argv[1:])
