"""The table TARGETS of the programs that serve a plain LoRA, and writers for the files that each of them takes.

A target's `write` puts its files into a folder, and returns a function that reads a layer's factors back, for the
parity report. docs/serving.md describes the targets.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import names
from .adapter import BIAS, MAGNITUDE, PREFIX, A, B
from .base import base_folder
from .files import CONFIG, WEIGHTS, LazyTensors, read_safetensors, spec, write_json, write_safetensors
from .plain import PlainLora, plain_config
from .prompting import Prompting, carry_llamacpp, carry_mlx, carry_ollama, carry_peft, carry_sglang, carry_vllm

ReadBack = Callable[[str], tuple[Tensor, Tensor]]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank takes
# base model_type -> (architecture in GGUF, whether the rows of q and k are permuted there)
GGUF_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "phi3": ("phi3", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
}
GGUF = "adapter.gguf"
AUTO_CLASSES = {  # PEFT's task types -> its AutoPeftModelFor...
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "FEATURE_EXTRACTION": "FeatureExtraction",
}


def write_peft(plain: PlainLora, folder: Path, base_config: dict[str, Any] | None, extra: dict[str, Any]) -> ReadBack:
    """Write PEFT's adapter_config.json and adapter_model.safetensors, which vLLM and SGLang read, too."""
    adapter = plain.adapter
    specs: dict[str, Tensor] = {}
    loads: dict[str, Callable[[], Tensor]] = {}
    for layer in plain.layers:
        in_features, out_features = adapter.features(layer)
        shapes = ((A, (plain.rank, in_features)), (B, (out_features, plain.rank)))
        for i, (suffix, shape) in enumerate(shapes):
            name = PREFIX + layer + suffix
            specs[name], loads[name] = (
                spec(shape, plain.dtype),
                partial(lambda layer, i: plain.factors(layer)[i], layer, i),
            )
        if adapter.specs(layer).bias is not None:
            name = PREFIX + layer + BIAS
            specs[name] = spec((out_features,), plain.dtype)
            loads[name] = partial(folded_bias, plain, layer)
        if adapter.specs(layer).magnitude is not None:
            name = PREFIX + layer + MAGNITUDE
            specs[name] = spec((out_features,), plain.dtype)
            loads[name] = partial(magnitude, plain, layer)
    for name in adapter.others:
        specs[name], loads[name] = adapter.tensors.specs[name], partial(adapter.tensors.__getitem__, name)
    write_safetensors(folder / WEIGHTS, LazyTensors(specs, lambda name: loads[name]()))
    write_json(folder / CONFIG, plain_config(plain, extra))
    written = read_safetensors(folder / WEIGHTS)
    return lambda layer: (written[PREFIX + layer + A], written[PREFIX + layer + B])


def folded_bias(plain: PlainLora, layer: str) -> Tensor:
    bias = plain.adapter.factors(layer).bias
    assert bias is not None  # called only for layers that have one
    return (bias.double() * plain.adapter.peft_scaling(layer)).to(plain.dtype)


def magnitude(plain: PlainLora, layer: str) -> Tensor:
    m = plain.adapter.factors(layer).magnitude
    assert m is not None
    return m.to(plain.dtype)


def write_mlx(plain: PlainLora, folder: Path, base_config: dict[str, Any] | None, extra: dict[str, Any]) -> ReadBack:
    """Write MLX's adapters.safetensors, with lora_a `[I, R]` and lora_b `[R, O]`, and its adapter_config.json."""
    keys: dict[str, None] = {}
    for layer in plain.layers:
        match = re.fullmatch(r"model\.layers\.\d+\.(.+)", layer)
        if match is None:
            raise ValueError(f"mlx adapts what is in model.layers only, and the adapter has {layer!r}.")
        keys[match[1]] = None
    specs: dict[str, Tensor] = {}
    loads: dict[str, Callable[[], Tensor]] = {}
    for layer in plain.layers:
        in_features, out_features = plain.adapter.features(layer)
        shapes = ((".lora_a", (in_features, plain.rank)), (".lora_b", (plain.rank, out_features)))
        for i, (suffix, shape) in enumerate(shapes):
            name = layer + suffix
            specs[name], loads[name] = (
                spec(shape, plain.dtype),
                partial(lambda layer, i: plain.factors(layer)[i].T, layer, i),
            )
    write_safetensors(folder / "adapters.safetensors", LazyTensors(specs, lambda name: loads[name]()))
    config = {
        "fine_tune_type": "lora",
        "num_layers": -1,  # all layers; those without tensors in the file keep a zero lora_b
        "lora_parameters": {"rank": plain.rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    write_json(folder / CONFIG, config)
    written = read_safetensors(folder / "adapters.safetensors")
    return lambda layer: (written[f"{layer}.lora_a"].T, written[f"{layer}.lora_b"].T)


def write_gguf(plain: PlainLora, folder: Path, base_config: dict[str, Any] | None, extra: dict[str, Any]) -> ReadBack:
    """Write llama.cpp's adapter, with GGUF's layer names, and rows of q and k permuted as in the base's file."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install gguf") from error

    architecture, permuted, heads = gguf_base(base_config)
    blocks = 1 + max((int(n) for layer in plain.layers for n in re.findall(r"\.(\d+)\.", layer)), default=0)
    table = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), blocks
    )
    gguf_names: dict[str, str] = {}
    for layer in plain.layers:
        name = table.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"llama.cpp has no name for layer {layer!r} in its architecture {architecture!r}.")
        gguf_names[layer] = name

    def rows(layer: str, reorder: Callable[[Tensor, int], Tensor], B: Tensor) -> Tensor:
        kind = layer.rpartition(".")[2]
        return reorder(B, heads[kind]) if permuted and kind in heads else B

    writer = gguf.GGUFWriter(folder / GGUF, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(plain.rank))
    for layer, name in gguf_names.items():
        in_features, out_features = plain.adapter.features(layer)
        for suffix, shape in ((".lora_a", (plain.rank, in_features)), (".lora_b", (out_features, plain.rank))):
            writer.add_tensor_info(name + suffix, shape, torch.empty(0).numpy().dtype, 4 * shape[0] * shape[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for layer in gguf_names:
        lora_A, lora_B = plain.factors(layer)
        writer.write_tensor_data(lora_A.contiguous().numpy())
        writer.write_tensor_data(rows(layer, permute_heads, lora_B).contiguous().numpy())
    writer.close()

    written = {t.name: t for t in gguf.GGUFReader(folder / GGUF).tensors}

    def read_back(layer: str) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = (torch.from_numpy(written[gguf_names[layer] + s].data.copy()) for s in (".lora_a", ".lora_b"))
        return lora_A, rows(layer, unpermute_heads, lora_B)

    return read_back


def permute_heads(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a q or k projection from halves to pairs, as GGUF stores them for Llama models.

    Args:
        rows: `[O, ...]`, the weight or the B factor of a LoRA on it; rotary dimensions in a head are (half, i).
        heads: number of heads that the rows form.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def unpermute_heads(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `permute_heads`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def gguf_base(config: dict[str, Any] | None) -> tuple[str, bool, dict[str, int]]:
    """Read GGUF's architecture, whether q and k are permuted there, and their heads from a base model's config."""
    if config is None:
        raise ValueError(
            "llama.cpp needs to know the base model's architecture and heads: give --base FOLDER (its config.json is "
            "read), or --arch llama --heads N --kv-heads N."
        )
    model_type = config.get("model_type")
    if model_type not in GGUF_ARCHITECTURES:
        raise ValueError(
            f"model_type={model_type!r}: how llama.cpp lays out this base model is not known to gralora, which knows "
            f"{', '.join(GGUF_ARCHITECTURES)}. Export with --for peft and use llama.cpp's own convert_lora_to_gguf.py."
        )
    architecture, permuted = GGUF_ARCHITECTURES[model_type]
    heads: Any = config.get("num_attention_heads")
    if permuted and not isinstance(heads, int):
        raise ValueError(f"num_attention_heads={heads!r} in the base model's config must be a number.")
    return architecture, permuted, {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}


def write_modelfile(folder: Path, base: str) -> None:
    """Write the Modelfile, Ollama's recipe.

    Ollama takes a relative path from the Modelfile's folder, and any other name from its registry. A Hub id is
    neither, so it is replaced by the path of its copy on this machine, or by a placeholder to fill in.
    """
    note = ""
    try:
        base = str(base_folder(base).resolve())
    except OSError:
        if base != "BASE_MODEL":
            note, base = f"# the folder or GGUF file of {base}, or its name in Ollama's registry:\n", "BASE_MODEL"
    (folder / "Modelfile").write_text(f"{note}FROM {base}\nADAPTER ./{GGUF}\n", encoding="utf-8")


# The commands that serve the written files


def peft_command(base: str, out: Path, plain: PlainLora) -> str:
    task = plain.adapter.config.task_type
    name = f"AutoPeftModelFor{AUTO_CLASSES.get(str(getattr(task, 'value', task)), 'CausalLM')}"
    program = f"from peft import {name} as M; M.from_pretrained({str(out)!r})"
    return shlex.join(["python", "-c", program])


def vllm_command(base: str, out: Path, plain: PlainLora) -> str:
    allowed = min(n for n in VLLM_RANKS if n >= plain.rank)
    return shlex.join(
        ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(allowed)]
        + ["--lora-modules", f"{out.name}={out}"]
    )


def sglang_command(base: str, out: Path, plain: PlainLora) -> str:
    return shlex.join(
        [
            "python",
            "-m",
            "sglang.launch_server",
            "--model-path",
            base,
            "--enable-lora",
            "--max-lora-rank",
            str(plain.rank),
        ]
        + ["--lora-paths", f"{out.name}={out}"]
    )


def llamacpp_command(base: str, out: Path, plain: PlainLora) -> str:
    return shlex.join(["llama-server", "--model", "BASE_MODEL.gguf", "--lora", str(out / GGUF)])


def ollama_command(base: str, out: Path, plain: PlainLora) -> str:
    create = ["ollama", "create", out.name, "-f", str(out / "Modelfile")]
    return f"{shlex.join(create)} && {shlex.join(['ollama', 'run', out.name])}"


def mlx_command(base: str, out: Path, plain: PlainLora) -> str:
    return shlex.join(["mlx_lm.server", "--model", base, "--adapter-path", str(out)])


def nothing(folder: Path, base: str) -> None:
    pass


@dataclass(frozen=True)
class Target:
    """How one program takes a plain LoRA.

    Attributes:
        write: (adapter, folder, base's config, config fields kept) -> a function that reads a layer back.
        command: (base, output folder, the LoRA) -> the command that serves it.
        max_rank: the highest rank that the program takes, or None if any.
        keeps: config fields beside the factors that the program takes, with their tensors.
        dtype: the dtype to write, or None for the adapter's.
        is_peft: whether PEFT can load the written files.
        finish: adds files that name the base model.
        carry: (prompting, folder, output folder) -> words for `command`; adds files that say how the adapter was
            trained to be asked and where to stop.
        ignores: options of `export.to_lora`, by its names for them, that mean nothing here -> why.
    """

    write: Callable[[PlainLora, Path, dict[str, Any] | None, dict[str, Any]], ReadBack]
    command: Callable[[str, Path, PlainLora], str]
    carry: Callable[[Prompting, Path, Path], list[str]]
    max_rank: int | None = None
    keeps: frozenset[str] = frozenset()
    dtype: torch.dtype | None = None
    is_peft: bool = False
    finish: Callable[[Path, str], None] = nothing
    ignores: Mapping[str, str] = field(default_factory=lambda: NO_BASE_CONFIG)


NO_BASE_CONFIG = {
    "base_config (--arch, --heads, --kv-heads)": "only GGUF files are written by the base's architecture"
}
IN_FLOAT32 = {"dtype (--dtype)": "its files are in float32, and the program converts them"}
PEFT_KEEPS = names(lambda facts: facts.beside_factors and facts.in_lora)
TARGETS = {
    "peft": Target(write_peft, peft_command, carry_peft, keeps=PEFT_KEEPS, is_peft=True),
    "vllm": Target(write_peft, vllm_command, carry_vllm, max_rank=VLLM_RANKS[-1], is_peft=True),
    "sglang": Target(write_peft, sglang_command, carry_sglang, is_peft=True),
    "llamacpp": Target(write_gguf, llamacpp_command, carry_llamacpp, dtype=torch.float32, ignores=IN_FLOAT32),
    "ollama": Target(
        write_gguf, ollama_command, carry_ollama, dtype=torch.float32, finish=write_modelfile, ignores=IN_FLOAT32
    ),
    "mlx": Target(write_mlx, mlx_command, carry_mlx),
}
GGUF_TARGETS = tuple(name for name, target in TARGETS.items() if target.write is write_gguf)
