"""PEFT's features on GraLoRA adapters: each works as on LoRA, or raises an error that says why. docs/peft-features.md
lists them all, with their tests, which are here and in the files about layers and checkpoints.
"""

import ast
import copy
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import (
    MODELS,
    Case,
    Factors,
    adapted,
    adapter_layers,
    assert_close64,
    assert_unchanged,
    factors_of,
    few_cases,
    gralora_config,
    integer_factors,
    naive_delta,
    one_layer,
    only_layer,
    random_input,
    randomize,
    token_ids,
)
from peft import PeftModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from saved import edit, logits, read, save_gralora
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize

import gralora
from gralora import seam
from gralora.factors import pad_grid

# k by layer in saved adapters

KS = {"r": 8, "hybrid_r": 0, "gralora_k_pattern": {"down_proj": 4, "0.self_attn.q_proj": 8}}  # beside k=2
BY_LAYER = {"0.self_attn.q_proj": 8, "1.self_attn.q_proj": 2, "self_attn.k_proj": 2, "mlp.down_proj": 4}


def test_k_pattern_in_a_saved_adapter(tmp_path: Path) -> None:
    """from_pretrained, gralora.load_adapter, merge, export and convert give the logits of the model that was saved."""
    expected = save_gralora(tmp_path / "adapter", **KS)
    base = MODELS["llama"]()
    base.save_pretrained(tmp_path / "base")
    by_peft = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "adapter")
    strictly = gralora.load_adapter(MODELS["llama"](), tmp_path / "adapter")
    assert torch.equal(logits(by_peft), expected) and torch.equal(logits(strictly), expected)
    gralora.convert_adapter(tmp_path / "adapter", tmp_path / "converted")
    assert (tmp_path / "converted" / "adapter_model.safetensors").read_bytes()
    assert torch.equal(logits(gralora.load_adapter(base, tmp_path / "converted")), expected)

    gralora.merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    merged = type(base).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    report = gralora.to_lora(tmp_path / "adapter", tmp_path / "plain")
    assert report["rank"] == 8 * 8 and report["method"] == "copied"
    plain = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "plain")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-6, atol=1e-6)


def test_k_pattern_is_inspected(tmp_path: Path) -> None:
    """inspect tells each layer's k and ranks."""
    save_gralora(tmp_path, **KS)
    description = gralora.inspect_adapter(tmp_path)
    assert (description["gralora_k"], description["gralora_k_pattern"]) == (2, KS["gralora_k_pattern"])
    for layer, d in description["layers"].items():
        (k,) = (k for end, k in BY_LAYER.items() if layer.endswith(end))
        assert d["k"] == k
        assert d["rank"] == d["lora_rank"] == min(k * 8, d["in_features"], d["out_features"])
    assert description["anomalies"] == []


def test_k_pattern_in_the_format_of_peft(tmp_path: Path) -> None:
    """PEFT's GRALORA has one k for all layers: several are refused; one that a pattern gives to all is written."""
    save_gralora(tmp_path / "several", **KS)
    with pytest.raises(ValueError, match=r"gralora_k_pattern=\{.*different values.*`gralora export --for peft"):
        gralora.convert_adapter(tmp_path / "several", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()
    expected = save_gralora(tmp_path / "one", **KS | {"gralora_k_pattern": {".*_proj": 4}})
    gralora.convert_adapter(tmp_path / "one", tmp_path / "peft", "peft")
    assert read(tmp_path / "peft")[0]["gralora_k"] == 4
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "peft")
    assert loaded.peft_config["default"].peft_type == "GRALORA"
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pattern", [{}, {"down_proj": 2}], ids=["lost", "another"])
def test_k_pattern_that_the_tensors_contradict_is_refused(pattern: dict, tmp_path: Path) -> None:
    """A file whose pattern is not that of its tensors is refused, by the layer's name."""
    save_gralora(tmp_path, **KS | {"gralora_k_pattern": {"down_proj": 4}})
    edit(tmp_path, gralora_k_pattern=pattern)
    with pytest.raises(ValueError, match=r"layer '.*down_proj'.* A \(4, .*gralora_k=2"):
        gralora.inspect_adapter(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(MODELS["llama"](), tmp_path)


def test_weighting_adapters_with_ks_by_layer() -> None:
    """add_weighted_adapter of adapters whose k differs by layer adds their updates exactly."""
    config = gralora_config(2, target_modules=["q_proj", "down_proj"], **KS)
    model = adapted(MODELS["llama"](torch.float64), config)
    expected = logits(model)
    model.add_weighted_adapter(["default"], [1.0], "plain", combination_type="cat")
    model.set_adapter("plain")
    assert isinstance(model.peft_config["plain"], peft.LoraConfig) and not model.peft_config["plain"].use_gralora
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)


# Hotswapping between ranks

WIDE = Case(0, 0, 0, 40, 48)


def grid_adapter(folder: Path, r: int, seed: int, **fields: Any) -> torch.Tensor:
    """Save an adapter of one layer of WIDE's features; returns its output."""
    config = gralora_config(2, r=r, target_modules=["layer"], **fields)
    model = adapted(one_layer(WIDE), config, seed=seed)
    model.save_pretrained(folder)
    return model(random_input(7, 40))


@few_cases
def test_padded_grid_is_the_same_update(case: Case) -> None:
    """Zeros at the end of every sub-rank leave dW as it is, bit for bit."""
    A, B, hybrid_A, hybrid_B = integer_factors(case)
    padded = pad_grid(A, B, A.shape[2] + 3 * case.k)
    assert padded[0].shape[2] == padded[1].shape[1] == A.shape[2] + 3 * case.k
    expected = naive_delta(Factors(A, B, hybrid_A, hybrid_B))
    assert torch.equal(naive_delta(Factors(*padded, hybrid_A, hybrid_B)), expected)


@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_hotswap_between_ranks(hybrid_r: int, tmp_path: Path) -> None:
    """gralora.hotswap_adapter swaps a smaller, an equal and a larger rank, with other scalings, in and out."""
    ranks = {"small": 4 + hybrid_r, "large": 8 + hybrid_r, "equal": 8 + hybrid_r}
    outputs = {
        name: grid_adapter(tmp_path / name, r, seed=i, hybrid_r=hybrid_r, lora_alpha=3 + i)
        for i, (name, r) in enumerate(ranks.items())
    }
    model = PeftModel.from_pretrained(one_layer(WIDE), tmp_path / "equal", adapter_name="mine")
    for name in ["small", "large", "small", "equal"]:
        gralora.hotswap_adapter(model, tmp_path / name, "mine")
        assert_close64(model(random_input(7, 40)), outputs[name])
        assert_close64(model.get_base_model().layer.get_delta_weight("mine").detach(), swapped_delta(tmp_path / name))


def swapped_delta(folder: Path) -> torch.Tensor:
    return only_layer(PeftModel.from_pretrained(one_layer(WIDE), folder)).get_delta_weight("default").detach()


def test_hotswap_without_recompiling(tmp_path: Path) -> None:
    """After preparing for the highest rank, adapters of any rank and scaling are swapped in one compiled graph."""
    alphas = {6: 6, 10: 20, 14: 7}  # PEFT makes the scalings float32, in which these are exact
    outputs = {
        r: grid_adapter(tmp_path / str(r), r, seed=r, hybrid_r=2, lora_alpha=alpha) for r, alpha in alphas.items()
    }
    model = PeftModel.from_pretrained(one_layer(WIDE), tmp_path / "6")
    configs = model.peft_config
    gralora.prepare_model_for_compiled_hotswap(model, target_rank=14, config=configs)
    assert configs["default"].r == 14
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled, x = torch.compile(model, backend=counter), random_input(7, 40)
    for r in (6, 10, 14, 6):
        if r != 6 or counter.frame_count:
            gralora.hotswap_adapter(compiled, tmp_path / str(r), "default")
        with torch.no_grad():
            assert_close64(compiled(x), outputs[r])
    assert counter.frame_count == 1


def test_preparing_pads_plain_adapters_too(tmp_path: Path) -> None:
    """A plain LoRA beside a GraLoRA adapter on the same layer is padded as PEFT pads it."""
    grid_adapter(tmp_path, 4, seed=0)
    model = PeftModel.from_pretrained(one_layer(WIDE), tmp_path)
    model.add_adapter("plain", peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"]))
    randomize(model, "plain")
    x = random_input(7, 40)
    model.base_model.set_adapter(["default", "plain"])
    expected = model(x)
    gralora.prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert only_layer(model).lora_A["plain"].weight.shape == (6, 40)
    assert only_layer(model).lora_A["default"].weight.shape == (2, 20, 6)
    assert_close64(model(x), expected)


@pytest.mark.parametrize("rank, fitting", [(5, 10), (11, 12)], ids=["too-small", "not-divisible"])
def test_rank_that_cannot_be_padded_to_is_refused(rank: int, fitting: int, tmp_path: Path) -> None:
    """A target_rank below the adapter's, or that k does not divide, is refused with one that works."""
    grid_adapter(tmp_path, 10, seed=0, hybrid_r=2)
    model = PeftModel.from_pretrained(one_layer(WIDE), tmp_path)
    message = rf"target_rank={rank} .*layer'.*at least 10, .*hybrid_r=2 divisible by gralora_k=2, .* {fitting}\."
    with assert_unchanged(model, random_input(7, 40)), pytest.raises(ValueError, match=message):
        gralora.prepare_model_for_compiled_hotswap(model, target_rank=rank)
    assert isinstance(only_layer(model).scaling["default"], float)
    gralora.prepare_model_for_compiled_hotswap(model, target_rank=fitting)


def test_hotswap_refuses_what_does_not_fit(tmp_path: Path) -> None:
    """Another grid, a base of other features, and layers that are not there, raise before anything changes."""
    grid_adapter(tmp_path / "mine", 4, seed=0)
    grid_adapter(tmp_path / "hybrid", 4, seed=0, hybrid_r=2)
    adapted(one_layer(Case(0, 0, 0, 20, 24)), gralora_config(2, r=4, target_modules=["layer"])).save_pretrained(
        tmp_path / "features"
    )
    model = PeftModel.from_pretrained(one_layer(WIDE), tmp_path / "mine")
    for name, message in [("hybrid", "hybrid_r, 0 != 2"), ("features", r"layer'.*\(2, 10, 4\).*only their rank may")]:
        with assert_unchanged(model, random_input(7, 40)), pytest.raises(ValueError, match=message):
            gralora.hotswap_adapter(model, tmp_path / name, "default")
    save_gralora(tmp_path / "llama", hybrid_r=0)
    with assert_unchanged(model, random_input(7, 40)), pytest.raises(RuntimeError, match="unexpected keys found"):
        gralora.hotswap_adapter(model, tmp_path / "llama", "default")


def test_padding_that_would_change_the_scaling_is_refused(tmp_path: Path) -> None:
    """With "matched" the scaling of a hybrid depends on its rank, which padding raises; a pure grid's does not."""
    for hybrid_r in (0, 2):
        fields = {"hybrid_r": hybrid_r, "gralora_scaling": "matched"}
        outputs = [grid_adapter(tmp_path / f"{hybrid_r}-{r}", r, seed=r, lora_alpha=2 * r, **fields) for r in (6, 10)]
        model, x = PeftModel.from_pretrained(one_layer(WIDE), tmp_path / f"{hybrid_r}-10"), random_input(7, 40)
        if hybrid_r:
            message = "gralora_scaling='matched' with hybrid_r=2 depends on the rank"
            with assert_unchanged(model, x), pytest.raises(ValueError, match=message):
                gralora.hotswap_adapter(model, tmp_path / f"{hybrid_r}-6", "default")
            with assert_unchanged(model, x), pytest.raises(ValueError, match=message):
                gralora.prepare_model_for_compiled_hotswap(model, target_rank=14)
        else:
            gralora.hotswap_adapter(model, tmp_path / f"{hybrid_r}-6", "default")
            assert_close64(model(x), outputs[0])


def test_padding_is_of_linear_layers_only() -> None:
    """Ranks of a convolution are not padded, and the error names it."""
    model = adapted(nn.Sequential(nn.Conv2d(4, 4, 1)), gralora_config(2, target_modules=["0"]))
    with pytest.raises(ValueError, match="layer '.*0': ranks of a ConvDown cannot be padded"):
        gralora.prepare_model_for_compiled_hotswap(model, target_rank=16)


def test_padding_by_peft_fails_on_a_grid(tmp_path: Path) -> None:
    """PEFT's own function, imported before gralora: it unpacks a weight's shape into two numbers."""
    grid_adapter(tmp_path, 4, seed=0)
    model = PeftModel.from_pretrained(one_layer(WIDE), tmp_path)
    with assert_unchanged(model, random_input(7, 40)), pytest.raises(ValueError, match="too many values to unpack"):
        seam.prepare_model_for_compiled_hotswap(model, target_rank=8)
    peft.utils.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert model.base_model.model.layer.lora_A["default"].weight.shape[2] == 8


@pytest.mark.parametrize("with_gralora", [True, False], ids=["beside-gralora", "alone"])
def test_hotswap_of_plain_adapters_is_left_to_peft(with_gralora: bool, tmp_path: Path) -> None:
    """Plain LoRA adapters of different ranks are swapped as PEFT swaps them."""
    outputs = {}
    for r in (3, 5):
        plain = adapted(one_layer(WIDE), peft.LoraConfig(r=r, target_modules=["layer"]), seed=r)
        plain.save_pretrained(tmp_path / str(r))
        outputs[r] = plain(random_input(7, 40))
    model = PeftModel.from_pretrained(one_layer(WIDE), tmp_path / "5")
    if with_gralora:
        model.add_adapter("grid", gralora_config(2, r=4, target_modules=["layer"]))
    for r in (3, 5):
        gralora.hotswap_adapter(model, tmp_path / str(r), "default")
        assert_close64(model(random_input(7, 40)), outputs[r])


# Which layers are adapted

BLOCKS = ["self_attn.q_proj", "mlp.down_proj"]
SELECTIONS = {
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_pattern": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "exclude_modules": {"exclude_modules": r".*\.0\..*"},
    "regular-expression": {"target_modules": r".*\.1\.(self_attn\.q_proj|mlp\.down_proj)"},
}


@pytest.mark.parametrize("fields", SELECTIONS.values(), ids=SELECTIONS)
def test_selected_layers(fields: dict[str, Any], tmp_path: Path) -> None:
    """The fields that select layers select the same ones as for plain LoRA, also when the adapter is loaded again."""
    fields = {"target_modules": ["q_proj", "down_proj"]} | fields
    model = adapted(MODELS["llama"](), gralora_config(2, **fields))
    stock = peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(**fields))
    assert model.targeted_module_names == stock.targeted_module_names == [f"model.layers.1.{name}" for name in BLOCKS]
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert_close64(logits(PeftModel.from_pretrained(MODELS["llama"](), tmp_path)), expected)


def test_layer_replication(tmp_path: Path) -> None:
    """Replicated layers share the base's weights and have adapters of their own; merging them is refused."""
    config = gralora_config(2, target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [1, 2]])
    model = adapted(MODELS["llama"](torch.float64), config)
    naive = MODELS["llama"](torch.float64)
    naive.model.layers.append(copy.deepcopy(naive.model.layers[1]))
    naive.model.layers[2].self_attn.layer_idx = 2
    for name, layer in model.get_base_model().named_modules():
        if layer in adapter_layers(model):
            with torch.no_grad():
                naive.get_submodule(name).weight += 2.0 * naive_delta(factors_of(layer))
    naive.config.num_hidden_layers = 3
    assert len(adapter_layers(model)) == 6
    expected = logits(naive)
    assert_close64(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert_close64(logits(PeftModel.from_pretrained(MODELS["llama"](torch.float64), tmp_path)), expected)
    message = r"'model.layers.1.self_attn.q_proj' and 'model.layers.2.self_attn.q_proj' .* share one weight"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=message):
            merge()
    assert_close64(logits(model), expected)


def test_trainable_token_indices(tmp_path: Path) -> None:
    """Single rows of the embedding are trained and saved beside the adapter."""
    config = gralora_config(2, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    model = adapted(MODELS["llama"](torch.float64, tie_word_embeddings=False), config)
    (rows,) = (p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    assert rows.requires_grad and rows.shape == (2, 16)
    rows.data += 1
    naive = MODELS["llama"](torch.float64, tie_word_embeddings=False)
    naive.model.embed_tokens.weight.data[[3, 5]] = rows.data
    adapted(naive, gralora_config(2, target_modules=["q_proj"]))
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = naive(ids).logits
    assert_close64(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["llama"](torch.float64, tie_word_embeddings=False), tmp_path)
    assert_close64(loaded(ids).logits, expected)
    assert_close64(model.merge_and_unload()(ids).logits, expected)


# Models that are no transformers


class Attention(nn.Module):
    """As in a vision transformer: one projection for q, k and v."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class VisionTransformer(nn.Module):
    """Like timm's: a convolution makes patches, blocks of attention and MLP, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention(16), "mlp": mlp(16, 32, 16)}) for _ in range(2)])
        self.head = nn.Linear(16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(image).flatten(2).mT
        for block in self.blocks:
            x = x + block["attn"](x)
            x = x + block["mlp"](x)
        return self.head(x.mean(1))


class UNetBlock(nn.Module):
    """Like diffusers': convolutions, group norm, and attention over the pixels with named projections."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(16, 16), nn.Dropout(0.0)])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.conv_in(image))
        x = h.flatten(2).mT
        x = nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))
        return h + self.to_out[0](x).mT.reshape(h.shape)


def mlp(*widths: int) -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain.from_iterable((layer, nn.GELU()) for layer in layers[:-1]), layers[-1])


OTHER_MODELS = {  # model, its input, what is targeted, the layers that this is
    "mlp": (lambda: mlp(8, 32, 32, 4), (5, 8), "all-linear", ["0", "2", "4"]),
    "vision-transformer": (
        VisionTransformer,
        (2, 3, 8, 8),
        ["qkv", "fc", "mlp.0"],
        [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "mlp.0")],
    ),
    "unet-block": (UNetBlock, (2, 3, 6, 6), ["to_q", "to_v", "to_out.0"], ["to_q", "to_v", "to_out.0"]),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_models_that_are_no_transformers(name: str, tmp_path: Path) -> None:
    """A plain MLP, a vision transformer and a block of a UNet: output and gradients, saving, injecting and merging."""
    build, shape, targets, layers = OTHER_MODELS[name]
    torch.manual_seed(0)
    base, x = build().double(), random_input(*shape)
    config = gralora_config(2, r=4, target_modules=targets)
    model = adapted(copy.deepcopy(base), config)
    assert [where for where, m in model.get_base_model().named_modules() if m in adapter_layers(model)] == layers
    naive = copy.deepcopy(base)
    factors = {where: factors_of(model.get_base_model().get_submodule(where)) for where in layers}
    for where in layers:
        parametrize.register_parametrization(naive.get_submodule(where), "weight", Adds(factors[where]))
    expected = naive(x)
    assert_close64(model(x), expected)
    tensors = [t for where in layers for t in factors[where].tensors()]
    gradients = (torch.autograd.grad(out.square().sum(), tensors) for out in (model(x), expected))
    for actual, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9)

    model.save_pretrained(tmp_path)
    assert_close64(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), expected)
    injected = peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(tmp_path), copy.deepcopy(base))
    peft.set_peft_model_state_dict(injected, peft.load_peft_weights(tmp_path))
    assert isinstance(injected, type(base))  # one of ours may be in front, as GRALORA_BLOCKS=off prevents
    assert_close64(injected(x), expected)
    assert_close64(model.merge_and_unload()(x), expected)


class Adds(nn.Module):
    """Parametrisation of a weight: the naive update is added to it."""

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 2.0 * naive_delta(self.factors)


# Scales, routing between adapters, intruder dimensions


def test_rescaled_adapters() -> None:
    """peft.helpers.rescale_adapter_scale scales the update inside its block."""
    model, x = adapted(one_layer(WIDE), gralora_config(2, r=4, target_modules=["layer"])), random_input(7, 40)
    base = only_layer(model).base_layer(x)
    update = model(x) - base
    with peft.helpers.rescale_adapter_scale(model, 0.25):
        assert_close64(model(x), base + 0.25 * update)
    assert_close64(model(x), base + update)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Two GraLoRA adapters, and the plain LoRA adapters that they equal, as folders."""
    folder = tmp_path_factory.mktemp("experts")
    for seed in (0, 1):
        config = gralora_config(2, hybrid_r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        adapted(MODELS["llama"](), config, seed=seed).save_pretrained(folder / f"gralora{seed}")
        gralora.to_lora(folder / f"gralora{seed}", folder / f"plain{seed}")
    return {kind: [str(folder / f"{kind}{seed}") for seed in (0, 1)] for kind in ("gralora", "plain")}


def test_xlora_of_gralora_adapters(experts: dict[str, list[str]]) -> None:
    """X-LoRA mixes GraLoRA adapters as it mixes the plain ones that they equal."""
    outputs = []
    for folders in experts.values():
        adapters = {str(i): folder for i, folder in enumerate(folders)}
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, xlora_depth=2, adapters=adapters)
        model = peft.get_peft_model(MODELS["llama"](use_cache=False), config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.base_model.internal_xlora_classifier.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
            outputs.append(model(token_ids(2, 7)).logits)
            base = MODELS["llama"]()(token_ids(2, 7)).logits
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert (outputs[0] - base).abs().max() > 0.1


def test_arrow_is_refused(experts: dict[str, list[str]]) -> None:
    """Arrow's router works on the factors of plain LoRA; with GraLoRA adapters it is refused, whichever is first."""
    arrow = peft.ArrowConfig(top_k=2)
    with pytest.raises(ValueError, match="Arrow .* cannot be combined with GraLoRA adapters; `gralora export`"):
        peft.create_arrow_model(MODELS["llama"](), experts["gralora"], arrow)
    model = peft.create_arrow_model(MODELS["llama"](), experts["plain"], arrow)
    with assert_unchanged(model, token_ids(2, 7)), pytest.raises(ValueError, match="Arrow .* cannot be combined"):
        model.load_adapter(experts["gralora"][0], "granular")


def test_intruder_dimensions() -> None:
    """Reducing them writes plain factors, which is noticed; the plain copy that the error advises can be reduced."""
    model = adapted(MODELS["llama"](), gralora_config(2, hybrid_r=2, target_modules=["q_proj", "down_proj"]))
    ids = token_ids(2, 7)
    before = model(ids).logits
    with pytest.raises(ValueError, match=r"'reduced' is GraLoRA.*shape \(8, 16\).*add_weighted_adapter"):
        reduce_intruder_dimension(model, new_adapter_name="reduced", threshold_epsilon=1.0, logging_sink=None)
    assert model.active_adapters == ["default"]
    model.delete_adapter("reduced")
    assert torch.equal(model(ids).logits, before)

    model.add_weighted_adapter(["default"], [1.0], "plain", combination_type="cat")
    reduce_intruder_dimension(
        model, "plain", "reduced", threshold_epsilon=1.0, mitigation_lambda=0.25, logging_sink=None
    )
    for layer in adapter_layers(model):
        W, dW = layer.base_layer.weight, layer.get_delta_weight("default")
        U, S, Vh = torch.linalg.svd(W + dW, full_matrices=False)
        U, S, Vh = torch.linalg.svd(dW - 0.75 * (U[:, :10] * S[:10]) @ Vh[:10], full_matrices=False)
        rank = layer.lora_A["plain"].weight.shape[0]
        expected = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(layer.get_delta_weight("reduced"), expected, rtol=1e-4, atol=1e-4)


def test_intruder_dimensions_without_findings() -> None:
    """Where it finds none, its copy of the adapter lacks the plain part: the docs say so, and what to do."""
    for hybrid_r in (0, 2):
        model = adapted(MODELS["llama"](), gralora_config(2, hybrid_r=hybrid_r, target_modules=["q_proj"]))
        reduce_intruder_dimension(model, new_adapter_name="reduced", threshold_epsilon=0.0, logging_sink=None)
        for layer in adapter_layers(model):
            same = torch.equal(layer.get_delta_weight("reduced"), layer.get_delta_weight("default"))
            assert same == (hybrid_r == 0)


# Partitioned parameters

ZERO3_PROGRAM = """
import copy, os, sys, warnings
warnings.simplefilter("ignore")
import deepspeed, peft, torch
from deepspeed.utils import safe_get_full_grad
from helpers import gralora_config, randomize, tiny_llama, token_ids
deepspeed.init_distributed("gloo")
config = {
    "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
targets = ["q_proj", "down_proj"]
model = randomize(peft.get_peft_model(tiny_llama(), gralora_config(2, hybrid_r=2, target_modules=targets)))
whole = copy.deepcopy(model)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
assert all(p.numel() == 0 for p in engine.module.parameters())
ids = token_ids(2, 7)
mine = ids[int(os.environ["RANK"]):][:1]
for _ in range(2):
    engine.backward(engine(mine, labels=mine).loss)
    whole.zero_grad()
    whole(ids, labels=ids).loss.backward()
    for (name, p), exact in zip(engine.module.named_parameters(), whole.parameters(), strict=True):
        if exact.requires_grad:
            torch.testing.assert_close(safe_get_full_grad(p), exact.grad, rtol=1e-4, atol=1e-5)
            exact.data -= 0.1 * exact.grad
            assert exact.grad.any()
    engine.step()
print("equal")
"""


@pytest.mark.slow
def test_zero3() -> None:
    """Two processes with DeepSpeed's ZeRO-3 on the CPU: the gradients of two steps are those of the whole model."""
    pytest.importorskip("deepspeed")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "DS_ACCELERATOR": "cpu"}
    processes = []
    for rank in ("0", "1"):
        here = str(Path(__file__).parent)
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}
        environment = os.environ | shared | paths | {"RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", ZERO3_PROGRAM]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(output.splitlines()[-1] == "equal" for output in outputs)


# The table of all this


def test_every_test_in_the_table_exists() -> None:
    """Each row of docs/peft-features.md names one test, which is there."""
    here = Path(__file__).parent
    rows = [line for line in (here.parent / "docs" / "peft-features.md").read_text().splitlines() if line[:1] == "|"]
    rows = [row for row in rows if not row.startswith(("| feature |", "| --- |"))]
    functions = {
        f"{file.name}::{node.name}"
        for file in here.glob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert len(rows) > 60
    for row in rows:
        (name,) = re.findall(r"`(test_\w+\.py::test_\w+)` \|$", row)
        assert name in functions, row
