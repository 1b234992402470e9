"""The base model and its tokenizer: from a folder, a hub, or the package that brings the embedded one."""

import importlib.util
import logging
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .embedded import embedded_model

EMBEDDED = "embedded"
# as in the QLoRA paper (arXiv 2305.14314), and as LLM.int8 (arXiv 2208.07339)
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}


def load_pretrained(auto: Any, base_model: str, **options: Any) -> Any:
    """What an Auto class of transformers makes of the base model."""
    folder = str(embedded_model()) if base_model == EMBEDDED else base_model
    try:
        # False, since the default asks people whether to run a model's code
        return auto.from_pretrained(folder, trust_remote_code=False, **options)
    except OSError as error:
        raise OSError(
            f"base_model={base_model!r} could not be loaded; give a local folder, a hub id that can be reached, or "
            f"{EMBEDDED!r}. {error}"
        ) from error


def load_model(base_model: str, dtype: torch.dtype, quantization: str = "none", **options: Any) -> PreTrainedModel:
    """The base model, in `dtype`, or quantised by bitsandbytes and computing in `dtype`."""
    if quantization != "none":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(f"quantization={quantization!r} needs bitsandbytes: pip install 'gralora[quantized]'")
        # of 8bit, it would say for every layer and pass that inputs are cast
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        config = BitsAndBytesConfig(**QUANTIZATIONS[quantization], bnb_4bit_compute_dtype=dtype)
        options["quantization_config"] = config
    return load_pretrained(AutoModelForCausalLM, base_model, dtype=dtype, **options)


def load_tokenizer(base_model: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token."""
    tokenizer = load_pretrained(AutoTokenizer, base_model)
    if tokenizer.eos_token is None:
        raise ValueError(f"base_model={base_model!r} has a tokenizer without an end token (eos_token); set one.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_length(max_seq_length: int, base_model: str, model: PreTrainedModel) -> None:
    """Raise ValueError if `max_seq_length` is more than the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and max_seq_length > positions:
        raise ValueError(
            f"max_seq_length={max_seq_length} is more than the {positions} tokens that "
            f"base_model={base_model!r} can take."
        )
