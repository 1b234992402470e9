"""Adapters whose initialisation changes the base weights: saved, loaded, converted, merged; and EVA through PEFT."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import TARGETS, OneLayer, adapted, adapter_layers, gralora_config, randomize, tiny_llama, token_ids
from kinds_table import FEW, Kind
from peft import EvaConfig, LoraGAConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from saved import logits
from torch import nn

import gralora
from gralora.blocks import blocks_of_A, join_blocks, split_blocks
from gralora.checkpoints.convert import convert_adapter
from gralora.checkpoints.export import to_lora
from gralora.checkpoints.load import load_adapter
from gralora.checkpoints.merge import merge_adapter
from gralora.seam import MERGES_DORA

LOFTQ = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
REPEATABLE: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_2": {"init_lora_weights": "pissa_niter_2"},
    "olora": {"init_lora_weights": "olora", "use_dora": MERGES_DORA},
    "mica": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 10},
    "loftq": LOFTQ,
}
CONVERTED: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa", "gralora_scaling": "matched", "modules_to_save": ["lm_head"]},
    "olora": {"init_lora_weights": "olora", "use_rslora": True, "use_dora": MERGES_DORA},
    "corda": {"init_lora_weights": "corda", "rank_pattern": {"q_proj": 12}},
    "lora_ga": {"init_lora_weights": "lora_ga", "r": 6, "lora_ga_config": LoraGAConfig()},
}


def base() -> nn.Module:
    return tiny_llama()


def started(**fields: Any) -> PeftModel:
    """A model whose adapter has just been initialised."""
    model, ids = base(), token_ids(4, 8)
    config = gralora_config(**{"k": 2, "r": 8, "hybrid_r": 2, "target_modules": TARGETS["llama"]} | fields)
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, lambda: [model(row[None]) for row in ids])
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(model, config, lambda: model(ids, labels=ids).loss.backward())
    return get_peft_model(model, config)


def trained(folder: Path, **fields: Any) -> PeftModel:
    """The same after training, of a kind; how it was before is saved in `folder`."""
    model = started(**fields)
    model.save_pretrained(folder)
    return randomize(model).eval()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", REPEATABLE)
def test_saved_adapter_finds_the_weights_that_it_was_trained_on(name: str, tmp_path: Path) -> None:
    """The base weights are changed anew, the same way: by PEFT, also without memory for the factors, and by us."""
    model = trained(tmp_path / "initial", **REPEATABLE[name])
    model.save_pretrained(tmp_path / "end")
    loaded = [
        PeftModel.from_pretrained(base(), tmp_path / "end"),
        PeftModel.from_pretrained(base(), tmp_path / "end", low_cpu_mem_usage=True),
        load_adapter(base(), tmp_path / "end"),
    ]
    expected = logits(model)
    plain = logits(base())
    assert (expected - plain).abs().max() > 1e-2
    for other in loaded:
        torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_adapter_is_for_the_original_weights(name: str, tmp_path: Path) -> None:
    """What path_initial_model_for_weight_conversion writes does to the original model what training did."""
    model = trained(tmp_path / "initial", **CONVERTED[name])
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert list(model.peft_config) == ["default"]
    original = base()
    before = weights(original)
    loaded = load_adapter(original, tmp_path / "end")
    assert loaded.peft_config["default"].r == 2 * CONVERTED[name].get("r", 8)
    assert loaded.peft_config["default"].init_lora_weights is True
    kept = {n: p for n, p in loaded.get_base_model().named_parameters() if n.endswith("base_layer.weight")}
    assert kept and all(torch.equal(p, before[n.replace(".base_layer", "")]) for n, p in kept.items())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    exported = to_lora(tmp_path / "end", tmp_path / "plain") if name != "pissa" else None
    if exported is not None:
        plain = PeftModel.from_pretrained(base(), tmp_path / "plain")
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_conversion_for_every_kind_of_layer(kind: Kind, tmp_path: Path) -> None:
    """Grids of whatever layout are joined block by block, beside a hybrid part that stays."""
    config, x = kind.config(2, 6, 2, init_lora_weights="pissa"), kind.x()
    model = get_peft_model(kind.build(), config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path / "initial")
    randomize(model).eval()
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded = PeftModel.from_pretrained(kind.build(), tmp_path / "end", autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-10)
    assert not torch.allclose(loaded(x), kind.build()(x))


def test_conversion_that_cannot_be(tmp_path: Path) -> None:
    """A hybrid_r that k does not divide, and LoftQ, whose quantised weights no adapter makes good."""
    model = get_peft_model(base(), gralora_config(2, 7, 3, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match=r"q_proj' the rank that is left to the grid, 2 \* 7 - 3.*gralora_k=2"):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    model = trained(tmp_path / "loftq", **LOFTQ)
    with pytest.raises(ValueError, match="'loftq' took from them in quantising"):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "loftq"))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["corda", "lora_ga"])
def test_loading_without_what_the_initialisation_took_from_data(name: str, tmp_path: Path) -> None:
    """An error that says how to save the adapter, and the model is as it was; PEFT's LoRA-GA loads a wrong model."""
    model = trained(tmp_path / "initial", **CONVERTED[name])
    model.save_pretrained(tmp_path / "end")
    for load in (PeftModel.from_pretrained, load_adapter):
        original = base()
        before = weights(original)
        with pytest.raises(ValueError, match=f"'{name}'.*saved with path_initial_model_for_weight_conversion"):
            load(original, tmp_path / "end")
        assert weights(original).keys() == before.keys()
        assert all(torch.equal(p, before[n]) for n, p in original.named_parameters())


def test_failed_load_leaves_the_weights_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of layers that had been changed already."""
    trained(tmp_path / "initial", **REPEATABLE["pissa"]).save_pretrained(tmp_path / "end")
    monkeypatch.setattr("gralora.checkpoints.load.set_peft_model_state_dict", lambda *args: 1 / 0)
    original = base()
    before = weights(original)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        load_adapter(original, tmp_path / "end")
    assert all(torch.equal(p, before[n]) for n, p in original.named_parameters())


def test_merge_and_exports_of_an_adapter_for_changed_weights(tmp_path: Path) -> None:
    """Merging changes the weights and merges; what would write A and B alone says why not, and what to do."""
    model = trained(tmp_path / "initial", **REPEATABLE["pissa"])
    model.save_pretrained(tmp_path / "end")
    base().save_pretrained(tmp_path / "base")
    report = merge_adapter(tmp_path / "end", tmp_path / "merged", tmp_path / "base")
    assert "init_lora_weights='pissa' changes the base weights first" in report["notices"][0]
    merged = type(base()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    for write in (
        lambda: to_lora(tmp_path / "end", tmp_path / "plain"),
        lambda: to_lora(model, tmp_path / "plain"),
        lambda: convert_adapter(tmp_path / "end", tmp_path / "peft", to="peft"),
    ):
        with pytest.raises(ValueError, match="'pissa' changed.*gralora merge.*path_initial_model_for_weight"):
            write()
    assert not (tmp_path / "plain").exists() and not (tmp_path / "peft").exists()
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(merged), rtol=1e-4, atol=1e-4)


def test_other_adapters_are_not_made_of_one_for_changed_weights(tmp_path: Path) -> None:
    """Neither by weights, nor by PEFT's conversion, nor by a hotswap."""
    model = trained(tmp_path / "initial", **REPEATABLE["pissa"])
    with pytest.raises(ValueError, match=r"\['default'\] belong to base weights.*path_initial_model_for_weight"):
        model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")
    with pytest.raises(TypeError, match="support LoRA conversion"):
        peft.convert_to_lora(model, rank=2)
    other = adapted(base(), gralora_config(2, 8, 2, target_modules=TARGETS["llama"]))
    with pytest.raises(ValueError, match="init_lora_weights='pissa'.*belong to other base weights"):
        gralora.hotswap_adapter(other, tmp_path / "initial", "default")


def test_weighted_sum_of_an_adapter_that_left_the_weights_alone() -> None:
    """The plain LoRA that stands in for it is drawn as usual, whatever the initialisation was."""
    for init in ("mica", "eva"):
        model = randomize(started(init_lora_weights=init)).eval()
        expected = logits(model)
        model.float().add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")
        model.set_adapter("sum")
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


# Quantised bases


class Quantised(nn.Module):
    """A layer that bitsandbytes has quantised to 4 bits, and what transformers says of such a model."""

    is_loaded_in_4bit = True

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bnb = pytest.importorskip("bitsandbytes")
        self.layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32)
        self.layer.load_state_dict(linear.state_dict())
        self.layer.to("cpu")
        self.layer.support_avx512bf16_for_cpu = False  # which would repack it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:Unmerge lora module")
def test_olora_of_a_4_bit_base() -> None:
    """With k = 1 it is PEFT's; with k = 2 the quantised rest and dW are as close to what they were."""
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 64), torch.randn(300, 128)
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 8, "target_modules": ["layer"], "init_lora_weights": "olora"}
    configs = [
        peft.LoraConfig(**fields),
        *(gralora.LoraConfig(use_gralora=True, gralora_k=k, **fields) for k in (1, 2)),
    ]
    expected = Quantised(linear)(x)
    outputs = [get_peft_model(Quantised(linear), config)(x).detach() for config in configs]
    assert (outputs[1] - outputs[0]).norm() < 1e-3 * expected.norm()
    errors = [((y - expected).norm() / expected.norm()).item() for y in outputs]
    assert errors[2] < 1.1 * errors[0] < 0.2
    with pytest.raises(ValueError, match="init_lora_weights='pissa'.*'layer': its weight is quantised"):
        get_peft_model(
            Quantised(linear), gralora.LoraConfig(use_gralora=True, **fields | {"init_lora_weights": "pissa"})
        )


def test_loftq_of_a_4_bit_base(tmp_path: Path) -> None:
    """Each block of dW is the best approximation of what quantising took from the block; a callback may refuse it."""
    torch.manual_seed(0)
    linear, config = (
        nn.Linear(128, 64),
        gralora.LoraConfig(use_gralora=True, gralora_k=2, r=10, hybrid_r=2, lora_alpha=16, target_modules=["layer"]),
    )
    save_file({"layer.weight": linear.weight.detach().clone()}, tmp_path / "model.safetensors")
    model = get_peft_model(Quantised(linear), config)
    (layer,) = adapter_layers(model)
    lost = linear.weight.detach() - dequantize_module_weight(layer.base_layer)
    seen: list[str] = []
    gralora.replace_lora_weights_loftq(
        model, tmp_path / "model.safetensors", callback=lambda _, name: seen.append(name)
    )
    assert seen == ["layer"] and not layer.get_delta_weight("default").count_nonzero()
    gralora.replace_lora_weights_loftq(model, tmp_path / "model.safetensors")
    U, S, Vh = torch.linalg.svd(split_blocks(lost, 2), full_matrices=False)
    best = join_blocks(U[..., :4] * S[..., None, :4] @ Vh[..., :4, :])
    torch.testing.assert_close(layer.get_delta_weight("default"), best, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="no quantised layer.*use init_lora_weights='loftq'"):
        gralora.replace_lora_weights_loftq(started(), tmp_path / "model.safetensors")
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="have no 'layer.weight'"):
        gralora.replace_lora_weights_loftq(model, tmp_path / "other.safetensors")


# EVA


def eva(config: peft.LoraConfig, layer: nn.Linear, x: torch.Tensor, **options: Any) -> tuple[PeftModel, Any]:
    torch.manual_seed(0)
    model = get_peft_model(OneLayer(layer), config, **options)
    initialize_lora_eva_weights(
        model,
        [x] * 4,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: inputs[0],
        show_progress_bar=False,
    )
    (adapter_layer,) = adapter_layers(model)
    return model, adapter_layer


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_eva_gives_every_block_the_components_of_its_chunk(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    """Those that PEFT's EVA gives a LoRA of the block's rank whose input is the chunk alone."""
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(4)) * torch.linspace(3, 0.2, 16)
    fields: dict[str, Any] = {"target_modules": ["layer"], "init_lora_weights": "eva"}
    layer = nn.Linear(16, 24)
    before = layer.weight.detach().clone()
    model, adapter = eva(gralora_config(2, 9, 3, **fields), layer, x, low_cpu_mem_usage=low_cpu_mem_usage)
    A, B, hybrid_A, hybrid_B, _ = adapter.factors("default")
    for i, chunk in enumerate(x.chunk(2, -1)):
        plain = peft.LoraConfig(r=3, eva_config=EvaConfig(rho=1.0), **fields)
        _, expected = eva(plain, nn.Linear(8, 24), chunk.contiguous())
        for j in range(2):
            torch.testing.assert_close(blocks_of_A(A)[j, i], expected.lora_A["default"].weight, rtol=0, atol=1e-4)
    assert not B.count_nonzero() and not hybrid_B.count_nonzero() and hybrid_A.count_nonzero()
    assert torch.equal(adapter.base_layer.weight, before)
    randomize(model).save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(OneLayer(layer), tmp_path)(x), model(x))


def test_eva_of_a_model_by_its_tokens() -> None:
    """With PEFT's defaults for language models: padding is left out, and layers of one input get the same A."""
    model = started(init_lora_weights="eva")
    ids = token_ids(8, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    initialize_lora_eva_weights(model, [batch] * 2, show_progress_bar=False)
    layers = model.get_base_model().model.layers[0].self_attn
    A = [blocks_of_A(layer.factors("default").A) for layer in (layers.q_proj, layers.k_proj)]
    assert torch.equal(*A)
    torch.testing.assert_close(A[0] @ A[0].mT, torch.eye(3).expand(2, 2, 3, 3), rtol=0, atol=1e-4)


def test_eva_components_of_whole_inputs_are_refused() -> None:
    """Those that PEFT found for a plain LoRA have no place in a grid."""
    model = started(init_lora_weights="eva")
    found = {name: torch.zeros(8, 16) for name, _ in model.named_modules()}
    with pytest.raises(ValueError, match=r"shape \(2, 3, .*initialize_lora_eva_weights the dataloader"):
        initialize_lora_eva_weights(model, eva_state_dict=found)


def test_loss_of_split_and_join() -> None:
    """The blocks of a matrix in their places."""
    matrix = torch.arange(24).view(4, 6)
    assert torch.equal(split_blocks(matrix, 2)[1, 0], matrix[2:, :3])
