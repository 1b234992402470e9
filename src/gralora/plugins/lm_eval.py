"""lm-evaluation-harness's own command, for GraLoRA adapters: `python -m gralora.plugins.lm_eval`, for `lm_eval`.

```
python -m gralora.plugins.lm_eval --model hf --model_args pretrained=MODEL,peft=ADAPTER --tasks gsm8k
accelerate launch -m gralora.plugins.lm_eval --model hf --model_args pretrained=MODEL,peft=ADAPTER --tasks gsm8k
```

The harness loads adapters with PEFT, which knows those of GraLoRA once `gralora` is imported. Its flags are unchanged.
In a program of your own, `import gralora` before `lm_eval.simple_evaluate(model="hf", ...)` does the same.
"""

import gralora  # noqa: F401

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
