"""The table TARGETS of the programs that serve a plain LoRA, and writers for the files that each of them takes.

A target's `write` puts its files into a folder, and returns a function that reads a layer's factors back, for the
parity report. docs/serving.md describes the targets.
"""

import json
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
from .base import base_folder
from .files import CONFIG, LazyTensors, read_safetensors, spec, write_json, write_safetensors
from .peft_files import EXPERTS, ReadBack, model_type, write_peft, write_sglang, write_vllm
from .plain import PlainLora
from .prompting import Prompting, carry_llamacpp, carry_mlx, carry_ollama, carry_peft, carry_sglang, carry_vllm
from .views import EXPERT, KINDS, by_parameter

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


def write_mlx(plain: PlainLora, folder: Path, base_config: dict[str, Any] | None, extra: dict[str, Any]) -> ReadBack:
    """Write MLX's adapters.safetensors and its adapter_config.json.

    A linear layer has lora_a `[I, R]` and lora_b `[R, O]`; the experts of one projection have lora_a `[E, R, I]` and
    lora_b `[E, O, R]`, which is that of MLX's SwitchLinear.
    """
    adapter, R = plain.adapter, plain.rank
    keys: dict[str, None] = {}
    for layer in adapter.modules:
        match = re.fullmatch(r"(?:model\.layers\.\d+\.)(.+)|(lm_head)", layer)
        if match is None:
            raise ValueError(
                f"mlx adapts what is in model.layers, and lm_head, and the adapter has {layer!r}; `gralora merge` "
                "writes it into the model."
            )
        keys[match[1] or match[2]] = None
    specs: dict[str, Tensor] = {}
    loads: dict[str, Callable[[], Tensor]] = {}
    for layer in adapter.modules:
        in_features, out_features = adapter.features(layer)
        for i, (suffix, shape) in enumerate(((".lora_a", (in_features, R)), (".lora_b", (R, out_features)))):
            specs[layer + suffix] = spec(shape, plain.dtype)
            loads[layer + suffix] = partial(lambda layer, i: plain.factors(layer)[i].T, layer, i)
    parameters = by_parameter(adapter.places)
    block = EXPERTS[model_type(base_config, "mlx", tuple(EXPERTS))].block if parameters else ""
    sources: dict[str, tuple[list[str], int]] = {}  # expert -> layers of its parts, and which of their experts it is
    for parameter, experts in parameters.items():
        module, name = switch_mlp(parameter, block)
        in_features, out_features = adapter.features(experts[0])
        parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
        rows = out_features // len(parts)
        for i, part in enumerate(parts):
            layer = f"{module}.{part}"
            keys[layer.split(".", 3)[3]] = None
            specs[f"{layer}.lora_a"] = spec((len(experts), R, in_features), plain.dtype)
            specs[f"{layer}.lora_b"] = spec((len(experts), rows, R), plain.dtype)
            loads[f"{layer}.lora_a"] = partial(stacked, plain, experts, 0, slice(None))
            loads[f"{layer}.lora_b"] = partial(stacked, plain, experts, 1, slice(i * rows, (i + 1) * rows))
        sources |= {expert: ([f"{module}.{part}" for part in parts], e) for e, expert in enumerate(experts)}
    write_safetensors(folder / "adapters.safetensors", LazyTensors(specs, lambda name: loads[name]()))
    config = {
        "fine_tune_type": "lora",
        "num_layers": -1,  # all layers; those without tensors in the file keep a zero lora_b
        "lora_parameters": {"rank": R, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    write_json(folder / CONFIG, config)
    written = read_safetensors(folder / "adapters.safetensors")

    def read_back(layer: str) -> tuple[Tensor, Tensor]:
        if layer not in sources:
            return written[f"{layer}.lora_a"].T, written[f"{layer}.lora_b"].T
        names, e = sources[layer]
        return written[f"{names[0]}.lora_a"][e], torch.cat([written[f"{name}.lora_b"][e] for name in names])

    return read_back


def mlx_notices(base_config: dict[str, Any] | None) -> list[str]:
    """Warn of a config.json of transformers 5, in which mlx-lm 0.32 does not find the base of rotary embeddings."""
    theta = ((base_config or {}).get("rope_parameters") or {}).get("rope_theta", 10000)
    if theta == 10000 or "rope_theta" in (base_config or {}):
        return []
    return [
        "the base's config.json has rope_parameters, as transformers 5 writes it, and no rope_theta; mlx-lm 0.32 "
        f'reads only that, and computes with 10000 without it: add "rope_theta": {theta} to the config.json.'
    ]


def switch_mlp(parameter: str, block: str) -> tuple[str, str]:
    """MLX's name of the module of experts that a parameter belongs to, and the parameter's own name."""
    match = re.fullmatch(r"(model\.layers\.\d+)\.\w+\.experts\.(gate_up_proj|down_proj)", parameter)
    if match is None:
        raise ValueError(
            f"mlx has no place for the parameter {parameter!r}; `gralora merge` writes it into the model."
        )
    return f"{match[1]}.{block}.switch_mlp", match[2]


def stacked(plain: PlainLora, experts: list[str], factor: int, rows: slice) -> Tensor:
    """Rows of one factor of all experts, `[E, ...]`."""
    return torch.stack([plain.factors(expert)[factor][rows] for expert in experts])


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
            raise ValueError(
                f"llama.cpp has no name for layer {layer!r} in its architecture {architecture!r}; `gralora merge` "
                "writes it into the model."
            )
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
    """A line that loads the files: by the task, else by the base model's class, which PEFT saves where no task is."""
    config, folder = plain.adapter.config, json.dumps(str(out))  # within single quotes
    if config.task_type:
        auto = AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "CausalLM")
        program = f"from peft import AutoPeftModelFor{auto} as M; M.from_pretrained({folder})"
    else:  # without a task PEFT's auto classes load nothing
        program = (
            f"from peft import PeftModel as M; from transformers import {class_of_base(config.auto_mapping)} as B; "
            f"M.from_pretrained(B.from_pretrained({json.dumps(base)}), {folder})"
        )
    return shlex.join(["python", "-c", program])


def class_of_base(auto_mapping: dict[str, Any] | None) -> str:
    """The class of transformers that an adapter's auto_mapping names; without one, that of causal language models."""
    import transformers

    name = (auto_mapping or {}).get("base_model_class")
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    return str(name) if is_model else "AutoModelForCausalLM"


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


NO_BASE_CONFIG = {
    "base_config (--arch, --heads, --kv-heads)": "only GGUF files are written by the base's architecture"
}


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
        holds: what the program takes beside linear layers, of KINDS in views.py.
        notices: what to say about a base with this config.json.
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
    holds: frozenset[str] = frozenset()
    notices: Callable[[dict[str, Any] | None], list[str]] = lambda base_config: []
    ignores: Mapping[str, str] = field(default_factory=lambda: NO_BASE_CONFIG)


IN_FLOAT32 = {"dtype (--dtype)": "its files are in float32, and the program converts them"}
PEFT_KEEPS = names(lambda facts: facts.beside_factors and facts.in_lora)
TARGETS = {
    "peft": Target(write_peft, peft_command, carry_peft, keeps=PEFT_KEEPS, is_peft=True, holds=frozenset(KINDS)),
    "vllm": Target(
        write_vllm, vllm_command, carry_vllm, max_rank=VLLM_RANKS[-1], is_peft=True, holds=frozenset({EXPERT})
    ),
    "sglang": Target(write_sglang, sglang_command, carry_sglang, is_peft=True, holds=frozenset({EXPERT})),
    "llamacpp": Target(write_gguf, llamacpp_command, carry_llamacpp, dtype=torch.float32, ignores=IN_FLOAT32),
    "ollama": Target(
        write_gguf, ollama_command, carry_ollama, dtype=torch.float32, finish=write_modelfile, ignores=IN_FLOAT32
    ),
    "mlx": Target(write_mlx, mlx_command, carry_mlx, holds=frozenset({EXPERT}), notices=mlx_notices),
}
GGUF_TARGETS = tuple(name for name, target in TARGETS.items() if target.write is write_gguf)
