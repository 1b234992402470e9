"""PEFT's features on GraLoRA adapters: each works as on LoRA, or raises an error that says why. docs/peft-features.md
lists them all, with their tests, which are here and in the files about layers and checkpoints.
"""

from pathlib import Path

import peft
import pytest
import torch
from helpers import MODELS, adapted, gralora_config
from peft import PeftModel
from saved import edit, logits, read, save_gralora

import gralora

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
