"""`merge` of adapters of many architectures, against PEFT's merge_and_unload on the same model.

The models are tiny and made from configs. They are saved by transformers, which for many of them writes other names,
and other tensors, than the model has in memory.
"""

import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers import VOCAB, gralora_config, randomize
from peft import PeftModel
from torch import nn

import gralora
from gralora.checkpoints import merge
from gralora.checkpoints.adapter import NotByFiles
from gralora.seam import MERGES_DORA

TEXT = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "head_dim": 8}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
SEQ2SEQ = {"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
SEQ2SEQ |= {"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0}
T5 = {"vocab_size": VOCAB, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MLA |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
WHISPER = SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}

FAMILIES: dict[str, dict[str, Any]] = {  # class -> fields of its config
    "LlamaForCausalLM": TEXT,
    "MistralForCausalLM": TEXT,
    "Qwen2ForCausalLM": TEXT,
    "Qwen3ForCausalLM": TEXT | {"tie_word_embeddings": True},
    "GemmaForCausalLM": TEXT,
    "Gemma2ForCausalLM": TEXT,
    "Gemma3ForCausalLM": TEXT,
    "Phi3ForCausalLM": TEXT,
    "PhiForCausalLM": TEXT,
    "GPTNeoXForCausalLM": TEXT,
    "FalconForCausalLM": {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "StableLmForCausalLM": TEXT,
    "Starcoder2ForCausalLM": TEXT,
    "OlmoForCausalLM": TEXT,
    "Olmo2ForCausalLM": TEXT,
    "CohereForCausalLM": TEXT,
    "GraniteForCausalLM": TEXT,
    "MixtralForCausalLM": TEXT | MOE,
    "Qwen3MoeForCausalLM": TEXT | MOE,
    "OlmoeForCausalLM": TEXT | MOE,
    "DeepseekV3ForCausalLM": TEXT | MOE | MLA | {"num_key_value_heads": 2},
    "GPT2LMHeadModel": {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "OPTForCausalLM": TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "BloomForCausalLM": {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "BertForMaskedLM": TEXT,
    "RobertaForSequenceClassification": TEXT,
    "T5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": SEQ2SEQ,
    "WhisperForConditionalGeneration": WHISPER,
    "ViTForImageClassification": VISION,
    "CLIPModel": {"text_config": TEXT, "vision_config": VISION},
    "LlavaForConditionalGeneration": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": TEXT | {"model_type": "gemma3_text"},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "Mistral3ForConditionalGeneration": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
    },
}


def make_model(name: str, **fields: Any) -> nn.Module:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**FAMILIES[name] | fields)).eval()


def saved_adapter(model: nn.Module, folder: Path, **fields: Any) -> PeftModel:
    """The base model in `folder / "base"`, a random adapter in `folder / "adapter"`; returns the adapted model."""
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    adapted = randomize(peft.get_peft_model(model, gralora_config(**{"k": 2, "r": 4} | fields)))
    adapted.save_pretrained(folder / "adapter")
    return adapted


def assert_merged_as_by_peft(model: nn.Module, folder: Path, **fields: Any) -> dict[str, Any]:
    adapted = saved_adapter(model, folder, **fields)
    before = {name: t.clone() for name, t in adapted.get_base_model().state_dict().items()}
    report = gralora.merge_adapter(folder / "adapter", folder / "merged")
    read, info = type(model).from_pretrained(folder / "merged", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    expected = adapted.merge_and_unload().state_dict()
    found = read.state_dict()
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert any(name not in before or (t - before[name]).abs().max() > 1e-2 for name, t in expected.items())
    return report


# files whose tensors transformers renames, joins or splits when it reads them
RENAMED = {"MixtralForCausalLM", "LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"}
RENAMED |= {"Mistral3ForConditionalGeneration", "Qwen2VLForConditionalGeneration"}


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_layers(name, tmp_path):
    # of SigLIP's head, an nn.MultiheadAttention, only the whole can be adapted
    report = assert_merged_as_by_peft(
        make_model(name), tmp_path, target_modules="all-linear", exclude_modules=r".*vision_tower\.head.*"
    )
    assert report["layers"] >= 2 and report["verified"]
    in_memory = any("merged in memory" in notice for notice in report["notices"])
    assert in_memory or name not in RENAMED


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"])
@pytest.mark.parametrize("targets", [["q_proj"], []])
def test_experts(name, targets, tmp_path):
    model = make_model(name)
    report = assert_merged_as_by_peft(model, tmp_path, target_modules=targets, target_parameters=EXPERTS)
    assert "target_parameters" in report["notices"][0]


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPModel"])
def test_convolutions(name, tmp_path):
    target = "projection" if name.startswith("ViT") else "patch_embedding"
    convolution = next(n for n, m in make_model(name).named_modules() if isinstance(m, nn.Conv2d))
    assert convolution.endswith(target)
    fields = {"gralora_k_pattern": {target: 1}}  # of three channels
    report = assert_merged_as_by_peft(make_model(name), tmp_path, target_modules=[target, "q_proj"], **fields)
    assert "a convolution's factor" in report["notices"][0]


# Weights that several layers share

TOKENS = torch.randint(1, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


TIED = {
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "output layer saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both saved, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "output layer adapted": {"target_modules": ["q_proj", "lm_head"]},
    "both adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "both adapted, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [3, 5]},
    "tokens of the embedding": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
}


def randomize_others(adapted: PeftModel) -> None:
    """What is trained beside the factors: trained copies of modules, and of tokens."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                p.copy_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fields", TIED.values(), ids=TIED)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_embedding_and_output_layer(name, fields, tied, tmp_path):
    """The merged model, read as anybody reads it, says what the adapted one says."""
    model = make_model(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    base = logits(model).clone()
    config = gralora_config(**{"k": 2, "r": 4, "target_modules": ["q_proj"]} | fields)
    adapted = randomize(peft.get_peft_model(model, config))
    randomize_others(adapted)
    expected = logits(adapted)
    assert (expected - base).abs().max() > 0.01
    adapted.save_pretrained(tmp_path / "adapter")
    gralora.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    read, info = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(logits(read), expected, rtol=1e-4, atol=1e-4)
    loaded = gralora.load_adapter(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


RESIZED = {  # what is trained, and whether PEFT then saves both the embedding and the output layer
    "q_proj": ({}, True),
    "embedding adapted": ({"target_modules": ["embed_tokens"]}, False),
    "output layer adapted": ({"target_modules": ["lm_head"]}, False),
    "both adapted, tied": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
    "both saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "tokens": ({"trainable_token_indices": [3, VOCAB]}, True),
}


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fields, has_both", RESIZED.values(), ids=RESIZED)
def test_resized_vocabulary(fields, has_both, tied, tmp_path):
    """Tokens that were added before training are in the adapter's file, as PEFT saves them, and not in the base's.

    Where the file has one of two weights only, the other's new rows are nowhere: that base is refused.
    """
    model = make_model("LlamaForCausalLM", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(VOCAB + 4)
    model.save_pretrained(tmp_path / "resized")
    model.name_or_path = str(tmp_path / "base")
    adapted = randomize(peft.get_peft_model(model, gralora_config(2, 4, **{"target_modules": ["q_proj"]} | fields)))
    randomize_others(adapted)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    read = type(model).from_pretrained(tmp_path / "base")
    if not tied and not has_both:
        for use in (lambda: gralora.load_adapter(read, tmp_path / "adapter"), lambda: merged(tmp_path)):
            with pytest.raises(ValueError, match="lacks the weights of .* as it was trained on, with 36 tokens"):
                use()
        read.resize_token_embeddings(VOCAB + 4, mean_resizing=False)  # to other rows than those trained on
        read.save_pretrained(tmp_path / "other")
        for use in (
            lambda: gralora.load_adapter(read, tmp_path / "adapter"),
            lambda: merged(tmp_path, tmp_path / "other"),
        ):
            with pytest.raises(
                ValueError, match=r"is not what the adapter was trained on, in 4 rows from 32 on, and its"
            ):
                use()
        loaded = gralora.load_adapter(type(model).from_pretrained(tmp_path / "resized"), tmp_path / "adapter")
        found = [loaded, merged(tmp_path, tmp_path / "resized")]
    else:
        with pytest.raises(ValueError, match=r"resize_token_embeddings\(36\) before .* or let `gralora merge`"):
            gralora.load_adapter(read, tmp_path / "adapter")
        read.resize_token_embeddings(VOCAB + 4)
        found = [gralora.load_adapter(read, tmp_path / "adapter"), merged(tmp_path)]
        assert found[1].config.vocab_size == VOCAB + 4
    for one in found:
        torch.testing.assert_close(logits(one), expected, rtol=1e-4, atol=1e-4)


def merged(folder: Path, base: Path | None = None) -> Any:
    gralora.merge_adapter(folder / "adapter", folder / "merged", base)
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")


def test_tokens_beyond_the_vocabulary(tmp_path):
    """The file says which tokens, and not what else the vocabulary had: an error, not one of torch's indices."""
    model = make_model("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    model.resize_token_embeddings(VOCAB + 4)
    config = gralora_config(2, 4, target_modules=["q_proj"], trainable_token_indices=[VOCAB])
    randomize(peft.get_peft_model(model, config)).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match="does not fit the base model: index 32 is out of bounds"):
        merged(tmp_path)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "SwitchTransformersForConditionalGeneration"])
def test_encoder_decoders_that_scale_the_output_of_tied_weights(name, tmp_path, monkeypatch):
    """Untied, such a model may be another one: it says the same, or is refused."""
    monkeypatch.setitem(FAMILIES, "SwitchTransformersForConditionalGeneration", T5 | {"num_experts": 2})
    adapted = saved_adapter(make_model(name), tmp_path, target_modules=["q", "lm_head"])
    with torch.no_grad():
        expected = adapted.eval()(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
    try:
        gralora.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    except ValueError as error:
        assert name.startswith("Switch") and "is another model where" in str(error)
        assert not (tmp_path / "merged").exists()
        return
    read = getattr(transformers, name).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        found = read.eval()(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_another_model_is_refused(tmp_path):
    saved_adapter(make_model("LlamaForCausalLM"), tmp_path, target_modules=["gate_proj"])
    for name, reason in (("GPT2LMHeadModel", "lacks layers that the adapter has"), ("OPTForCausalLM", "lacks layers")):
        make_model(name).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=reason):
            gralora.merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / name)
    make_model("LlamaForCausalLM", intermediate_size=32).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match="size mismatch"):
        gralora.merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "wider")
    assert not (tmp_path / "merged").exists()


# In memory a weight is rounded once, too, and what that loses is reported


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_merged_in_memory_as_file_by_file(name, dtype, tmp_path, monkeypatch):
    """Of one adapter of linear layers: the same bits, and the same losses by layer, both ways."""
    model = make_model(name).to(torch.float32 if dtype else torch.bfloat16)
    saved_adapter(model, tmp_path, target_modules=["q_proj", "o_proj"])
    by_files = gralora.merge_adapter(tmp_path / "adapter", tmp_path / "files", dtype=dtype)
    monkeypatch.setattr(merge.Merges, "check_shared", lambda self: (_ for _ in ()).throw(NotByFiles("a test asks so")))
    in_memory = gralora.merge_adapter(tmp_path / "adapter", tmp_path / "memory", dtype=dtype)
    assert in_memory["notices"] == ["merged in memory, not file by file: a test asks so."] != by_files["notices"]
    one, other = (
        type(model).from_pretrained(tmp_path / out, dtype="auto").state_dict() for out in ("files", "memory")
    )
    assert one.keys() == other.keys() and all(
        torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one
    )
    assert in_memory["rounding"].keys() == by_files["rounding"].keys() and len(by_files["rounding"]) == 4
    for layer, losses in by_files["rounding"].items():
        assert losses["of_weight"] > 1e-5 and losses["of_update"] > 1e-5
        assert in_memory["rounding"][layer] == pytest.approx(losses, rel=1e-3)


def test_losses_of_experts_are_reported_with_a_warning(tmp_path):
    """An update that is small beside its weight's precision: experts, in bfloat16."""
    model = make_model("MixtralForCausalLM").bfloat16()
    targets = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapted = saved_adapter(model, tmp_path, **targets)
    with torch.no_grad():
        for parameter_name, p in adapted.named_parameters():
            if "lora_B" in parameter_name:
                p.mul_(1e-4)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.warns(
        UserWarning, match="rounding the merged weights lost more than 10% of the update in 4 of 4 layers"
    ):
        report = gralora.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    layers = {f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")}
    assert set(report["rounding"]) == layers
    assert "linear layers only" in report["notices"][0] and "gralora merge" not in report["notices"][0]


# The base's own embedding and output layer, which PEFT saves with the adapter

SAVED = {
    "output layer adapted": {"target_modules": ["q_proj", "lm_head"]},
    "more tokens": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", SAVED)
def test_weights_of_the_base_in_an_adapter_are_read_and_not_exported(case, tied, tmp_path):
    """load_adapter sets them, as PEFT does; for vLLM they are left out, if they are those of the base."""
    model = make_model("LlamaForCausalLM", tie_word_embeddings=tied)
    if case == "more tokens":
        model.save_pretrained(tmp_path / "small")
        model.name_or_path = str(tmp_path / "small")
        model.resize_token_embeddings(VOCAB + 4)
    model.save_pretrained(tmp_path / "base")
    if case != "more tokens":
        model.name_or_path = str(tmp_path / "base")
    adapted = randomize(peft.get_peft_model(model, gralora_config(k=2, r=4, **SAVED[case])))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    read = type(model).from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(gralora.load_adapter(read, tmp_path / "adapter")), expected, rtol=0, atol=1e-5)
    report = gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "vllm", base=tmp_path / "base")
    assert "left out" in report["notices"][0] and "base model's own" in report["notices"][0]
    read = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), str(tmp_path / "out"))
    torch.testing.assert_close(logits(read), expected, rtol=1e-4, atol=1e-4)
    make_model("LlamaForCausalLM", tie_word_embeddings=tied, initializer_range=0.5).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="gralora merge.* writes them into the model"):
        gralora.to_lora(tmp_path / "adapter", tmp_path / "out2", "vllm", base=tmp_path / "other")


# What a refusal recommends is not refused

REFUSED_FOR_VLLM = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [3, 5]},
    "use_dora": {"use_dora": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
    "target_parameters": {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]},
    "ensure_weight_tying": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("name", REFUSED_FOR_VLLM)
def test_the_advice_of_refusals_works(name, tmp_path):
    """Every field that the export for vLLM refuses, with what its message says to do instead, done."""
    if name == "use_dora" and not MERGES_DORA:
        pytest.skip("GraLoRA refuses DoRA with this PEFT")
    fields = {"target_modules": ["o_proj", "q_proj"]} | REFUSED_FOR_VLLM[name]
    model = make_model("Starcoder2ForCausalLM" if "bias" in name else "LlamaForCausalLM", tie_word_embeddings=False)
    saved_adapter(model, tmp_path, **fields)
    with pytest.raises(ValueError) as refused:
        gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "vllm")
    advice = str(refused.value)
    assert ("gralora merge" in advice) != ("use --for peft" in advice), advice
    if "use --for peft" in advice:
        gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "peft")
    else:
        gralora.merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert any((tmp_path / "out").glob("*.safetensors"))


LINES = {  # class, task -> what the line for PEFT loads the files with
    ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"): "AutoPeftModelForSeq2SeqLM",
    ("T5ForConditionalGeneration", None): "PeftModel",
    ("LlamaForCausalLM", "CAUSAL_LM"): "AutoPeftModelForCausalLM",
    ("LlamaForCausalLM", None): "PeftModel",
    ("RobertaForSequenceClassification", "SEQ_CLS"): "AutoPeftModelForSequenceClassification",
    ("ViTForImageClassification", None): "PeftModel",
}


@pytest.mark.parametrize("name, task", LINES)
def test_the_line_for_peft_loads_the_files(name, task, tmp_path):
    """By the task, or by the class where no task was said; it is run as it is printed."""
    adapted = saved_adapter(make_model(name), tmp_path, target_modules="all-linear", task_type=task)
    words = shlex.split(gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "peft")["command"])
    assert words[:2] == ["python", "-c"] and f"import {LINES[name, task]} as M" in words[2]
    found: dict[str, Any] = {}
    exec(words[2].replace("; M.", "; found = M."), found)
    assert type(found["found"].get_base_model()) is type(adapted.get_base_model())
    merged, expected = (one.merge_and_unload().state_dict() for one in (found["found"], adapted))
    for tensor, t in expected.items():
        torch.testing.assert_close(merged[tensor], t, rtol=0, atol=1e-5)


def test_the_modelfile_of_ollama_has_an_absolute_path(tmp_path, monkeypatch):
    """Ollama reads a relative one from the Modelfile's folder, and a Hub id as a name of its own registry."""
    saved_adapter(make_model("LlamaForCausalLM"), tmp_path, target_modules=["q_proj"])
    monkeypatch.chdir(tmp_path)
    gralora.to_lora("adapter", "out", "ollama", base="base")
    assert (tmp_path / "out" / "Modelfile").read_text().startswith(f"FROM {tmp_path / 'base'}\n")
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
    gralora.to_lora("adapter", "out2", "ollama", base="someone/something", base_config=config)
    comment, source, _ = (tmp_path / "out2" / "Modelfile").read_text().splitlines()
    assert comment.startswith("#") and "someone/something" in comment and source == "FROM BASE_MODEL"
