"""gralora_scaling="matched": one factor on the update, the same wherever an adapter is used, saved or rewritten."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from benchmarks import update_size
from helpers import (
    CASES,
    TARGETS,
    Case,
    adapted,
    assert_close64,
    case_config,
    cases,
    factors_of,
    few_cases,
    gralora_config,
    naive_delta,
    naive_update,
    one_layer,
    only_layer,
    random_input,
    randomize,
    tiny_gpt2,
    tiny_llama,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from saved import logits, read, save_gralora

import gralora
from gralora.checkpoints import formats
from gralora.checkpoints.files import read_adapter_folder
from gralora.config import FORMAT, FORMAT_MATCHED
from gralora.ops import plans
from gralora.optimizers import lora_pairs

MATCHED = {"gralora_scaling": "matched"}
FIELDS = {
    "alpha": ({"lora_alpha": 5}, lambda r: 5 / r),
    "rslora": ({"lora_alpha": 5, "use_rslora": True}, lambda r: 5 / math.sqrt(r)),
    "alpha_pattern": ({"lora_alpha": 5, "alpha_pattern": {"layer": 11}}, lambda r: 11 / r),
}


def gain(case: Case) -> float:
    """Root of LoRA's rank over the ranks that meet in one entry of dW, counted in the formula for dW."""
    met = case.hybrid_r + case.r_g // case.k
    return math.sqrt(case.r / met)


def matched(case: Case, **fields: Any) -> tuple[peft.PeftModel, torch.Tensor]:
    """A layer with a matched adapter, and an input."""
    return adapted(one_layer(case), case_config(case, **MATCHED, **fields)), random_input(7, case.in_features)


@cases
def test_ranks_that_meet_in_an_entry(case: Case) -> None:
    """With every factor one, an entry of dW counts the ranks that meet there: what the gain is made of."""
    factors = factors_of(only_layer(adapted(one_layer(case), case_config(case))))
    ones = type(factors)(*(None if t is None else torch.ones_like(t) for t in factors))
    assert torch.equal(naive_delta(ones), torch.full_like(naive_delta(ones), (case.r / gain(case) ** 2)).round())


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@cases
@pytest.mark.parametrize(("fields", "scaling"), FIELDS.values(), ids=FIELDS)
def test_forward_and_merge(case: Case, fields: dict, scaling: Any, implementation: str, monkeypatch: Any) -> None:
    """Output, dW and the merged model have PEFT's scaling times the gain, through every implementation."""
    monkeypatch.setattr(plans, "choice", implementation)
    model, x = matched(case, **fields)
    layer = only_layer(model)
    total = scaling(case.r) * gain(case)
    expected = layer.base_layer(x) + total * naive_update(x, factors_of(layer))
    assert_close64(model(x), expected)
    assert_close64(layer.get_delta_weight("default"), total * naive_delta(factors_of(layer)))
    assert_close64(model.merge_and_unload()(x), expected)


def test_bias_of_the_adapter_has_no_gain() -> None:
    """lora_bias: PEFT merges the bias times its scaling, so the gain is on dW alone, merged or not."""
    case = CASES[3]
    model, x = matched(case, lora_bias=True)
    layer = only_layer(model)
    update = gain(case) * naive_update(x, factors_of(layer)) + layer.lora_B["default"].bias
    expected = layer.base_layer(x) + 3.0 * update
    assert_close64(model(x), expected)
    assert_close64(model.merge_and_unload()(x), expected)


@few_cases
def test_gradients(case: Case) -> None:
    """The gradients are those of the scaled formula."""
    model, x = matched(case)
    layer = only_layer(model)
    parameters = [p for p in factors_of(layer) if p is not None]
    dy = random_input(7, case.out_features, seed=5)
    expected = torch.autograd.grad(3.0 * gain(case) * naive_update(x, factors_of(layer)), parameters, dy)
    for actual, e in zip(torch.autograd.grad(model(x), parameters, dy), expected, strict=True):
        assert_close64(actual, e)


def test_k1_and_default_change_nothing() -> None:
    """With k = 1 all ranks meet everywhere, so "matched" is LoRA's scaling; and it is not the default."""
    case = CASES[1]
    model, x = matched(case)
    layer = only_layer(model)
    assert_close64(model(x), layer.base_layer(x) + 3.0 * naive_update(x, factors_of(layer)))
    assert gralora.LoraConfig(use_gralora=True).gralora_scaling == "lora"
    other = only_layer(adapted(one_layer(CASES[3]), case_config(CASES[3])))
    assert_close64(other.get_delta_weight("default"), 3.0 * naive_delta(factors_of(other)))


def test_scaling_up_and_back() -> None:
    """PEFT's set_scale, scale_layer and unscale_layer act on top of the gain and return to it."""
    case = CASES[5]
    model, _ = matched(case)
    layer = only_layer(model)
    start = layer.get_delta_weight("default")
    layer.set_scale("default", 2)
    assert_close64(layer.get_delta_weight("default"), 2 * start)
    layer.scale_layer(3.0)
    assert_close64(layer.get_delta_weight("default"), 6 * start)
    layer.unscale_layer(3.0)
    assert_close64(layer.get_delta_weight("default"), 2 * start)
    layer.unscale_layer()
    assert_close64(layer.get_delta_weight("default"), start)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "prepared-for-compile"])
def test_hotswap(tmp_path: Path, compiled: bool) -> None:
    """A matched adapter swapped in has the output that it has when loaded."""
    case = CASES[3]
    new, x = matched(case, lora_alpha=5)
    randomize(new, seed=9)
    new.save_pretrained(tmp_path)
    model, _ = matched(case)
    if compiled:
        prepare_model_for_compiled_hotswap(model)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    torch.testing.assert_close(model(x), new(x), rtol=0, atol=1e-6 if compiled else 1e-10)


def test_hotswap_of_the_other_scaling_is_refused(tmp_path: Path) -> None:
    adapted(one_layer(CASES[3]), case_config(CASES[3])).save_pretrained(tmp_path)
    model, _ = matched(CASES[3])
    with pytest.raises(ValueError, match="gralora_scaling"):
        hotswap_adapter(model, tmp_path, adapter_name="default")


def test_weighted_combination() -> None:
    """A combination, a plain LoRA, adds the delta weights with their gains."""
    case = CASES[3]
    model, x = matched(case)
    model.add_adapter("other", case_config(CASES[3], lora_alpha=5))
    randomize(model, "other", seed=1)
    layer = only_layer(model)
    expected = 2.0 * layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("other")
    model.add_weighted_adapter(["default", "other"], [2.0, 0.5], "mix", combination_type="cat")
    assert_close64(layer.get_delta_weight("mix"), expected)


# What it is for


@pytest.mark.parametrize(("k", "hybrid_r"), [(4, 0), (4, 32)])
def test_size_of_the_update_under_adam(k: int, hybrid_r: int) -> None:
    """docs/gralora.md: as large as LoRA's after one step, m/r of it later if the gradient has rank one; "matched"
    multiplies it by the gain throughout, since Adam's steps do not depend on the scaling."""
    fields = {"r": 64, "lora_alpha": 64, "target_modules": ["0"]}
    grid = {"use_gralora": True, "gralora_k": k, "hybrid_r": hybrid_r}
    configs = (peft.LoraConfig(**fields), gralora.LoraConfig(**fields, **grid))
    configs += (gralora.LoraConfig(**fields, **grid, gralora_scaling="matched"),)
    G = update_size.gradient(1, seed=0)
    lora, plain, larger = (update_size.update_sizes(config, G, 0.0, 0, steps=(1, 100)) for config in configs)
    m = hybrid_r + (64 - hybrid_r) / k
    assert plain[1][0] / lora[1][0] == pytest.approx(1, abs=0.03)
    assert plain[100][0] / lora[100][0] == pytest.approx(m / 64, rel=0.03)
    for step in (1, 100):
        assert larger[step][0] / plain[step][0] == pytest.approx(math.sqrt(64 / m), rel=1e-3)


# On disk

HYBRID_RSLORA = {"use_rslora": True, "lora_alpha": 5}
PATTERNS = {"rank_pattern": {"q_proj": 12}, "alpha_pattern": {"down_proj": 7}}


@pytest.mark.parametrize("fields", [{}, HYBRID_RSLORA, PATTERNS], ids=["hybrid", "rslora", "patterns"])
def test_saved_loaded_exported_and_merged(tmp_path: Path, fields: dict) -> None:
    """The saved adapter gives the same logits loaded by PEFT, exported to plain LoRA, and merged into the base."""
    expected = save_gralora(tmp_path / "in", **MATCHED, **fields)
    assert read(tmp_path / "in")[0]["gralora_scaling"] == "matched"
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "in")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    gralora.to_lora(tmp_path / "in", tmp_path / "lora")
    assert "gralora_scaling" not in read(tmp_path / "lora")[0]
    exported = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(exported), expected, rtol=0, atol=1e-5)
    tiny_llama().save_pretrained(tmp_path / "base")
    gralora.merge_adapter(tmp_path / "in", tmp_path / "merged", base=tmp_path / "base")
    merged = type(tiny_llama()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    plain = save_gralora(tmp_path / "plain", **fields)
    assert (plain - expected).abs().max() > 1e-2  # the factor is no detail


def test_bias_on_disk_has_no_gain(tmp_path: Path) -> None:
    """An exported and a merged adapter with lora_bias give the logits of the one that was saved."""
    expected = save_gralora(tmp_path / "in", "gpt2", lora_bias=True, **MATCHED)
    gralora.to_lora(tmp_path / "in", tmp_path / "lora")
    exported = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora")
    torch.testing.assert_close(logits(exported), expected, rtol=0, atol=1e-5)
    tiny_gpt2().save_pretrained(tmp_path / "base")
    gralora.merge_adapter(tmp_path / "in", tmp_path / "merged", base=tmp_path / "base")
    merged = type(tiny_gpt2()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_preconditioners_see_the_gain() -> None:
    """LoRA-FA divides by the factor on dW squared, which has the gain in it."""
    case = CASES[3]
    model, _ = matched(case)
    assert [pair.scaling for pair in lora_pairs(model)] == [pytest.approx(3.0 * gain(case))] * 2


def test_scaling_read_from_a_file_is_the_layers(tmp_path: Path) -> None:
    save_gralora(tmp_path, **MATCHED, **PATTERNS)
    adapter = formats.read(*read_adapter_folder(tmp_path))
    loaded = gralora.load_adapter(tiny_llama(), tmp_path)
    for name in adapter.layers:
        layer = loaded.base_model.model.get_submodule(name)
        assert adapter.scaling(name) == layer.scaling["default"] * layer.lora_B["default"].gain
    assert len({adapter.gain(name) for name in adapter.layers}) == 2


def test_peft_format_has_the_gain_in_alpha(tmp_path: Path) -> None:
    """PEFT's own GRALORA has no such field: the gain is folded into alpha, and PEFT computes the same logits."""
    expected = save_gralora(tmp_path / "in", **MATCHED)
    gralora.convert_adapter(tmp_path / "in", tmp_path / "out", to="peft")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="rank_pattern"):  # other ranks, other gains
        save_gralora(tmp_path / "patterns", **MATCHED, rank_pattern={"q_proj": 12})
        gralora.convert_adapter(tmp_path / "patterns", tmp_path / "none", to="peft")


def test_older_versions_refuse_it(tmp_path: Path) -> None:
    """The format number rises with the field, which an older gralora would drop with a warning, and only then."""
    for name, fields, expected in [("plain", {}, FORMAT), ("matched", MATCHED, FORMAT_MATCHED)]:
        save_gralora(tmp_path / name, **fields)
        assert read(tmp_path / name)[0]["gralora_format"] == expected


def test_files_without_the_field_mean_the_default(tmp_path: Path) -> None:
    expected = save_gralora(tmp_path)
    config, _ = read(tmp_path)
    del config["gralora_scaling"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(gralora.load_adapter(tiny_llama(), tmp_path)), expected, rtol=0, atol=0)


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match="gralora_scaling='sqrt' must be one of lora, matched"):
        gralora_config(gralora_scaling="sqrt")
    with pytest.raises(ValueError, match="gralora_scaling='sqrt'"):
        dataclasses.replace(gralora_config(target_modules=TARGETS["llama"]), gralora_scaling="sqrt")
    with pytest.warns(UserWarning, match="gralora_scaling='matched' has no effect without use_gralora=True"):
        gralora.LoraConfig(gralora_scaling="matched")
