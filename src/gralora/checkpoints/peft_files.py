"""Files in PEFT's layout of a LoRA, and in what vLLM and SGLang make of it for experts and for layers they fuse.

PEFT keeps the factors of all experts of a parameter in one pair, A `[E * R, I]` and B `[O, R * E]`, where E is the
number of experts. vLLM reads that for some models; for the others, as SGLang does for all, it wants a pair for each
expert and each of the projections that transformers joins in `gate_up_proj`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapter import BIAS, MAGNITUDE, PREFIX
from .files import CONFIG, WEIGHTS, LazyTensors, read_safetensors, spec, write_json, write_safetensors
from .in_memory import config_of, skeleton
from .plain import PlainLora, plain_config
from .views import A, B, by_parameter

ReadBack = Callable[[str], tuple[Tensor, Tensor]]
Pair = tuple[Tensor, Tensor]


class Experts(NamedTuple):
    """What a base model's files call its experts; transformers' `gate_up_proj` is gate and up, joined by rows."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


EXPERTS = {  # base model_type -> names of its experts, which vLLM and SGLang take one by one
    "deepseek_v3": Experts(),
    "mixtral": Experts("block_sparse_moe", "w1", "w3", "w2"),
    "olmoe": Experts(),
    "qwen2_moe": Experts(),
    "qwen3_moe": Experts(),
}
IN_ONE = ("gpt_oss",)  # base model_types whose experts vLLM reads in PEFT's layout
GROUPS = (  # layers that SGLang fuses, and so takes only together
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


class LoraFile:
    """An adapter_model.safetensors whose tensors are announced first, and computed as they are written.

    Attributes:
        sources: the adapter's layer -> what reads its A `[R, I]` and B `[O, R]` from the tensors in the file.
    """

    def __init__(self, plain: PlainLora) -> None:
        self.plain = plain
        self.specs: dict[str, Tensor] = {}
        self.loads: dict[str, Callable[[], Tensor]] = {}
        self.sources: dict[str, Callable[[Mapping[str, Tensor]], Pair]] = {}

    def add(self, name: str, shape: tuple[int, ...], load: Callable[[], Tensor]) -> None:
        self.specs[PREFIX + name], self.loads[PREFIX + name] = spec(shape, self.plain.dtype), load

    def add_pair(
        self, layer: str, A_shape: tuple[int, ...], B_shape: tuple[int, ...], load: Callable[[], Pair]
    ) -> None:
        self.add(layer + A, A_shape, lambda: load()[0].reshape(A_shape))
        self.add(layer + B, B_shape, lambda: load()[1].reshape(B_shape))

    def add_modules(self) -> None:
        """Add the layers that are modules: linear ones, and convolutions with A `[R, I, *kernel]`."""
        adapter, R = self.plain.adapter, self.plain.rank
        for layer in adapter.modules:
            in_features, out_features = adapter.features(layer)
            kernel = adapter.places[layer].kernel if layer in adapter.places else ()
            positions = torch.Size(kernel).numel()
            self.add_pair(
                layer,
                (R, in_features // positions, *kernel),
                (out_features, R, *[1] * len(kernel)),
                functools.partial(self.plain.factors, layer),
            )
            self.sources[layer] = functools.partial(_pair, layer)

    def add_experts(self) -> None:
        """Add the experts in PEFT's layout, all of a parameter in one pair."""
        adapter, R = self.plain.adapter, self.plain.rank
        for experts in by_parameter(adapter.places).values():
            in_features, out_features = adapter.features(experts[0])
            layer, E = adapter.places[experts[0]].layer, len(experts)
            self.add(layer + A, (E * R, in_features), functools.partial(_joined_A, self.plain, experts))
            self.add(layer + B, (out_features, R * E), functools.partial(_joined_B, self.plain, experts))
            for e, expert in enumerate(experts):
                self.sources[expert] = functools.partial(_of_joined, layer, R, E, e)

    def add_experts_one_by_one(self, names: Experts) -> None:
        """Add a pair for each projection of each expert; zeros for a projection that has no adapter."""
        adapter, R = self.plain.adapter, self.plain.rank
        parameters = by_parameter(adapter.places)
        for block in dict.fromkeys(parameter.rpartition(".")[0] for parameter in parameters):
            module = f"{block.rpartition('.')[0].rpartition('.')[0]}.{names.block}.experts"
            gate_up, down = (parameters.get(f"{block}.{name}") for name in ("gate_up_proj", "down_proj"))
            for e in range(len(gate_up or down or [])):
                if gate_up is not None:
                    self._add_gate_up(gate_up[e], f"{module}.{e}.{names.gate}", f"{module}.{e}.{names.up}")
                    hidden, inner = adapter.features(gate_up[e])[0], adapter.features(gate_up[e])[1] // 2
                if down is not None:
                    inner, hidden = adapter.features(down[e])
                    name = f"{module}.{e}.{names.down}"
                    self.add_pair(name, (R, inner), (hidden, R), functools.partial(self.plain.factors, down[e]))
                    self.sources[down[e]] = functools.partial(_pair, name)
                missing = [names.gate, names.up] if gate_up is None else [names.down] if down is None else []
                for projection in missing:
                    sizes = (inner, hidden) if projection == names.down else (hidden, inner)
                    self.add_zeros(f"{module}.{e}.{projection}", *sizes)

    def _add_gate_up(self, expert: str, gate: str, up: str) -> None:
        in_features, out_features = self.plain.adapter.features(expert)
        for name, half in ((gate, 0), (up, 1)):
            self.add_pair(
                name,
                (self.plain.rank, in_features),
                (out_features // 2, self.plain.rank),
                functools.partial(_half, self.plain, expert, half),
            )
        self.sources[expert] = lambda t: (t[PREFIX + gate + A], torch.cat([t[PREFIX + one + B] for one in (gate, up)]))

    def add_zeros(self, layer: str, in_features: int, out_features: int) -> None:
        """Add a pair that changes nothing."""
        R, dtype = self.plain.rank, self.plain.dtype
        self.add_pair(
            layer,
            (R, in_features),
            (out_features, R),
            lambda: (torch.zeros(R, in_features, dtype=dtype), torch.zeros(out_features, R, dtype=dtype)),
        )

    def add_others(self) -> None:
        """Add what PEFT keeps beside the factors: biases, magnitudes, and tensors of no layer."""
        adapter = self.plain.adapter
        for layer in adapter.modules:
            for suffix, t in ((BIAS, adapter.specs(layer).bias), (MAGNITUDE, adapter.specs(layer).magnitude)):
                if t is not None:
                    load = folded_bias if suffix == BIAS else magnitude
                    self.add(layer + suffix, tuple(t.shape), functools.partial(load, self.plain, layer))
        for name in adapter.others:
            self.specs[name] = adapter.tensors.specs[name]
            self.loads[name] = functools.partial(adapter.tensors.__getitem__, name)

    def write(self, folder: Path, config: dict[str, Any]) -> ReadBack:
        write_safetensors(folder / WEIGHTS, LazyTensors(self.specs, lambda name: self.loads[name]()))
        write_json(folder / CONFIG, config)
        written = read_safetensors(folder / WEIGHTS)
        return lambda layer: self.sources[layer](written)


def _pair(layer: str, tensors: Mapping[str, Tensor]) -> Pair:
    return tensors[PREFIX + layer + A].flatten(1), tensors[PREFIX + layer + B].flatten(1)


def _half(plain: PlainLora, expert: str, half: int) -> Pair:
    lora_A, lora_B = plain.factors(expert)
    return lora_A, lora_B.chunk(2)[half]


def _joined_A(plain: PlainLora, experts: list[str]) -> Tensor:
    return torch.cat([plain.factors(expert)[0] for expert in experts])


def _joined_B(plain: PlainLora, experts: list[str]) -> Tensor:
    return torch.stack([plain.factors(expert)[1] for expert in experts], dim=-1).flatten(1)


def _of_joined(layer: str, R: int, E: int, e: int, tensors: Mapping[str, Tensor]) -> Pair:
    joined_A, joined_B = tensors[PREFIX + layer + A], tensors[PREFIX + layer + B]
    return joined_A[e * R : (e + 1) * R], joined_B.unflatten(1, (R, E))[..., e]


def folded_bias(plain: PlainLora, layer: str) -> Tensor:
    bias = plain.adapter.factors(layer).bias
    assert bias is not None  # called only for layers that have one
    return (bias.double() * plain.adapter.peft_scaling(layer)).to(plain.dtype)


def magnitude(plain: PlainLora, layer: str) -> Tensor:
    m = plain.adapter.factors(layer).magnitude
    assert m is not None
    return m.to(plain.dtype)


# The programs


def write_peft(plain: PlainLora, folder: Path, base_config: dict[str, Any] | None, extra: dict[str, Any]) -> ReadBack:
    """Write PEFT's adapter_config.json and adapter_model.safetensors."""
    file = LoraFile(plain)
    file.add_modules()
    file.add_experts()
    file.add_others()
    return file.write(folder, plain_config(plain, extra))


def write_vllm(plain: PlainLora, folder: Path, base_config: dict[str, Any] | None, extra: dict[str, Any]) -> ReadBack:
    """Write PEFT's files for vLLM: experts in the layout that it reads for the base model."""
    file = LoraFile(plain)
    file.add_modules()
    parameters = by_parameter(plain.adapter.places)
    if parameters and model_type(base_config, "vllm", (*EXPERTS, *IN_ONE)) in IN_ONE:
        check_both("vllm", parameters)
        file.add_experts()
    else:
        add_experts(file, base_config, "vllm")
    return file.write(folder, plain_config(plain, with_projections(file, {})))


def write_sglang(
    plain: PlainLora, folder: Path, base_config: dict[str, Any] | None, extra: dict[str, Any]
) -> ReadBack:
    """Write PEFT's files for SGLang: with zeros for layers that it fuses with adapted ones."""
    file = LoraFile(plain)
    file.add_modules()
    add_experts(file, base_config, "sglang")
    partners = dict(missing_partners(plain, base_config))
    for layer, features in partners.items():
        file.add_zeros(layer, *features)
    added = {"target_modules": sorted([*plain.adapter.modules, *partners])} if partners else {}
    return file.write(folder, plain_config(plain, with_projections(file, added)))


def add_experts(file: LoraFile, base_config: dict[str, Any] | None, target: str) -> None:
    """Add the adapter's experts, if it has any, one by one under the names in the base model's files.

    SGLang knows the projections by one set of names, which it gives to those of all models.
    """
    if by_parameter(file.plain.adapter.places):
        names = EXPERTS[model_type(base_config, target, tuple(EXPERTS))]
        file.add_experts_one_by_one(Experts(names.block) if target == "sglang" else names)


def with_projections(file: LoraFile, fields: dict[str, Any]) -> dict[str, Any]:
    """Config fields for layers that are no modules of the adapter: the file's own names of all its layers."""
    if not by_parameter(file.plain.adapter.places):
        return fields
    layers = {name.removeprefix(PREFIX).removesuffix(A) for name in file.specs if name.endswith(A)}
    return fields | {"target_modules": sorted(layers)}


def model_type(base_config: dict[str, Any] | None, target: str, known: tuple[str, ...]) -> str:
    """The base's model_type, whose experts the target is known to read.

    Raises:
        ValueError: if it is not known.
    """
    if base_config is None:
        raise ValueError(
            f"{target} takes the experts of each base model under other names: give --base FOLDER, whose config.json "
            "says which model it is."
        )
    found = base_config.get("model_type")
    if found not in known:
        raise ValueError(
            f"model_type={found!r}: how {target} reads adapters of this base model's experts is not known to gralora, "
            f"which knows {', '.join(sorted(known))}. `gralora merge` writes the experts into the model."
        )
    return str(found)


def check_both(target: str, parameters: Mapping[str, list[str]]) -> None:
    """Raise ValueError if only one of the two parameters of some experts is adapted."""
    for parameter in parameters:
        block, _, name = parameter.rpartition(".")
        other = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}.get(name, "")
        if f"{block}.{other}" not in parameters:
            raise ValueError(
                f"{target} reads adapters of this base model's experts only if gate_up_proj and down_proj both have "
                f"one, and the adapter has {parameter!r} alone. `gralora merge` writes it into the model."
            )


def missing_partners(plain: PlainLora, base_config: dict[str, Any] | None) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name and (in, out) features of each layer that SGLang fuses with an adapted one, and that has no adapter.

    Raises:
        ValueError: if there may be some and the base model's config is not known, or is that of another model.
    """
    modules = plain.adapter.modules
    groups = {layer: group for layer in modules for group in GROUPS if layer.rpartition(".")[2] in group}
    wanted: dict[str, str] = {}
    for layer, group in groups.items():
        parent = layer.rpartition(".")[0]
        names = [f"{parent}.{name}" if parent else name for name in group]
        wanted |= {name: layer for name in names if name not in groups}
    if not wanted:
        return
    if base_config is None:
        raise ValueError(
            f"sglang fuses {', '.join(sorted({n.rpartition('.')[2] for n in wanted}))} with layers that the adapter "
            f"changes, such as {next(iter(wanted.values()))!r}, and then wants factors of all of them. Zeros can be "
            "added if their sizes are known: give --base FOLDER, whose config.json says them."
        )
    known: dict[str, Any] = dict(skeleton(config_of(base_config), modules).named_modules())
    for name in wanted:
        # where layers share values with others a model has k_proj alone, and SGLang wants v_proj all the same
        linear = known.get(name) or known.get(name.replace("v_proj", "k_proj"))
        if linear is not None:  # a model without a gate has none
            yield name, (linear.in_features, linear.out_features)
