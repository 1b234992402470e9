"""What merging loses, and what is noticed: rounding, NaN and Inf, overflow, unmerging."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Case, adapted, case_config, few_cases, one_layer, only_layer, tiny_llama
from safetensors.torch import load_file
from saved import edit, read, save_gralora, write

import gralora
from gralora.tool import adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def base_of(folder: Path, dtype: torch.dtype, **config: Any) -> Path:
    tiny_llama(dtype, **config).save_pretrained(folder, max_shard_size="4KB")
    return folder


def updates(adapter: Path) -> dict[str, torch.Tensor]:
    """dW of each layer in float64, by PEFT's layers in float64."""
    model = gralora.load_adapter(tiny_llama().double(), adapter)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: module.get_delta_weight("default").detach() for name, module in layers.items()}


@pytest.mark.filterwarnings("ignore:rounding the merged weights")
@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_reports_what_rounding_lost(tmp_path: Path, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    save_gralora(tmp_path / "in")
    config, tensors = read(tmp_path / "in")
    write(tmp_path / "in", config, {name: t.to(adapter_dtype) for name, t in tensors.items()})
    base = base_of(tmp_path / "base", dtype)
    result = gralora.merge_adapter(tmp_path / "in", tmp_path / "out", base)
    before = {n: t.double() for path in base.glob("*.safetensors") for n, t in load_file(path).items()}
    after = {n: t for path in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(path).items()}
    dWs = updates(tmp_path / "in")
    assert result["rounding"].keys() == dWs.keys()
    for layer, dW in dWs.items():
        exact, stored = before[f"{layer}.weight"] + dW, after[f"{layer}.weight"]
        assert stored.dtype == dtype
        lost, reported = (stored.double() - exact).norm().item(), result["rounding"][layer]
        if dtype == torch.float32:  # what is stored is the float32 sum itself
            assert reported == {"of_weight": 0.0, "of_update": 0.0} and lost < 1e-6 * exact.norm()
        else:
            assert reported["of_weight"] == pytest.approx(lost / exact.norm().item(), rel=1e-2)
            assert reported["of_update"] == pytest.approx(lost / dW.norm().item(), rel=1e-2)
            # once: never more than half a unit in the last place
            half_unit = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
            assert ((stored.double() - exact).abs() <= half_unit + 1e-6 * exact.abs().max()).all()


def test_small_update_into_bfloat16_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_gralora(tmp_path / "in", lora_alpha=0.005)
    base = base_of(tmp_path / "base", torch.bfloat16)
    edit(tmp_path / "in", base_model_name_or_path=str(base))
    with pytest.warns(UserWarning, match=r"lost more than 10% of the update in 6 of 6 layers.*--dtype float32"):
        result = gralora.merge_adapter(tmp_path / "in", tmp_path / "out")
    assert all(error["of_update"] > 0.1 > 0.01 > error["of_weight"] > 0 for error in result["rounding"].values())
    result = gralora.merge_adapter(tmp_path / "in", tmp_path / "float32", dtype=torch.float32)
    assert {error["of_update"] for error in result["rounding"].values()} == {0.0}
    with pytest.warns(UserWarning, match="lost more than"):
        adapters.merge_command([str(tmp_path / "in"), str(tmp_path / "again")])
    assert re.search(r"lost by rounding, at most: \d.* of its update, 0.00\d+ of the weight", capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore:rounding the merged weights")
def test_resumed_merge_reports_all_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_gralora(tmp_path / "in")
    base = base_of(tmp_path / "base", torch.bfloat16)
    expected = gralora.merge_adapter(tmp_path / "in", tmp_path / "whole", base)["rounding"]
    with monkeypatch.context() as patched:
        patched.setattr(
            "gralora.checkpoints.merge.copy_other_files", lambda *_: (_ for _ in ()).throw(OSError("full"))
        )
        with pytest.raises(OSError, match="full"):
            gralora.merge_adapter(tmp_path / "in", tmp_path / "out", base)
    result = gralora.merge_adapter(tmp_path / "in", tmp_path / "out", base)
    assert len(result["resumed"]) > 2 and result["rounding"] == expected


@pytest.mark.parametrize("layer", range(12))
def test_every_layer_is_checked_in_merging(tmp_path: Path, layer: int) -> None:
    """Also those that the sample of verified layers leaves out, of a model with more layers than it has."""
    sizes = {"num_hidden_layers": 4}
    model = adapted(
        tiny_llama(**sizes),
        gralora.LoraConfig(r=4, use_gralora=True, gralora_k=2, target_modules=["q_proj", "k_proj", "down_proj"]),
    )
    model.save_pretrained(tmp_path / "in")
    config, tensors = read(tmp_path / "in")
    name = sorted(name for name in tensors if "lora_A" in name)[layer]
    tensors[name].view(-1)[0] = (torch.nan, torch.inf, -torch.inf)[layer % 3]
    write(tmp_path / "in", config, tensors)
    base = base_of(tmp_path / "base", torch.float32, **sizes)
    named = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    with pytest.raises(ValueError, match=rf"1 of 24 tensors have NaN or infinite values: {named}\.lora_A"):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "in"]


def test_overflow_of_float16_is_refused(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in", lora_alpha=10_000_000)
    base = base_of(tmp_path / "base", torch.float16)
    with pytest.raises(ValueError, match="infinite values in torch.float16"):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", base)
    gralora.merge_adapter(tmp_path / "in", tmp_path / "out", base, dtype=torch.bfloat16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@few_cases
def test_safe_merge_notices(case: Case, kind: str, value: float) -> None:
    model = adapted(one_layer(case, kind), case_config(case))
    layer = only_layer(model)
    layer.lora_B["default"].weight.data.view(-1)[0] = value
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before) and not layer.merged


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_unmerging_leaves(dtype: torch.dtype) -> None:
    """PEFT subtracts what it added: a half-precision base comes back rounded, not bit for bit; unload() never adds."""
    case = Case(4, 20, 4, 64, 112)
    model = adapted(one_layer(case, "linear", dtype), case_config(case), autocast_adapter_dtype=False)
    weight = only_layer(model).get_base_layer().weight
    before = weight.clone()
    model.merge_adapter()
    largest = torch.maximum(before.abs(), weight.abs()).double()
    model.unmerge_adapter()
    off = (weight.double() - before.double()).abs()
    # two roundings, each of half a unit of the merged weight, or of dW's own
    assert (
        off <= 2.01 * torch.finfo(dtype).eps * (largest + only_layer(model).get_delta_weight("default").abs())
    ).all()
    assert not torch.equal(weight, before)
    untouched = adapted(one_layer(case, "linear", dtype), case_config(case))
    assert torch.equal(untouched.unload().layer.weight, before)
