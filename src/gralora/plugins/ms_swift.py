"""ms-swift plugin: `--tuner_type gralora`, and `--tuner_type accelerated_lora`, PEFT's plain LoRA at its speed.

```
swift sft --external_plugins "$(python -c 'import gralora.plugins as p; print(p.__path__[0])')/ms_swift.py" \
    --tuner_type gralora --lora_rank 64 --lora_alpha 128 --target_modules all-linear \
    --model_kwargs '{"gralora_k": 4, "gralora_hybrid_r": 0}' ...
```

ms-swift puts `--model_kwargs` into environment variables, from which the plugin reads its own settings. The flags for
LoRA, from `--lora_rank` to `--init_weights`, mean the same as for `--tuner_type lora`.
"""

import os
from typing import Any

import torch
from peft import get_peft_model
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from gralora import LoraConfig, accelerate
from gralora.config import SETTINGS, parse

REFUSED = ("lorap_lr_ratio",)  # arguments of ms-swift that mean another optimizer
TASK_TYPES = {"EMBEDDING": None, "RERANKER": "SEQ_CLS", "GENERATIVE_RERANKER": "CAUSAL_LM", "DECISION": "CAUSAL_LM"}


class GraloraTuner(PeftTuner):
    """A tuner that adds a GraLoRA adapter, and saves and loads it as PEFT does."""

    adapter = {"use_gralora": True}

    @classmethod
    def prepare_model(cls, args: Any, model: nn.Module) -> nn.Module:
        for name in REFUSED:
            if getattr(args, name, None):
                raise ValueError(
                    f"--{name} {getattr(args, name)} cannot be combined with --tuner_type {args.tuner_type}."
                )
        # --model_kwargs '{"gralora_hybrid_r": 2}' is the variable GRALORA_HYBRID_R
        variables = {name: f"GRALORA_{name.removeprefix('gralora_').upper()}" for name in SETTINGS}
        settings = {n: parse(n, os.environ[variable]) for n, variable in variables.items() if variable in os.environ}
        task_type = args.task_type.upper()
        if args.target_parameters is not None:
            settings["target_parameters"] = args.target_parameters
        config = LoraConfig(
            task_type=TASK_TYPES.get(task_type, task_type),  # the same mapping as in ms-swift's own prepare_adapter
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=get_target_modules(args, model),
            modules_to_save=get_modules_to_save(args, model, task_type),
            bias=args.lora_bias,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            init_lora_weights=args.init_weights,
            **settings | cls.adapter,
        )
        model = get_peft_model(model, config)
        if args.lora_dtype:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_" in name:
                    parameter.data = parameter.data.to(getattr(torch, args.lora_dtype))
        return model


class AcceleratedTuner(GraloraTuner):
    """A tuner that adds PEFT's plain LoRA, and computes it by gralora's operations.

    ms-swift's own `--tuner_type lora` gives each factor a forward of its own, which these would leave out.
    """

    adapter = {"use_gralora": False, "accelerate": True}

    @staticmethod
    def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> nn.Module:
        return accelerate(PeftTuner.from_pretrained(model, model_id, **kwargs))


tuners_map |= {"gralora": GraloraTuner, "accelerated_lora": AcceleratedTuner}
