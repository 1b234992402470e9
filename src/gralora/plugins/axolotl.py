"""Axolotl plugin: `adapter: gralora` in Axolotl's YAML.

```yaml
plugins:
  - gralora.plugins.axolotl.GraloraPlugin
adapter: gralora
lora_r: 64
lora_alpha: 128
lora_target_linear: true
gralora_k: 4 # or auto, the default
hybrid_r: 0
```

Axolotl's `lora_` and `peft_` settings mean the same as for `adapter: lora`. Axolotl saves the adapter; merge it with
`gralora merge`, since Axolotl's own merge command reads plain LoRA only.

With `adapter: lora` or `qlora` the plugin accelerates PEFT's layers, unless Axolotl's own LoRA kernels are on, which
they are if none of them is set: `lora_mlp_kernel: false` turns them off.
"""

import dataclasses
from typing import Any, get_type_hints

import peft
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.adapter import load_lora
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import Field, create_model
from torch import nn
from transformers import PreTrainedModel

from gralora import LoraConfig, accelerate
from gralora.acceleration import is_default
from gralora.config import SETTINGS
from gralora.fields import is_set

NAME = "gralora"
# Axolotl's fused kernels read lora_A and lora_B as plain matrices; it quantises the base for `lora` and `qlora` only
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
REFUSED = (*KERNELS, "load_in_4bit", "load_in_8bit", "gptq")


SETTING_FIELDS: dict[str, Any] = {
    name: (get_type_hints(LoraConfig)[name], Field(default=f.default, description=f.metadata["help"]))
    for name, f in SETTINGS.items()
    if name != "use_gralora"  # `adapter: gralora` implies it
}
GraloraArgs = create_model("GraloraArgs", __module__=__name__, **SETTING_FIELDS)  # added to Axolotl's YAML


class GraloraPlugin(BasePlugin):
    """Axolotl's plugin, which builds or loads (`lora_model_dir`) a GraLoRA adapter in place of a plain LoRA."""

    def get_input_args(self) -> str:
        return f"{__name__}.{GraloraArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=NAME, lora_like=True)]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """Return the model with the adapter (None with `config_only`) and the config; None for other adapters.

        Raises:
            ValueError: if a setting of Axolotl does not work with a GraLoRA adapter.
        """
        if cfg.adapter != NAME:
            return None
        for name in REFUSED:
            if cfg[name]:
                raise ValueError(f"{name}: {cfg[name]} cannot be combined with adapter: {NAME}; leave it out.")
        _, plain = load_lora(model, cfg, config_only=True)  # Axolotl's reading of its settings
        settings = {name: cfg[name] for name in GraloraArgs.model_fields if cfg[name] is not None}
        config = granular(plain, **settings)
        if config_only:
            return None, config
        options = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options)
            config = model.peft_config["default"]
        else:
            model = get_peft_model(model, config, **options)
        model.print_trainable_parameters()
        return model, config

    def post_lora_load(self, cfg: Any, model: nn.Module) -> None:
        """Compute plain LoRA layers by gralora's operations."""
        if cfg.adapter in ("lora", "qlora") and not any(cfg[name] for name in KERNELS) and is_default():
            accelerate(model)


def granular(plain: peft.LoraConfig, **settings: Any) -> LoraConfig:
    """Return a GraLoRA config with the fields that are set in a plain LoRA's.

    Axolotl passes None and empty lists for fields that are not set. Here these keep PEFT's defaults, which other
    programs expect in adapter_config.json.
    """
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(peft.LoraConfig) if f.init}
    del fields["peft_type"]  # PEFT passes it only when it reads a config from a file
    given = {name: value for name, value in fields.items() if is_set(LoraConfig, name, value)}
    given["target_modules"] = plain.target_modules  # an empty list means only target_parameters
    return LoraConfig(**given, use_gralora=True, **settings)
