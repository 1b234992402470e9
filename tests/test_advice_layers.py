"""The advice of the refusals outside `checkpoints` and the command, followed: what it says to do instead works."""

import importlib.metadata
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from advice import Cases, check_all_are_followed, follow, refusals, refused, register_in
from helpers import adapted, gralora_config, randomize, tiny_llama, token_ids
from packaging.requirements import Requirement
from peft import LoftQConfig
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from saved import save
from torch import nn

import gralora
from gralora import parents
from gralora.ops import fp8, plans
from gralora.seam import MERGES_DORA
from gralora_command import install

SOURCE = Path(gralora.__file__).parent
CASES: Cases = {}
pytestmark = pytest.mark.filterwarnings("ignore")
case = register_in(CASES)


def llama(**fields: Any) -> peft.PeftModel:
    return adapted(tiny_llama(), gralora_config(**{"target_modules": ["q_proj", "up_proj"]} | fields))


def runs(model: nn.Module) -> None:
    assert model(token_ids(2, 5)).logits.isfinite().all()


@case("give it the model inside, e.g. `pipeline.transformer` or `pipeline.unet` of diffusers")
def _(path):
    pictures = pytest.importorskip("pictures")
    pipeline = pictures.pipeline_of("flux")
    with refused("pipeline.transformer", error=TypeError):
        gralora.accelerate(pipeline)
    pipeline.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"]))
    assert not gralora.describe(gralora.accelerate(pipeline.transformer)).startswith("0 of")


# The config, alone and with the layers that it meets


@case("use another rank, or one of .")
def _(path):
    fields = {"target_modules": ["q_proj"], "gralora_k_pattern": {"q_proj": 4}}
    with refused("q_proj'", "gralora_k_pattern['q_proj']=[1, 2]"):
        llama(r=6, **fields)
    runs(llama(r=8, **fields))
    runs(llama(r=6, **fields | {"gralora_k_pattern": {"q_proj": 2}}))


@case("(for this layer alone: gralora_k_pattern), gralora_k='auto', or leave it out of the targets.")
def _(path):
    base = {"intermediate_size": 22, "num_attention_heads": 2}

    def model(**fields: Any) -> peft.PeftModel:
        config = gralora_config(**{"k": 4, "r": 16, "target_modules": ["q_proj", "up_proj"]} | fields)
        return adapted(tiny_llama(**base), config)

    with refused("gralora_k=4", "up_proj", "[1, 2]"):
        model()
    for fields in ({"k": 2}, {"gralora_k_pattern": {"up_proj": 2}}, {"k": "auto"}, {"target_modules": ["q_proj"]}):
        runs(model(**fields))


@case("Convert it first: `gralora convert ADAPTER OUT` (or gralora.convert_adapter).")
def _(path):
    save(path / "fork", "fork")
    with refused("HaohanTsao/peft"):
        peft.PeftModel.from_pretrained(tiny_llama(), path / "fork")
    gralora.convert_adapter(path / "fork", path / "out")
    runs(peft.PeftModel.from_pretrained(tiny_llama(), path / "out"))


@case("is not known to this version of gralora, which reads and ; update gralora.")
def _(path):
    with refused("gralora_format=9", "update gralora"):
        peft.LoraConfig(**{**gralora_config().to_dict(), "gralora_format": 9})


@case("leave at its default, or set use_gralora=False.")
def _(path):
    with refused("use_bdlora", "use_gralora=False"):
        gralora_config(use_bdlora=peft.BdLoraConfig())
    assert gralora_config().use_bdlora is None
    assert gralora.LoraConfig(use_gralora=False, use_bdlora=peft.BdLoraConfig()).use_bdlora


@case("PEFT takes one variant of LoRA; leave one of them at its default.")
def _(path):
    with refused("use_dora=True", "alora_invocation_tokens=[3]"):
        gralora_config(use_dora=True, alora_invocation_tokens=[3])
    gralora_config(alora_invocation_tokens=[3])
    gralora_config(use_dora=True)


@case("cannot be combined with use_gralora=True; use one of .,")
def _(path):
    with refused("init_lora_weights='nonsense'", "'pissa'"):
        gralora_config(init_lora_weights="nonsense")
    for init in ("gaussian", "orthogonal", "pissa", "olora", True, False):
        runs(llama(init_lora_weights=init))


@case("use EvaConfig(rho=1.0), and rank_pattern for ranks by layer.")
def _(path):
    with refused("eva_config.rho=2.0"):
        gralora_config(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    config = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0), "rank_pattern": {"up_proj": 4}}
    model = peft.get_peft_model(tiny_llama(), gralora_config(r=6, target_modules=["q_proj", "up_proj"], **config))
    batches = [{"input_ids": token_ids(4, 9, seed=n)} for n in range(8)]
    peft.initialize_lora_eva_weights(model, batches)
    runs(model)


@case("by which each block is decomposed; use CordaConfig(prune_temporary_fields=False).")
def _(path):
    with refused("prune_temporary_fields=True"):
        gralora_config(init_lora_weights="corda", corda_config=CordaConfig())
    settings = CordaConfig(prune_temporary_fields=False)
    config = gralora_config(target_modules=["q_proj"], init_lora_weights="corda", corda_config=settings)
    base = tiny_llama()
    preprocess_corda(base, config, lambda: base(token_ids(1, 60)))
    runs(peft.get_peft_model(base, config))


@case("the adapter acts on some tokens alone. Use init_lora_weights=True.")
def _(path):
    with refused("init_lora_weights='pissa'", "[3]"):
        gralora_config(init_lora_weights="pissa", alora_invocation_tokens=[3])
    gralora_config(init_lora_weights=True, alora_invocation_tokens=[3])


@case("and a positive loftq_iter; use LoftQConfig(loftq_bits=4).")
def _(path):
    with refused("loftq_bits"):
        gralora_config(init_lora_weights="loftq", loftq_config={"loftq_bits": 3, "loftq_iter": 1})
    fields = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)}
    pytest.importorskip("scipy")
    runs(llama(**fields))


@case("since every block gets (r - hybrid_r) / k ranks; use =, or one of gralora_k=.")
def _(path):
    with refused("r=10 less hybrid_r=3", "r=9 or 11", "gralora_k=[1, 7]"):
        gralora_config(2, 10, 3)
    for k, r in ((2, 9), (2, 11), (7, 10), (1, 10)):
        gralora_config(k, r, 3)


@case("use a smaller rank, or a smaller gralora_k for this layer.")
def _(path):
    def start(**fields: Any) -> nn.Module:
        config = {"r": 16, "init_lora_weights": "eva", "target_modules": ["q_proj", "up_proj"]} | fields
        model = peft.get_peft_model(tiny_llama(), gralora_config(**config))
        peft.initialize_lora_eva_weights(model, [{"input_ids": token_ids(8, 9, seed=n)} for n in range(8)])
        return model

    four = {"gralora_k_pattern": {"up_proj": 4}}
    with refused("here 8", "up_proj", "have 4 features"):
        start(**four)
    runs(start(r=8, **four))
    runs(start())


@case("give initialize_lora_eva_weights the dataloader, not an eva_state_dict that was made for a plain LoRA.")
def _(path):
    batches = [{"input_ids": token_ids(4, 9, seed=n)} for n in range(8)]
    fields = {"init_lora_weights": "eva", "target_modules": ["q_proj"]}
    plain = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=8, **fields))
    model = peft.get_peft_model(tiny_llama(), gralora_config(**fields))
    with refused("the dataloader"):
        peft.initialize_lora_eva_weights(model, eva_state_dict=peft.get_eva_state_dict(plain, batches))
    peft.initialize_lora_eva_weights(model, batches)
    runs(model)


@case(". Or use init_lora_weights=True, or take the layer out of the targets.")
def _(path):
    fields = {"init_lora_weights": "pissa", "k": 4, "r": 16, "target_modules": ["up_proj", "k_proj"]}
    with refused("init_lora_weights='pissa'", "k_proj"):
        llama(**fields)
    for changed in ({"init_lora_weights": True}, {"target_modules": ["up_proj"]}):
        runs(llama(**fields | changed))


@case("Take out of the targets, or use init_lora_weights=True.")
def _(path):
    tied = {"tie_word_embeddings": True}
    fields = {"init_lora_weights": "pissa", "target_modules": ["lm_head", "q_proj"]}
    with refused("shares its weight", "lm_head"):
        adapted(tiny_llama(**tied), gralora_config(**fields))
    for changed in ({"target_modules": ["q_proj"]}, {"init_lora_weights": True}):
        runs(adapted(tiny_llama(**tied), gralora_config(**fields | changed)))


@case("older ones merge DoRA wrongly into Conv1D layers, and beside other adapters.")
def _(path):
    if not MERGES_DORA:
        with refused("PEFT 0.21"):
            llama(use_dora=True)
    else:
        runs(llama(use_dora=True))


@case("matches no layer of the model; give gralora_k as a number.")
def _(path):
    config = {"k": "auto", "target_modules": ["no_such_layer"]}
    with refused("no_such_layer"):
        llama(**config)
    with pytest.raises(ValueError, match="no_such_layer"):  # PEFT's own, as soon as k is a number
        llama(**config | {"k": 2})


@case("or take the module out of target_modules.weight")
def _(path):
    fields = {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}
    if not MERGES_DORA:
        pytest.skip("GraLoRA's DoRA needs PEFT 0.21")
    with refused("use_dora=True", "embed_tokens"):
        llama(**fields)
    runs(llama(**fields | {"target_modules": ["q_proj"]}))
    runs(llama(**fields | {"use_dora": False}))


@case("leave at its default, or take this out of the targets.")
def _(path):
    fields = {"lora_bias": True, "target_modules": ["embed_tokens", "q_proj"]}
    with refused("embed_tokens"):
        llama(**fields)
    runs(llama(**fields | {"lora_bias": False}))


# What is done with adapters


@case("use 'cat' (exact), 'svd', or a kind that ends in '_svd'.")
def _(path):
    model = llama()
    model.add_adapter("other", gralora_config(target_modules=["q_proj", "up_proj"]))
    randomize(model, "other", seed=1)
    with refused("combination_type='ties'"):
        model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum", "ties", density=0.5)
    for kind, options in (("cat", {}), ("svd", {"svd_rank": 8}), ("ties_svd", {"svd_rank": 8, "density": 0.5})):
        model.add_weighted_adapter(["default", "other"], [1.0, 0.5], kind, kind, **options)
        model.set_adapter(kind)
        runs(model)


@case("took from them in quantising is in no adapter; save it without.")
def _(path):
    pytest.importorskip("scipy")
    fields = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)}
    model = llama(**fields)
    model.save_pretrained(path / "start")
    with refused("path_initial_model_for_weight_conversion"):
        model.save_pretrained(path / "out", path_initial_model_for_weight_conversion=path / "start")
    model.save_pretrained(path / "out")


@case("and each has an update of its own; use them unmerged.")
def _(path):
    model = llama(layer_replication=[[0, 1], [0, 2]])
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused("'model.layers.0.self_attn.q_proj'", "'model.layers.1.self_attn.q_proj'"):
            merge()
    runs(model)


@case("load it again, and merge.")
def _(path):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    base = tiny_llama(torch.bfloat16, hidden_size=32, intermediate_size=32)
    plain = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    model = adapted(gralora.quantize_fp8(base), gralora_config(target_modules=["q_proj"]))
    model.add_adapter("dora", plain)
    randomize(model, "dora", seed=1)
    model.set_adapter("dora")
    with refused("'dora'", "gralora.dequantize_fp8", error=NotImplementedError):
        model.merge_adapter()
    expected = model(token_ids(2, 5)).logits
    model.save_pretrained(path, selected_adapters=["dora"])
    dequantised = gralora.dequantize_fp8(model.unload())
    again = peft.PeftModel.from_pretrained(dequantised, path / "dora").merge_and_unload()
    torch.testing.assert_close(again(token_ids(2, 5)).logits, expected, rtol=0.1, atol=0.1)


@case("are trainable, as ; freeze them, or use another optimizer.")
def _(path):
    model = llama(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with refused("lm_head"):
        gralora.create_muon_optimizer(model, lr=1e-3)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.requires_grad_(False)
    gralora.create_muon_optimizer(model, lr=1e-3)


# The environment


@case("quantize_fp8 needs torchao: ")
def _(path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused(install("quantized"), error=ImportError):
        gralora.quantize_fp8(nn.Linear(16, 16))
    requirements = map(Requirement, importlib.metadata.requires("gralora") or [])
    extra = [r.name for r in requirements if r.marker and r.marker.evaluate({"extra": "quantized"})]
    assert "torchao" in extra and "[quantized]" in install("quantized")


READERS = [
    ("GRALORA_KERNELS", plans.read_choice, plans.CHOICES),
    ("GRALORA_FP8", fp8.read_choice, fp8.CHOICES),
    ("GRALORA_BLOCKS", parents.read_choice, ("on", "off")),
]


@pytest.mark.parametrize("name, read_choice, choices", READERS)
def test_values_of_the_environment(name, read_choice, choices, monkeypatch):
    monkeypatch.setenv(name, "nonsense")
    with refused(f"{name}='nonsense' is not known; use ", *choices):
        read_choice()
    for value in choices:
        monkeypatch.setenv(name, value)
        read_choice()


ELSEWHERE = {
    ": pip install ''": ("test_package.py", "test_older_versions_are_refused"),
    "and peft.set_peft_model_state_dict(model, tensors).": ("test_diffusers.py", "test_file_without_a_config"),
    "GRALORA_FP8= is not known; use one of .,": ("test_advice_layers.py", "test_values_of_the_environment"),
    "GRALORA_KERNELS= is not known; use one of .,": ("test_advice_layers.py", "test_values_of_the_environment"),
    "is not known; use on or off.": ("test_advice_layers.py", "test_values_of_the_environment"),
    "which then leaves these layers to PEFT.": ("test_trainers.py", "test_unsloths_fused_functions"),
}


@pytest.mark.parametrize("words", CASES)
def test_advice_can_be_followed(words, tmp_path, request):
    follow(CASES[words], tmp_path, request)


def test_every_advice_is_followed():
    found = refusals([*SOURCE.glob("*.py"), *SOURCE.glob("ops/*.py")])
    assert len(found) > 50
    check_all_are_followed(found, CASES, ELSEWHERE)
