"""GraLoRA (Granular Low-Rank Adaptation, arXiv 2505.20355) as a LoRA variant for Hugging Face PEFT."""

import importlib
from typing import Any

from .versions import check_versions

check_versions()

from .config import LoraConfig  # noqa: E402
from .inject import install  # noqa: E402

_LAZY = {  # name -> module, imported when the name is first used
    "accelerate": "acceleration",
    "convert_adapter": "checkpoints.convert",
    "create_lorafa_optimizer": "optimizers",
    "create_muon_optimizer": "optimizers",
    "create_riemannian_optimizer": "optimizers",
    "dequantize_fp8": "fp8",
    "describe": "report",
    "hotswap_adapter": "hotswap",
    "inspect_adapter": "checkpoints.inspection",
    "load_adapter": "checkpoints.load",
    "merge_adapter": "checkpoints.merge",
    "prepare_model_for_compiled_hotswap": "hotswap",
    "quantize_fp8": "fp8",
    "replace_lora_weights_loftq": "checkpoints.loftq",
    "to_lora": "checkpoints.export",
}

__all__ = [
    "LoraConfig",
    "accelerate",
    "convert_adapter",
    "create_lorafa_optimizer",
    "create_muon_optimizer",
    "create_riemannian_optimizer",
    "dequantize_fp8",
    "describe",
    "hotswap_adapter",
    "inspect_adapter",
    "load_adapter",
    "merge_adapter",
    "prepare_model_for_compiled_hotswap",
    "quantize_fp8",
    "replace_lora_weights_loftq",
    "to_lora",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is public: no module that happens to be imported."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


install()
