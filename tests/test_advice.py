"""The advice of every refusal in `gralora.checkpoints`, followed: what it says to do instead works.

A case names the words of a refusal that give advice, brings it about, and does what they say. The last test reads the
source: a refusal that gives advice and is in no case fails it.
"""

import json
import re
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from advice import Cases, check_all_are_followed, follow, refusals, refused, register_in
from helpers import gralora_config, randomize, tiny_llama
from safetensors.torch import load_file, save_file
from saved import CONFIG, WEIGHTS, edit, logits, read, save, save_gralora, write
from test_families import FAMILIES, TOKENS, make_model, saved_adapter

import gralora
from gralora.checkpoints import files
from gralora.checkpoints.targets import TARGETS
from gralora.seam import MERGES_DORA
from gralora.tool import cli

SOURCE = Path(gralora.__file__).parent / "checkpoints"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES: Cases = {}
pytestmark = pytest.mark.filterwarnings("ignore")
case = register_in(CASES)


def llama(folder: Path, **fields: Any) -> peft.PeftModel:
    """A Llama in `folder / "base"`, and its random adapter in `folder / "adapter"`."""
    return saved_adapter(make_model("LlamaForCausalLM", tie_word_embeddings=False), folder, **fields)


def merges(adapter: Path, out: Path, **options: Any) -> None:
    gralora.merge_adapter(adapter, out, **options)
    assert transformers.AutoConfig.from_pretrained(out)


# What an adapter has


@case("`gralora merge` merges it into a base model that transformers can load")
def _(path):
    llama(path, target_modules=["embed_tokens", "q_proj"])
    for tool in (gralora.inspect_adapter, lambda adapter: gralora.to_lora(adapter, path / "out")):
        with refused("gralora merge", "gralora.load_adapter"):
            tool(path / "adapter")
    merges(path / "adapter", path / "merged")
    gralora.load_adapter(make_model("LlamaForCausalLM"), path / "adapter")


@case("takes nothing but A and B of linear layers, and the adapter has")
def _(path):
    for i, (fields, advice) in enumerate(
        (({"modules_to_save": ["lm_head"]}, "gralora merge"), ({"alora_invocation_tokens": [1]}, "use --for peft"))
    ):
        llama(path / str(i), target_modules=["q_proj"], task_type="CAUSAL_LM", **fields)
        with refused(advice):
            gralora.to_lora(path / str(i) / "adapter", path / "no", "vllm")
        if advice == "gralora merge":
            merges(path / str(i) / "adapter", path / "merged")
        else:
            gralora.to_lora(path / str(i) / "adapter", path / "out", "peft")


@case("`gralora merge` writes them into the model. (If they are unchanged embeddings of the base")
def _(path):
    adapted = llama(path, target_modules=["q_proj", "lm_head"])
    away = path / "away"
    (path / "base").rename(away)
    with refused("--base MODEL", "save_embedding_layers=False", "gralora merge"):
        gralora.to_lora(path / "adapter", path / "no", "vllm")
    gralora.to_lora(path / "adapter", path / "with_base", "vllm", base=away)
    merges(path / "adapter", path / "merged", base=away)
    adapted.save_pretrained(path / "smaller", save_embedding_layers=False)
    gralora.to_lora(path / "smaller", path / "without", "vllm")


@case("takes no adapters of")
def _(path):
    saved_adapter(
        make_model("CLIPModel"), path, target_modules=["patch_embedding"], gralora_k_pattern={"patch": 1}, k=1
    )
    with refused("convolutions", "gralora merge"):
        gralora.to_lora(path / "adapter", path / "no", "vllm")
    merges(path / "adapter", path / "merged")


@case("`gralora merge` merges the adapter.")
def _(path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "GptOssForCausalLM", FAMILIES["MixtralForCausalLM"])
    targets = ["experts.gate_up_proj", "experts.gate_up_proj_bias"]
    saved_adapter(make_model("GptOssForCausalLM"), path, target_modules=[], target_parameters=targets, k=1)
    with refused("which of the factors", "gralora merge"):
        gralora.to_lora(path / "adapter", path / "no", "vllm")
    merges(path / "adapter", path / "merged")


@case("tensors; see `gralora inspect`.")
def _(path):
    targets = {"target_modules": [], "target_parameters": EXPERTS}
    saved_adapter(make_model("MixtralForCausalLM"), path, **targets)
    config, tensors = read(path / "adapter")
    name = next(n for n in tensors if "lora_A" in n)
    write(path / "adapter", config, tensors | {name: torch.full_like(tensors[name], torch.nan)})
    with refused("NaN or infinite", "gralora inspect"):
        gralora.to_lora(path / "adapter", path / "no", "peft")
    anomalies = gralora.inspect_adapter(path / "adapter")["anomalies"]
    assert any("NaN" in line and "experts" in line for line in anomalies)


@case("; `gralora inspect` shows whether the adapter has.")
def _(path):
    llama(path, target_modules=["q_proj"])
    config, tensors = read(path / "adapter")
    huge = {n: t * 1e19 if ".lora_" in n else t for n, t in tensors.items()}
    write(path / "adapter", config, huge)
    with refused("gralora inspect"):
        gralora.merge_adapter(path / "adapter", path / "no", dtype=torch.float16)
    assert gralora.inspect_adapter(path / "adapter")["anomalies"] == []  # it has none: the sum is too large


@case("Merge the adapter into the model (`gralora merge`), which is exact, or allow an approximation")
def _(path):
    llama(path, target_modules=["q_proj"], k=2, r=8)
    with refused("gralora merge", "--max-rank 3 --lossy"):
        gralora.to_lora(path / "adapter", path / "no", "vllm", max_rank=3)
    merges(path / "adapter", path / "merged")
    command = ["export", str(path / "adapter"), str(path / "out"), "--for", "vllm", "--max-rank", "3", "--lossy"]
    assert cli.main(command) == 0


# The base model


@case("names no base model; give --base FOLDER.")
def _(path):
    save_gralora(path / "adapter", target_modules=["q_proj"])
    tiny_llama().save_pretrained(path / "base")
    with refused("give --base FOLDER", error=FileNotFoundError):
        gralora.merge_adapter(path / "adapter", path / "out")
    merges(path / "adapter", path / "out", base=path / "base")


@case("is no folder and not in the local Hub cache; give --base FOLDER.")
def _(path):
    llama(path, target_modules=["q_proj"])
    edit(path / "adapter", base_model_name_or_path="someone/else")
    with refused("give --base FOLDER", error=FileNotFoundError):
        gralora.merge_adapter(path / "adapter", path / "out")
    merges(path / "adapter", path / "out", base=path / "base")


@case("is quantised; merge into the unquantised model.")
def _(path):
    llama(path, target_modules=["q_proj"])
    shutil.copytree(path / "base", path / "quantised")
    config = json.loads((path / "base" / "config.json").read_text())
    (path / "quantised" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with refused("unquantised"):
        gralora.merge_adapter(path / "adapter", path / "out", path / "quantised")
    merges(path / "adapter", path / "out", base=path / "base")


@case("is an adapter; its base model is")
def _(path):
    llama(path)
    edit(path / "adapter", base_model_name_or_path=str(path / "base"))
    with refused(repr(str(path / "base"))):
        gralora.merge_adapter(path / "adapter", path / "no", path / "adapter")
    merges(path / "adapter", path / "merged", base=path / "base")


@case("so it cannot be merged; use it unmerged.")
def _(path, monkeypatch):
    name = "SwitchTransformersForConditionalGeneration"
    monkeypatch.setitem(FAMILIES, name, FAMILIES["T5ForConditionalGeneration"] | {"num_experts": 2})
    adapted = saved_adapter(make_model(name), path, target_modules=["q", "lm_head"])
    with refused("use it unmerged"):
        gralora.merge_adapter(path / "adapter", path / "out")
    loaded = gralora.load_adapter(getattr(transformers, name).from_pretrained(path / "base"), path / "adapter")
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, adapted.eval()(**inputs).logits, rtol=0, atol=1e-4)


# Options


@case("does not use it:")
def _(path):
    llama(path, target_modules=["q_proj"])
    with refused("leave it out"):
        gralora.to_lora(path / "adapter", path / "out", "peft", base_config={"model_type": "llama"})
    gralora.to_lora(path / "adapter", path / "out", "peft")


@case("holds one adapter, which needs no name; leave it out.")
def _(path):
    llama(path, target_modules=["q_proj"])
    with refused("leave it out"):
        gralora.to_lora(path / "adapter", path / "out", adapter_name="mine")
    gralora.to_lora(path / "adapter", path / "out")


@case("; give one of the two.")
def _(path):
    llama(path, target_modules=["q_proj"])
    both = {"base": path / "base", "base_config": {"model_type": "llama", "num_attention_heads": 2}}
    with refused("give one of the two"):
        gralora.to_lora(path / "adapter", path / "out", "llamacpp", **both)
    for name, value in both.items():
        gralora.to_lora(path / "adapter", path / f"by_{name}", "llamacpp", **{name: value})


@case("is not known; use one of")
def _(path):
    """Of targets, and of formats that are read; every name that is listed is one."""
    llama(path, target_modules=["q_proj", "k_proj", "v_proj"])
    with pytest.raises(ValueError, match="use one of (.*)[.]") as error:
        gralora.to_lora(path / "adapter", path / "no", "tgi")
    names = re.search("use one of (.*)[.]", str(error.value))[1].split(", ")
    assert names == [*TARGETS, "diffusers"]
    for name in TARGETS:
        gralora.to_lora(path / "adapter", path / name, name, base=path / "base")
    with pytest.raises(ValueError, match="format 'ours' is not known; use one of gralora, peft, squeezebits, fork"):
        gralora.inspect_adapter(path / "adapter", source="ours")
    for name in ("gralora", "peft", "squeezebits", "fork"):
        save(path / f"of_{name}", name)
        gralora.inspect_adapter(path / f"of_{name}", source=name)


@case("cannot be written; use one of")
def _(path):
    save_gralora(path / "adapter")
    with pytest.raises(ValueError, match="use one of gralora, peft"):
        gralora.convert_adapter(path / "adapter", path / "no", to="fork")
    for name in ("gralora", "peft"):
        gralora.convert_adapter(path / "adapter", path / name, to=name)


# Formats


@case("so its scale is ambiguous; remove the one that was not trained with.")
def _(path):
    for kept, other in (("alpha", "gralora_alpha"), ("gralora_alpha", "alpha")):
        save(path / kept, "peft" if kept == "alpha" else "squeezebits")
        edit(path / kept, **{other: 8})
        with refused("remove the one"):
            gralora.inspect_adapter(path / kept)
        edit(path / kept, **{other: ...})
        gralora.inspect_adapter(path / kept)


@case("say which program wrote it: --from")
def _(path):
    save(path / "adapter", "peft")
    edit(path / "adapter", alpha=...)
    with refused("--from peft or --from squeezebits"):
        gralora.inspect_adapter(path / "adapter")
    assert cli.main(["inspect", str(path / "adapter"), "--from", "peft", "--json"]) in (0, None)
    edit(path / "adapter", r=8)  # whose r includes hybrid_r
    gralora.inspect_adapter(path / "adapter", source="squeezebits")


@case("remove it from adapter_config.json.")
def _(path):
    save(path / "adapter", "peft")
    edit(path / "adapter", a_new_field=3)
    with refused("a_new_field=3", "remove it from adapter_config.json"):
        gralora.inspect_adapter(path / "adapter")
    edit(path / "adapter", a_new_field=...)
    gralora.inspect_adapter(path / "adapter")


@case("cannot be expressed in PEFT's GRALORA format")
def _(path):
    fields: dict[str, dict[str, Any]] = {
        "lora_bias": {"lora_bias": True},
        **({"use_dora": {"use_dora": True}} if MERGES_DORA else {}),
        "trainable_token_indices": {"trainable_token_indices": [3]},
        "alora_invocation_tokens": {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
        "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
        "ensure_weight_tying": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    }
    for name, values in fields.items():
        model = make_model("Starcoder2ForCausalLM" if name == "lora_bias" else "LlamaForCausalLM")
        saved_adapter(model, path / name, target_modules=["q_proj"], **values)
        with pytest.raises(ValueError, match=f"{name}=.* cannot be expressed") as error:
            gralora.convert_adapter(path / name / "adapter", path / "no", to="peft")
        advice = str(error.value)
        assert "gralora export --for peft" in advice or "gralora merge" in advice, advice
        if "gralora export --for peft" in advice:
            gralora.to_lora(path / name / "adapter", path / name / "out", "peft")
        if "gralora merge" in advice:
            merges(path / name / "adapter", path / name / "merged")


@case("gives layers different values, which PEFT's GRALORA format does not have")
def _(path):
    expected = save_gralora(path / "adapter", hybrid_r=0, rank_pattern={"q_proj": 4})
    follow_export(path, expected)


@case("and PEFT's GRALORA format has no rsLoRA")
def _(path):
    follow_export(path, save_gralora(path / "adapter", use_rslora=True))


def follow_export(path: Path, expected: torch.Tensor) -> None:
    with refused("`gralora export --for peft` writes a plain LoRA that equals it"):
        gralora.convert_adapter(path / "adapter", path / "no", to="peft")
    gralora.to_lora(path / "adapter", path / "out", "peft")
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(tiny_llama(), path / "out")), expected, rtol=0, atol=1e-5
    )


# Programs


@case("give --base FOLDER, whose config.json says which model it is.")
def _(path):
    saved_adapter(make_model("MixtralForCausalLM"), path, target_modules=[], target_parameters=EXPERTS)
    (path / "base").rename(path / "away")
    with refused("give --base FOLDER"):
        gralora.to_lora(path / "adapter", path / "out", "vllm")
    gralora.to_lora(path / "adapter", path / "out", "vllm", base=path / "away")


@case("`gralora merge` writes the experts into the model.")
def _(path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "GptOssForCausalLM", FAMILIES["MixtralForCausalLM"])
    saved_adapter(make_model("GptOssForCausalLM"), path, target_modules=[], target_parameters=EXPERTS)
    with refused("model_type='gpt_oss'", "gralora merge"):
        gralora.to_lora(path / "adapter", path / "out", "sglang", base=path / "base")
    merges(path / "adapter", path / "merged")


@case("alone. `gralora merge` writes it into the model.")
def _(path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "GptOssForCausalLM", FAMILIES["MixtralForCausalLM"])
    saved_adapter(make_model("GptOssForCausalLM"), path, target_modules=[], target_parameters=EXPERTS[:1])
    with refused("gralora merge"):
        gralora.to_lora(path / "adapter", path / "out", "vllm", base=path / "base")
    merges(path / "adapter", path / "merged")


@case("Zeros can be added if their sizes are known: give --base FOLDER")
def _(path):
    llama(path, target_modules=["q_proj"])
    (path / "base").rename(path / "away")
    with refused("give --base FOLDER"):
        gralora.to_lora(path / "adapter", path / "out", "sglang")
    gralora.to_lora(path / "adapter", path / "out", "sglang", base=path / "away")


@case("give --base FOLDER (its config.json is read), or --arch llama --heads N --kv-heads N.")
def _(path):
    llama(path, target_modules=["q_proj"])
    (path / "base").rename(path / "away")
    with refused("--base FOLDER", "--arch llama"):
        gralora.to_lora(path / "adapter", path / "out", "llamacpp")
    gralora.to_lora(path / "adapter", path / "one", "llamacpp", base=path / "away")
    flags = ["--arch", "llama", "--heads", "2", "--kv-heads", "1"]
    assert cli.main(["export", str(path / "adapter"), str(path / "two"), "--for", "llamacpp", *flags]) == 0
    assert (path / "one" / "adapter.gguf").read_bytes() == (path / "two" / "adapter.gguf").read_bytes()


@case("Export with --for peft and use llama.cpp's own convert_lora_to_gguf.py.")
def _(path):
    """Of the script, which is in llama.cpp's repository: what it reads is written."""
    saved_adapter(make_model("BloomForCausalLM"), path, target_modules=["query_key_value"])
    with refused("--for peft", "convert_lora_to_gguf.py"):
        gralora.to_lora(path / "adapter", path / "out", "llamacpp")
    gralora.to_lora(path / "adapter", path / "out", "peft")
    assert (path / "out" / CONFIG).exists() and (path / "out" / WEIGHTS).exists()


@case("in its architecture ; `gralora merge` writes it into the model.")
def _(path):
    saved_adapter(make_model("MistralForCausalLM"), path, target_modules=["q_proj"])
    config, tensors = read(path / "adapter")
    renamed = {n.replace("self_attn", "other_attn"): t for n, t in tensors.items()}
    write(path / "other", config, renamed)
    with refused("llama.cpp has no name for layer", "gralora merge"):
        gralora.to_lora(path / "other", path / "out", "llamacpp", base=path / "base")
    merges(path / "adapter", path / "merged")  # of a model that has the layer


@case("mlx adapts what is in model.layers, and lm_head")
def _(path):
    saved_adapter(make_model("GPTNeoXForCausalLM"), path, target_modules=["dense"])
    with refused("mlx adapts", "gralora merge"):
        gralora.to_lora(path / "adapter", path / "out", "mlx")
    merges(path / "adapter", path / "merged")


@case("mlx has no place for the parameter")
def _(path):
    adapted = saved_adapter(make_model("MixtralForCausalLM"), path, target_modules=[], target_parameters=EXPERTS)
    config, tensors = read(path / "adapter")
    renamed = {n.replace("model.model.layers", "model.text.layers"): t for n, t in tensors.items()}
    write(path / "other", config, renamed)
    with refused("mlx has no place", "gralora merge"):
        gralora.to_lora(path / "other", path / "out", "mlx", base=path / "base")
    merges(path / "adapter", path / "merged")
    assert adapted


@case("GGUF files need the package gguf: pip install gguf")
def _(path):
    assert __import__("gguf")  # which the extra `finetune` installs by that name


@case("save it with diffusers 0.34 or later")
def _(path):
    pictures = pytest.importorskip("pictures")
    unet = pictures.make("unet")
    unet.add_adapter(gralora_config(2, 8, target_modules=["to_q"]))
    randomize(unet)
    save_file({"unet.x.lora_A.weight": torch.ones(2, 2, 2)}, path / pictures.FILE)
    with refused("save it with diffusers 0.34 or later"):
        gralora.to_lora(path, path / "out", "diffusers")
    unet.save_lora_adapter(path / "again")
    gralora.to_lora(path / "again", path / "out", "diffusers")


@case("--layers matches none of the adapter's layers, e.g. .")
def _(path):
    from gralora.checkpoints.drawing import draw_block_norms

    save_gralora(path / "adapter")
    with pytest.raises(ValueError, match="matches none of the adapter's layers, e.g. '(.*)'") as error:
        draw_block_norms(path / "adapter", path / "norms.png", layers="nothing")
    named = re.search("e.g. '(.*)'", str(error.value))[1]
    assert draw_block_norms(path / "adapter", path / "norms.png", layers=named)[0] == [named]


# Files


@case("is not a folder; a Hub id must be downloaded first.")
def _(path):
    with refused("must be downloaded first", error=FileNotFoundError):
        gralora.inspect_adapter(path / "someone" / "adapter")
    save_gralora(path / "someone" / "adapter")  # stands for the download
    gralora.inspect_adapter(path / "someone" / "adapter")


@case("complete: move the files of")
def _(path):
    save_gralora(path / "adapter")
    (path / "adapter" / files.FINISHED).mkdir()
    for name in (CONFIG, WEIGHTS):
        (path / "adapter" / name).rename(path / "adapter" / files.FINISHED / name)
    with refused("move the files of", error=FileNotFoundError):
        gralora.inspect_adapter(path / "adapter")
    for name in (CONFIG, WEIGHTS):
        (path / "adapter" / files.FINISHED / name).rename(path / "adapter" / name)
    gralora.inspect_adapter(path / "adapter")


@case("adapter where you trust it and save it as safetensors")
def _(path):
    expected = save_gralora(path / "adapter")
    torch.save(load_file(path / "adapter" / WEIGHTS), path / "adapter" / "adapter_model.bin")
    (path / "adapter" / WEIGHTS).unlink()
    with refused("save it as safetensors"):
        gralora.load_adapter(tiny_llama(), path / "adapter")
    peft.PeftModel.from_pretrained(tiny_llama(), path / "adapter").save_pretrained(path / "again")
    torch.testing.assert_close(logits(gralora.load_adapter(tiny_llama(), path / "again")), expected)


@case("exists; choose another name, or remove it.")
def _(path):
    save_gralora(path / "adapter")
    gralora.to_lora(path / "adapter", path / "out")
    with refused("choose another name", "or remove it", error=FileExistsError):
        gralora.to_lora(path / "adapter", path / "out")
    gralora.to_lora(path / "adapter", path / "another")
    shutil.rmtree(path / "out")
    gralora.to_lora(path / "adapter", path / "out")


@case("is where a file system is mounted; give a folder inside of it.")
def _(path, monkeypatch):
    save_gralora(path / "adapter")
    (path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "mounted")
    with refused("give a folder inside of it", error=FileExistsError):
        gralora.to_lora(path / "adapter", path / "mounted")
    gralora.to_lora(path / "adapter", path / "mounted" / "out")


@case("wait for it to end, or choose another name.")
def _(path):
    llama(path, target_modules=["q_proj"])
    out = path / "out"
    with files.locked(out.with_name(".out.lock"), out):
        with refused("wait for it to end", error=BlockingIOError):
            gralora.merge_adapter(path / "adapter", out)
        merges(path / "adapter", path / "another")
    merges(path / "adapter", out)


@case("; correct one of them.")
def _(path, tiny_model):
    llama(path, target_modules=["q_proj"])
    shutil.copy(tiny_model / "tokenizer.json", path / "adapter")
    (path / "adapter" / "generation_config.json").write_text(json.dumps({"eos_token_id": [10**6]}))
    with refused("correct one of them"):
        gralora.to_lora(path / "adapter", path / "out", "vllm")
    (path / "adapter" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    gralora.to_lora(path / "adapter", path / "out", "vllm")


@case("write it without nested repetitions, or as a list of names.")
def _(path, monkeypatch):
    from gralora.checkpoints import untrusted

    save_gralora(path / "adapter", target_modules=["q_proj"])
    monkeypatch.setattr(untrusted, "MATCHING_S", 0.2)
    edit(path / "adapter", target_modules=r"((\w*\.*)*)*!|.*q_proj")
    with refused("without nested repetitions, or as a list"):
        gralora.inspect_adapter(path / "adapter")
    for advised in (r".*q_proj", ["q_proj"]):
        edit(path / "adapter", target_modules=advised)
        gralora.inspect_adapter(path / "adapter")


# Initialisations that change the base weights, and bases of 4 and 8 bits


@case("changed the base weights that the adapter belongs to")
def _(path):
    tuned = llama(path, target_modules=["q_proj"], init_lora_weights="pissa", hybrid_r=0)
    with refused("gralora merge", "path_initial_model_for_weight_conversion"):
        gralora.to_lora(path / "adapter", path / "no")
    merges(path / "adapter", path / "merged")
    tuned.save_pretrained(path / "initial")  # as if before the training that follows
    randomize(tuned, seed=1)
    tuned.save_pretrained(path / "end", path_initial_model_for_weight_conversion=str(path / "initial"))
    gralora.to_lora(path / "end", path / "out")


@case("no quantised layer of the model has a GraLoRA adapter")
def _(path):
    model = llama(path, target_modules=["q_proj"])
    with refused("init_lora_weights='loftq'"):
        gralora.replace_lora_weights_loftq(model, path / "base" / "model.safetensors")
    fields = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    again = transformers.AutoModelForCausalLM.from_pretrained(path / "base")
    peft.get_peft_model(again, gralora_config(2, r=4, target_modules=["q_proj"], **fields))


@case("use a smaller rank.")
def _(path):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantised() -> torch.nn.Module:
        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict(linear.state_dict())
        model = torch.nn.Sequential(OrderedDict(layer=layer.to("cpu")))
        model.is_loaded_in_4bit = True
        return model

    linear = torch.nn.Linear(64, 64, bias=False)
    save_file({"layer.weight": linear.weight.detach().clone()}, path / "model.safetensors")
    wide, narrow = (
        peft.get_peft_model(quantised(), gralora_config(32, r=r, hybrid_r=0, target_modules=["layer"]))
        for r in (128, 64)
    )
    with refused("2 and 2 features, and rank 4"):
        gralora.replace_lora_weights_loftq(wide, path / "model.safetensors")
    gralora.replace_lora_weights_loftq(narrow, path / "model.safetensors")


@case("is FP8, and is merged into file by file only")
def _(path):
    pytest.importorskip("torchao")
    llama(path, target_modules=["embed_tokens", "q_proj"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path / "base")
    gralora.quantize_fp8(model).save_pretrained(path / "fp8")
    with refused("gralora.dequantize_fp8"):
        gralora.merge_adapter(path / "adapter", path / "no", path / "fp8")
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(path / "fp8")
    gralora.dequantize_fp8(again).save_pretrained(path / "plain")
    merges(path / "adapter", path / "merged", base=path / "plain")


@case("only matrices with scales can be dequantised; merge into the unquantised model.")
def _(path):
    llama(path, target_modules=["q_proj"])
    shutil.copytree(path / "base", path / "fp8")
    tensors = load_file(path / "fp8" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path / "fp8" / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "fp8" / "config.json").read_text())
    (path / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with refused(f"{name}_scale_inv' are missing"):
        gralora.merge_adapter(path / "adapter", path / "no", path / "fp8")
    merges(path / "adapter", path / "merged", base=path / "base")


RESIZED = ("test_families.py", "test_resized_vocabulary")
ELSEWHERE = {  # followed by a test that brings the refusal about in more ways
    "before the adapter is loaded, or let `gralora merge` write a model that has them.": RESIZED,
    "and give that as the base.": RESIZED,
    "is deleted, and the same command writes it again and keeps the rest.": (
        "test_adapters.py",
        "test_wrong_weights_on_disk_are_found",
    ),
}


@pytest.mark.parametrize("words", CASES)
def test_advice_can_be_followed(words, tmp_path, request):
    follow(CASES[words], tmp_path, request)


def test_every_advice_is_followed():
    found = refusals(SOURCE.glob("*.py"))
    assert len(found) > 100
    check_all_are_followed(found, CASES, ELSEWHERE)
