"""Experts and convolutions, and layers that a program fuses, as the plain LoRA in the form that each program takes."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from saved import edit
from test_families import FAMILIES, TOKENS, make_model, saved_adapter
from torch import Tensor

import gralora
from gralora.checkpoints import peft_files
from gralora.checkpoints.in_memory import skeleton

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MOES = ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "DeepseekV3ForCausalLM"]
BLOCK = {"MixtralForCausalLM": ("block_sparse_moe", "w1", "w3", "w2")}
PREFIX = "base_model.model."


def deltas(adapted: PeftModel) -> dict[str, Tensor]:
    """dW of each adapted parameter, by the difference that PEFT's merge makes."""
    before = {name: p.detach().clone() for name, p in adapted.get_base_model().named_parameters()}
    merged = adapted.merge_and_unload()
    after = dict(merged.named_parameters())
    plain = {name.replace(".base_layer", ""): t for name, t in before.items() if ".lora_" not in name}
    return {name: after[name].detach() - t for name, t in plain.items() if not torch.equal(after[name], t)}


def product(tensors: dict[str, Tensor], layer: str) -> Tensor:
    A, B = (tensors[f"{PREFIX}{layer}.lora_{factor}.weight"] for factor in "AB")
    return (B.flatten(1) @ A.flatten(1)).view(len(B), *A.shape[1:])


@pytest.mark.parametrize("hybrid_r", [0, 2])
@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("name", MOES)
def test_experts_for_peft(name, parameters, hybrid_r, tmp_path):
    """Stock LoRA layers over experts give the merged weights that GraLoRA gives, beside attention."""
    fields = {"r": 8, "hybrid_r": hybrid_r, "lora_alpha": 12, "target_modules": ["o_proj"]}
    adapted = saved_adapter(make_model(name), tmp_path, target_parameters=parameters, **fields)
    report = gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "peft", base=tmp_path / "base")
    assert report["rank"] == 2 * (8 - hybrid_r) + hybrid_r and report["parity"]["relative_difference"] < 1e-6
    assert report["logits"]["max_difference"] < 1e-4 < report["logits"]["max_logit"]
    read = PeftModel.from_pretrained(make_model(name), str(tmp_path / "out"))
    assert not read.peft_config["default"].use_gralora
    expected, found = deltas(adapted), deltas(read)
    assert expected.keys() == found.keys() and any("experts" in n for n in found)
    for parameter, dW in expected.items():
        torch.testing.assert_close(found[parameter], dW, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("name", MOES)
def test_experts_one_by_one(name, parameters, target, tmp_path):
    """A pair for each projection of each expert, under the names in the base's files; zeros complete a layer."""
    adapted = saved_adapter(make_model(name), tmp_path, target_parameters=parameters, target_modules=[], r=8)
    gralora.to_lora(tmp_path / "adapter", tmp_path / "out", target, base=tmp_path / "base")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    block, gate, up, down = BLOCK.get(name, ("mlp", "gate_proj", "up_proj", "down_proj"))
    if target == "sglang":  # which has these names for all models
        gate, up, down = "gate_proj", "up_proj", "down_proj"
    expected = deltas(adapted)
    layers = {n.split(".mlp.")[0] for n in expected}
    assert len(layers) == (1 if name.startswith("Deepseek") else 2)
    assert len(tensors) == len(layers) * 4 * 3 * 2
    for layer in layers:
        gate_up, downs = (expected.get(f"{layer}.mlp.experts.{n}") for n in ("gate_up_proj", "down_proj"))
        for e in range(4):
            place = f"{layer}.{block}.experts.{e}"
            found = torch.cat([product(tensors, f"{place}.{n}") for n in (gate, up)])
            wanted = torch.zeros_like(found) if gate_up is None else gate_up[e]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            found = product(tensors, f"{place}.{down}")
            torch.testing.assert_close(
                found, torch.zeros_like(found) if downs is None else downs[e], rtol=1e-4, atol=1e-5
            )


def test_rank_of_an_expert_by_its_parameters_name(tmp_path):
    """rank_pattern and alpha_pattern name parameters, while the file names PEFT's wrappers."""
    patterns = {"rank_pattern": {"experts.down_proj": 4}, "alpha_pattern": {"experts.gate_up_proj": 3}}
    model = make_model("Qwen3MoeForCausalLM")
    adapted = saved_adapter(model, tmp_path, target_parameters=EXPERTS, target_modules=[], r=8, **patterns)
    report = gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "peft")
    assert report["rank"] == 16 and report["parity"]["relative_difference"] < 1e-6
    expected = deltas(adapted)
    found = deltas(PeftModel.from_pretrained(make_model("Qwen3MoeForCausalLM"), str(tmp_path / "out")))
    assert expected.keys() == found.keys()
    for parameter, dW in expected.items():
        torch.testing.assert_close(found[parameter], dW, rtol=1e-4, atol=1e-5)


def test_experts_that_vllm_reads_in_one(tmp_path, monkeypatch):
    """GPT-OSS: PEFT's own layout, gate_up_proj under `experts.base_layer`, and both or none."""
    monkeypatch.setitem(FAMILIES, "GptOssForCausalLM", FAMILIES["MixtralForCausalLM"])
    model = make_model("GptOssForCausalLM")
    saved_adapter(model, tmp_path, target_parameters=EXPERTS, target_modules=["q_proj"], r=8)
    gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "vllm", base=tmp_path / "base")
    gralora.to_lora(tmp_path / "adapter", tmp_path / "plain", "peft")
    ours, pefts = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("out", "plain"))
    assert ours.keys() == pefts.keys() and all(torch.equal(ours[n], pefts[n]) for n in ours)
    names = [n for n in ours if "layers.0.mlp" in n]
    assert len(names) == 4 and sum(".experts.base_layer.lora_" in n for n in names) == 2
    with pytest.raises(
        ValueError, match="sglang reads adapters of this base model's experts is not known.*gralora merge"
    ):
        gralora.to_lora(tmp_path / "adapter", tmp_path / "no", "sglang", base=tmp_path / "base")
    saved_adapter(make_model("GptOssForCausalLM"), tmp_path / "one", target_parameters=EXPERTS[1:], target_modules=[])
    with pytest.raises(ValueError, match="only if gate_up_proj and down_proj both have one.*gralora merge"):
        gralora.to_lora(tmp_path / "one" / "adapter", tmp_path / "no", "vllm", base=tmp_path / "one" / "base")


@pytest.mark.parametrize("target", ["vllm", "sglang", "mlx"])
def test_the_base_must_be_known_for_experts(target, tmp_path):
    """As the refusal says: with the base's config.json the same adapter is exported."""
    saved_adapter(make_model("MixtralForCausalLM"), tmp_path, target_parameters=EXPERTS, target_modules=[], r=8)
    (tmp_path / "base" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(
        ValueError, match=f"{target} takes the experts of each base model under other names: give --base"
    ):
        gralora.to_lora(tmp_path / "adapter", tmp_path / "out", target)
    gralora.to_lora(tmp_path / "adapter", tmp_path / "out", target, base=tmp_path)


def test_experts_for_mlx(tmp_path):
    adapted = saved_adapter(
        make_model("MixtralForCausalLM"), tmp_path, target_parameters=EXPERTS, target_modules=[], r=8
    )
    report = gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "mlx", base=tmp_path / "base")
    assert report["parity"]["relative_difference"] < 1e-6
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    assert len(tensors) == 2 * 3 * 2
    for name, dW in deltas(adapted).items():
        place = name.replace("mlp.experts", "block_sparse_moe.switch_mlp").rpartition(".")[0]
        parts = ["gate_proj", "up_proj"] if name.endswith("gate_up_proj") else ["down_proj"]
        found = torch.cat([tensors[f"{place}.{p}.lora_b"] @ tensors[f"{place}.{p}.lora_a"] for p in parts], dim=1)
        torch.testing.assert_close(found, dW, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hybrid_r", [0, 2])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "WhisperForConditionalGeneration"])
def test_convolutions_for_peft(name, hybrid_r, tmp_path):
    """Stock LoRA layers of convolutions, of one and two dimensions; other programs take none, and say to merge."""
    targets = {"V": ["projection", "q_proj"], "W": ["conv1", "conv2", "q_proj"]}[name[0]]
    patterns = {"gralora_k_pattern": {"projection": 1}} if name[0] == "V" else {}
    fields = {"r": 8, "hybrid_r": hybrid_r, "target_modules": targets}
    adapted = saved_adapter(make_model(name), tmp_path, **fields, **patterns)
    report = gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "peft", base=tmp_path / "base")
    assert report["parity"]["relative_difference"] < 1e-6 and report["logits"] is None
    assert "no logits are compared" in report["notices"][-1]
    for target in ("vllm", "sglang", "mlx", "llamacpp", "ollama"):
        with pytest.raises(ValueError, match=f"{target} takes no adapters of convolutions.*`gralora merge` writes"):
            gralora.to_lora(tmp_path / "adapter", tmp_path / "no", target)
    gralora.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    found = deltas(PeftModel.from_pretrained(make_model(name), str(tmp_path / "out")))
    expected = deltas(adapted)
    assert expected.keys() == found.keys() and any("conv" in n or "projection" in n for n in found)
    for parameter, dW in expected.items():
        torch.testing.assert_close(found[parameter], dW, rtol=1e-4, atol=1e-5)


# Layers that SGLang fuses

LONE: dict[str, list[str]] = {
    "q": ["q_proj"],
    "q, k": ["q_proj", "k_proj"],
    "k": ["k_proj"],
    "v": ["v_proj", "o_proj"],
    "q, v": ["q_proj", "v_proj"],
    "gate": ["gate_proj"],
    "up": ["up_proj", "down_proj"],
    "up, k": ["up_proj", "k_proj"],
}


@pytest.mark.parametrize("fields", [{}, {"layers_to_transform": [1]}], ids=["all", "one layer"])
@pytest.mark.parametrize("lone", LONE)
def test_sglang_gets_whole_groups(lone, fields, tmp_path):
    """With zeros for the layers that are fused with adapted ones; it computes what the files for PEFT compute."""
    model = make_model("LlamaForCausalLM")
    adapted = saved_adapter(model, tmp_path, target_modules=LONE[lone], **fields)
    report = gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "sglang", base=tmp_path / "base")
    assert report["logits"]["max_difference"] < 1e-4
    gralora.to_lora(tmp_path / "adapter", tmp_path / "plain", "peft")
    ours, pefts = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("out", "plain"))
    assert all(torch.equal(ours[name], t) for name, t in pefts.items())
    layers = {name.rpartition(".lora_")[0] for name in ours}
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        parents = {layer.rpartition(".")[0] for layer in layers if layer.rpartition(".")[2] in group}
        assert all(f"{parent}.{name}" in layers for parent in parents for name in group)
    added = ours.keys() - pefts.keys()
    for name in added:
        layer = adapted.get_base_model().get_submodule(name.removeprefix(PREFIX).rpartition(".lora_")[0])
        wanted = (report["rank"], layer.in_features) if "lora_A" in name else (layer.out_features, report["rank"])
        assert not ours[name].any() and tuple(ours[name].shape) == wanted
    assert added
    read = PeftModel.from_pretrained(make_model("LlamaForCausalLM"), str(tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(read(TOKENS).logits, adapted(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_whole_groups_need_no_base(tmp_path):
    saved_adapter(make_model("LlamaForCausalLM"), tmp_path, target_modules="all-linear")
    (tmp_path / "base" / "config.json").unlink()
    gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "sglang")
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 2 * 2 * 7


def test_zeros_need_the_bases_sizes(tmp_path):
    """The base that the adapter names serves, if it is there; else --base does, as the refusal says."""
    saved_adapter(make_model("LlamaForCausalLM"), tmp_path, target_modules=["q_proj", "v_proj"])
    gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "sglang")
    (tmp_path / "base" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(ValueError, match="sglang fuses k_proj with layers.*v_proj.*give --base FOLDER"):
        gralora.to_lora(tmp_path / "adapter", tmp_path / "out2", "sglang")
    gralora.to_lora(tmp_path / "adapter", tmp_path / "out2", "sglang", base=tmp_path)
    ours = [load_file(tmp_path / out / "adapter_model.safetensors") for out in ("out", "out2")]
    assert ours[0].keys() == ours[1].keys() and len(ours[0]) == 2 * 2 * 3


def test_models_that_are_fused_already_get_nothing(tmp_path):
    """Phi-3 has qkv_proj and gate_up_proj; GPT-NeoX other names."""
    for name, targets in {"Phi3ForCausalLM": ["qkv_proj", "gate_up_proj"], "GPTNeoXForCausalLM": ["dense"]}.items():
        saved_adapter(make_model(name), tmp_path / name, target_modules=targets)
        report = gralora.to_lora(tmp_path / name / "adapter", tmp_path / name / "out", "sglang")
        tensors = load_file(tmp_path / name / "out" / "adapter_model.safetensors")
        assert len(tensors) == 2 * len(report["parity"]["layers"])


def test_a_base_that_wraps_the_trained_model_is_named(tmp_path):
    """As of Gemma 3 with images, whose text model alone was trained: vLLM would serve the base without a word."""
    text = make_model("Gemma3ForCausalLM")
    saved_adapter(text, tmp_path, target_modules=["q_proj", "k_proj", "v_proj"])
    make_model("Gemma3ForConditionalGeneration").save_pretrained(tmp_path / "wrapped")
    for target in ("vllm", "sglang"):
        edit(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
        assert gralora.to_lora(tmp_path / "adapter", tmp_path / target, target)["notices"] == []
        edit(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "wrapped"))
        (notice,) = gralora.to_lora(tmp_path / "adapter", tmp_path / f"{target}2", target)["notices"]
        assert "Gemma3ForConditionalGeneration" in notice and "model.layers.0.self_attn" in notice
        assert f"{target} ignores layers" in notice


def test_layers_that_share_values_get_zeros_of_the_keys_size(tmp_path, monkeypatch):
    """A layer of the model without v_proj, as where keys and values are shared: SGLang wants one all the same."""
    saved_adapter(make_model("LlamaForCausalLM"), tmp_path, target_modules=["q_proj", "k_proj"])

    def without_v(config, layers):
        model = skeleton(config, layers)
        del model.model.layers[1].self_attn.v_proj
        return model

    monkeypatch.setattr(peft_files, "skeleton", without_v)
    gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "sglang")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for i in (0, 1):
        k, v = (tensors[f"{PREFIX}model.layers.{i}.self_attn.{n}_proj.lora_B.weight"] for n in "kv")
        assert v.shape == k.shape and k.any() and not v.any()
