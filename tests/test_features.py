"""PEFT's features on GraLoRA adapters: each works as on LoRA, or raises an error that says why. docs/peft-features.md
lists them all, with their tests, which are here and in the files about layers and checkpoints.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import (
    FEW_CASES,
    MODELS,
    Case,
    Factors,
    adapted,
    assert_close64,
    assert_unchanged,
    gralora_config,
    integer_factors,
    naive_delta,
    one_layer,
    only_layer,
    random_input,
    randomize,
)
from peft import PeftModel
from saved import edit, logits, read, save_gralora
from torch._dynamo.testing import CompileCounter

import gralora
from gralora.ops.factors import pad_grid

few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=str)

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


def test_padding_by_peft_fails_on_a_grid(tmp_path: Path) -> None:
    """PEFT's own function raises for a target_rank: it unpacks a weight's shape into two numbers."""
    grid_adapter(tmp_path, 4, seed=0)
    model = PeftModel.from_pretrained(one_layer(WIDE), tmp_path)
    with assert_unchanged(model, random_input(7, 40)), pytest.raises(ValueError, match="too many values to unpack"):
        peft.utils.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)


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
