"""Load the base model and its tokenizer from a folder, the hub, or the package of the embedded model."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import parse_flag_from_env
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)
from transformers.utils.peft_utils import find_adapter_config_file

from gralora_command import install

from ..checkpoints.files import read_json
from ..fp8 import compute_in_own_dtype, dequantize_fp8, float8_weight
from .embedded import embedded_model

EMBEDDED = "embedded"
OTHER_TOKENIZER = (
    "Take the tokenizer that belongs to the model, or save the model with resized embeddings "
    "(model.resize_token_embeddings(len(tokenizer)))."
)


def _4bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    """As in the QLoRA paper (arXiv 2305.14314); under FSDP stored as floats, since it shards no integers."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        options["bnb_4bit_quant_storage"] = dtype
    return BitsAndBytesConfig(load_in_4bit=True, **options)


def _8bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    """LLM.int8 (arXiv 2208.07339)."""
    return BitsAndBytesConfig(load_in_8bit=True)


def _fp8(dtype: torch.dtype) -> TorchAoConfig:
    """E4M3 with one scale a row, as `gralora.quantize_fp8` makes it."""
    from torchao.quantization import Float8WeightOnlyConfig

    return TorchAoConfig(Float8WeightOnlyConfig(set_inductor_config=False))


class Quantization(NamedTuple):
    """A way to load a base model quantised: the library that it needs, and dtype computed in -> its config."""

    library: str
    config: Callable[[torch.dtype], Any]


QUANTIZATIONS = {
    "4bit": Quantization("bitsandbytes", _4bit),
    "8bit": Quantization("bitsandbytes", _8bit),
    "fp8": Quantization("torchao", _fp8),
}


def load_pretrained(auto: Any, base_model: str, **options: Any) -> Any:
    """Call `from_pretrained` of an Auto class of transformers for the base model; return what that returns."""
    folder = str(embedded_model()) if base_model == EMBEDDED else base_model
    if auto is AutoConfig:  # which is asked for before each model, and an adapter has none
        refuse_adapter(base_model, folder)
    # the default would ask the user whether to run a model's code
    options.setdefault("trust_remote_code", False)
    try:
        loaded = auto.from_pretrained(folder, **options)
    except OSError as error:
        raise OSError(
            f"base_model={base_model!r} could not be loaded; give a local folder, a hub id that can be reached, or "
            f"{EMBEDDED!r}. {error}"
        ) from error
    if isinstance(loaded, PreTrainedModel):
        compute_in_own_dtype(loaded)
    return loaded


def refuse_adapter(base_model: str, folder: str) -> None:
    """Raise ValueError for an adapter: transformers would load it and its base, and call that the base model."""
    found = find_adapter_config_file(folder)
    if found is not None:
        base = read_json(Path(found)).get("base_model_name_or_path")
        raise ValueError(
            f"base_model={base_model!r} is an adapter; its base model is {base!r}, give that. An adapter in a local "
            "folder is trained on by `gralora finetune --base_model FOLDER`."
        )


def load_language_model(base_model: str, **options: Any) -> PreTrainedModel:
    """Load a model that continues text: also one that reads pictures too, if it has no form without them.

    Raises:
        ValueError: if it is of a kind that continues no text.
    """
    config = load_pretrained(AutoConfig, base_model, trust_remote_code=options.get("trust_remote_code", False))
    auto: Any = AutoModelForCausalLM
    if not (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {})):
        auto = AutoModelForImageTextToText
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(
                f"base_model={base_model!r} is of model_type={config.model_type!r}, and transformers has no model of "
                "this kind that continues text (AutoModelForCausalLM); give one that does."
            )
    return load_pretrained(auto, base_model, **options)


def load_model(base_model: str, dtype: torch.dtype, quantization: str = "none", **options: Any) -> PreTrainedModel:
    """Load the base model in `dtype`, or quantised by a row of QUANTIZATIONS and computing in `dtype`."""
    if quantization != "none":
        library, config = QUANTIZATIONS[quantization]
        if importlib.util.find_spec(library) is None:
            raise ImportError(f"quantization={quantization!r} needs {library}: {install('quantized')}")
        # bitsandbytes would warn in every 8-bit layer and pass that inputs are cast
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        options["quantization_config"] = config(dtype)
    return load_language_model(base_model, **{"dtype": dtype} | options)


def quantization_of(model: Any) -> str:
    """Return by which row of QUANTIZATIONS a model is quantised, by its files or when loaded, or "none"."""
    for quantization in ("4bit", "8bit"):
        if getattr(model, f"is_loaded_in_{quantization}", False):
            return quantization
    return "fp8" if any(float8_weight(module) is not None for module in model.modules()) else "none"


def dequantized(model: Any, quantization: str) -> Any:
    """A model without adapters that is quantised so, in floating point: the weights it computed with."""
    if quantization == "fp8":
        return dequantize_fp8(model)
    return model.dequantize().float()  # float32, as all else that bitsandbytes' preparation for training leaves behind


def load_tokenizer(
    base_model: str, chat_template: str | None = None, eos_token: str | None = None, **options: Any
) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer, and give it a padding token if it has none.

    Args:
        base_model: a hub id, a local folder, or `EMBEDDED`.
        chat_template: a Jinja file, or a model whose template is to be used instead of the tokenizer's own.
        eos_token: the token that ends a text, instead of the tokenizer's own.
        options: passed on to `from_pretrained`.
    """
    tokenizer = load_pretrained(AutoTokenizer, base_model, **options)
    if hasattr(tokenizer, "legacy"):  # which transformers does not save, and without which Llama's makes other tokens
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token={eos_token!r} is no token of base_model={base_model!r}.")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token is None:
        raise ValueError(
            f"base_model={base_model!r} has a tokenizer without an end token (eos_token); name one of its tokens with "
            "--eos_token."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        if Path(chat_template).is_file():
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = load_pretrained(AutoTokenizer, chat_template).chat_template
        if tokenizer.chat_template is None:
            raise ValueError(f"chat_template_path={chat_template!r} is a model whose tokenizer has no chat template.")
    return tokenizer


def load_config(base_model: str, **options: Any) -> Any:
    """Load the config of the base model, or of the part that reads text if there are several."""
    return load_pretrained(AutoConfig, base_model, **options).get_text_config()


def positions(config: Any) -> int | None:
    """Return how many tokens a model with this config can take, or None if it sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def vocabulary_size(config: Any) -> int | None:
    """Return how many tokens a model with this config has embeddings for, or None if it does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def check_length(max_seq_length: int, base_model: str, config: Any) -> None:
    """Raise ValueError if `max_seq_length` is more than the model has positions for."""
    most = positions(config)
    if most and max_seq_length > most:
        raise ValueError(
            f"max_seq_length={max_seq_length} is more than the {most} tokens that base_model={base_model!r} can take; "
            f"give {most} or less."
        )


def check_tokens(tokenizer: PreTrainedTokenizerBase, base_model: str, config: Any) -> None:
    """Raise ValueError if the model has no embedding for the padding token or another token of the tokenizer."""
    size = vocabulary_size(config)
    if size is None:
        return
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= size}
    # some tokenizers have tokens that never occur; those with a role do, and of others the data say it
    used = {token: beyond[token] for token in beyond if token in tokenizer.all_special_tokens}
    used |= {token: number for token, number in tokenizer.get_added_vocab().items() if number >= size}
    if used:
        listed = ", ".join(f"{token!r} ({number})" for token, number in sorted(used.items(), key=lambda x: x[1])[:5])
        raise ValueError(
            f"base_model={base_model!r} has embeddings for {size} tokens, and its tokenizer has {len(used)} beyond: "
            f"{listed}. {OTHER_TOKENIZER}"
        )
