"""Every checkpoint format is read right or refused, and what is written loads where it should."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import MODELS, adapted, assert_unchanged, gralora_config, tiny_llama, token_ids
from saved import CONFIG, FORMATS, WEIGHTS, edit, logits, read, save, save_gralora, save_peft, write
from torch import Tensor, nn

import gralora
from gralora.checkpoints import formats
from gralora.checkpoints.files import read_adapter_folder
from gralora.checkpoints.targets import GGUF_TARGETS, TARGETS


def recognise(folder: Path) -> str:
    return formats.recognise(json.loads((folder / CONFIG).read_text()))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_own_logits(tmp_path: Path, name: str) -> None:
    expected = save(tmp_path / "in", name)
    assert recognise(tmp_path / "in") == name
    loaded = gralora.load_adapter(tiny_llama(), tmp_path / "in")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)
    assert (expected - logits(tiny_llama())).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize("name", FORMATS)
def test_converted_adapter_loads_with_from_pretrained(tmp_path: Path, name: str) -> None:
    expected = save(tmp_path / "in", name)
    gralora.convert_adapter(tmp_path / "in", tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)
    config = loaded.peft_config["default"]
    assert (config.r, config.hybrid_r, config.gralora_k, config.use_gralora) == (8, 2, 2, True)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_written_peft_format_gives_the_same_logits_in_peft(tmp_path: Path, model: str, hybrid_r: int) -> None:
    """PEFT's own GRALORA layers, which share no code with ours, compute the same."""
    expected = save_gralora(tmp_path / "in", model, hybrid_r=hybrid_r)
    gralora.convert_adapter(tmp_path / "in", tmp_path / "out", to="peft")
    loaded = peft.PeftModel.from_pretrained(MODELS[model](), tmp_path / "out")
    assert loaded.peft_config["default"].peft_type == "GRALORA"
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)


def test_round_trip_from_peft_is_exact(tmp_path: Path) -> None:
    save_peft(tmp_path / "a", modules_to_save=["lm_head"], gralora_dropout=0.1, layers_to_transform=[1])
    gralora.convert_adapter(tmp_path / "a", tmp_path / "b")
    gralora.convert_adapter(tmp_path / "b", tmp_path / "c", to="peft")
    (config_a, a), (config_c, c) = read(tmp_path / "a"), read(tmp_path / "c")
    config_a["base_model_name_or_path"] = config_a["base_model_name_or_path"] or None  # PEFT 0.20 writes ""
    assert config_a | {"target_modules": None} == config_c | {"target_modules": None}
    assert set(config_a["target_modules"]) == set(config_c["target_modules"])
    assert a.keys() == c.keys() and all(torch.equal(a[name], c[name]) for name in a)
    assert any("lm_head" in name for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_from_ours_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    save_gralora(tmp_path / "a")
    config, tensors = read(tmp_path / "a")
    write(tmp_path / "a", config, {name: t.to(dtype) for name, t in tensors.items()})
    gralora.convert_adapter(tmp_path / "a", tmp_path / "b", to="peft")
    gralora.convert_adapter(tmp_path / "b", tmp_path / "c")
    a, c = read(tmp_path / "a")[1], read(tmp_path / "c")[1]
    assert a.keys() == c.keys()
    assert all(torch.equal(a[name], c[name]) and c[name].dtype == dtype for name in a)


def test_patterns_give_each_layer_its_rank_and_scaling(tmp_path: Path) -> None:
    fields = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}, "use_rslora": True}
    save_gralora(tmp_path, r=8, hybrid_r=0, lora_alpha=10, **fields)
    adapter = formats.read(*read_adapter_folder(tmp_path))
    loaded = gralora.load_adapter(tiny_llama(), tmp_path)
    for layer in adapter.layers:
        module = loaded.base_model.model.get_submodule(layer)
        assert adapter.rank(layer) == module.r["default"]
        assert adapter.scaling(layer) == module.scaling["default"]
    assert {adapter.rank(layer) for layer in adapter.layers} == {4, 8}
    assert len({adapter.scaling(layer) for layer in adapter.layers}) == 3


# Ambiguous and contradictory files


def test_config_with_both_alphas_is_refused(tmp_path: Path) -> None:
    save_peft(tmp_path)
    edit(tmp_path, gralora_alpha=16)
    with pytest.raises(ValueError, match="both alpha=20 .* gralora_alpha=16 .* ambiguous"):
        recognise(tmp_path)


def test_config_without_alpha_is_asked_about(tmp_path: Path) -> None:
    save_peft(tmp_path / "in", hybrid_r=0)
    edit(tmp_path / "in", alpha=...)
    with pytest.raises(ValueError, match="--from peft or --from squeezebits"):
        gralora.convert_adapter(tmp_path / "in", tmp_path / "out")
    for source, alpha in {"peft": 64, "squeezebits": 8}.items():
        read_as = gralora.convert_adapter(tmp_path / "in", tmp_path / source, source=source)
        assert read_as.config.lora_alpha == alpha
        assert any("took its default" in notice for notice in read_as.notices)


def test_rank_that_tensors_contradict_is_refused(tmp_path: Path) -> None:
    """A SqueezeBits adapter that went through PEFT: r still counts hybrid_r, alpha is PEFT's default."""
    save_peft(tmp_path)
    edit(tmp_path, r=8, alpha=64)
    with pytest.raises(ValueError, match="lost its gralora_alpha"):
        formats.read(*read_adapter_folder(tmp_path))


def test_source_that_fields_contradict_is_refused(tmp_path: Path) -> None:
    save_peft(tmp_path)
    with pytest.raises(ValueError, match="'peft', not 'squeezebits'"):
        formats.read(*read_adapter_folder(tmp_path), source="squeezebits")


def test_fork_notices_what_it_drops(tmp_path: Path) -> None:
    save(tmp_path / "in", "fork")
    adapter = gralora.convert_adapter(tmp_path / "in", tmp_path / "out")
    assert any("dropped 12 tensors" in notice for notice in adapter.notices)
    assert all(t.ndim == 3 for name, t in read(tmp_path / "out")[1].items() if name.endswith("lora_A.weight"))


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    ia3 = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(tiny_llama(), ia3).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="plain LoRA"):
        recognise(tmp_path / "lora")
    with pytest.raises(ValueError, match="IA3.*no GraLoRA"):
        recognise(tmp_path / "ia3")


def test_unknown_field_of_a_tuner_is_refused_unless_empty(tmp_path: Path) -> None:
    save_peft(tmp_path)
    edit(tmp_path, new_thing=None)
    formats.read(*read_adapter_folder(tmp_path))
    edit(tmp_path, new_thing=3)
    with pytest.raises(ValueError, match="new_thing=3"):
        formats.read(*read_adapter_folder(tmp_path))


DAMAGES = {
    "missing B": (lambda t, n: t.pop(n.replace("_A", "_B")), "factor B is missing"),
    "missing hybrid": (lambda t, n: t.pop(n.replace(".weight", ".hybrid_weight")), "factor hybrid_A is missing"),
    "k": (lambda t, n: t.update({n: t[n].reshape(4, -1, t[n].shape[2])}), "gralora_k=2"),
    "integer": (lambda t, n: t.update({n: t[n].to(torch.int32)}), "floating point"),
    "empty": (lambda t, n: t.update({n: t[n][:, :0]}), "not empty"),
    "hybrid shape": (lambda t, n: t.update({n.replace(".weight", ".hybrid_weight"): torch.ones(2, 5)}), "expected"),
    "two-dimensional": (lambda t, n: t.update({n: t[n].flatten(0, 1)}), "must be"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_refused_by_layer(tmp_path: Path, damage: str) -> None:
    save_gralora(tmp_path)
    config, tensors = read(tmp_path)
    change, message = DAMAGES[damage]
    change(tensors, "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight")
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=f"model.layers.1.self_attn.q_proj.*{message}"):
        formats.read(*read_adapter_folder(tmp_path))


@pytest.mark.parametrize(("field", "value"), [("r", "8"), ("gralora_k", "auto"), ("lora_alpha", None)])
def test_config_values_of_a_wrong_type_are_refused(tmp_path: Path, field: str, value: object) -> None:
    save_gralora(tmp_path)
    edit(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=field):
        formats.read(*read_adapter_folder(tmp_path))


@pytest.mark.parametrize("value", [{}, {"top_k": 2}])
def test_variants_that_do_not_go_with_a_grid_are_refused_by_name(tmp_path: Path, value: dict) -> None:
    """As objects, which is what a file has for them; {} asks for the variant with its defaults."""
    save_gralora(tmp_path)
    edit(tmp_path, arrow_config=value)
    with pytest.raises(ValueError, match="arrow_config=.* cannot be combined with GraLoRA"):
        formats.read(*read_adapter_folder(tmp_path))


@pytest.mark.parametrize("field", ["r", "hybrid_r"])
def test_ranks_of_another_program_are_numbers(tmp_path: Path, field: str) -> None:
    save_peft(tmp_path)
    edit(tmp_path, **{field: True})
    with pytest.raises(ValueError, match=f"{field}=True"):
        formats.read(*read_adapter_folder(tmp_path))


# Files


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_gralora(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin.*can run code"):
        read_adapter_folder(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    save_gralora(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:-7])
    with pytest.raises(ValueError, match=WEIGHTS):
        read_adapter_folder(tmp_path)
    (tmp_path / CONFIG).write_text("[1]")
    with pytest.raises(ValueError, match=CONFIG):
        read_adapter_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        read_adapter_folder(tmp_path / "nowhere")


def test_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in", use_rslora=True)
    with pytest.raises(ValueError, match="use_rslora"):
        gralora.convert_adapter(tmp_path / "in", tmp_path / "out", to="peft")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="choose another name"):
        gralora.convert_adapter(tmp_path / "in", tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "in"]


# What PEFT's format cannot express


def test_rslora_is_folded_where_exact(tmp_path: Path) -> None:
    """sqrt(16) = 4, so alpha / sqrt(16) = 4 alpha / 16; sqrt(8) is irrational, so r=8 is refused."""
    expected = save_gralora(tmp_path / "in", r=16, hybrid_r=2, use_rslora=True, lora_alpha=3)
    gralora.convert_adapter(tmp_path / "in", tmp_path / "out", to="peft")
    assert read(tmp_path / "out")[0]["alpha"] == 12
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"use_rslora": True}, "r is a square"),
    ],
)
def test_what_peft_cannot_express_is_refused(tmp_path: Path, fields: dict, message: str) -> None:
    save_gralora(tmp_path / "in", **fields)
    with pytest.raises(ValueError, match=message):
        gralora.convert_adapter(tmp_path / "in", tmp_path / "out", to="peft")


def test_patterns_that_make_no_difference_are_expressed(tmp_path: Path) -> None:
    fields = {"r": 4, "hybrid_r": 0, "rank_pattern": {".*": 8}, "alpha_pattern": {"q_proj": 6, ".*_proj": 6}}
    expected = save_gralora(tmp_path / "in", **fields)
    gralora.convert_adapter(tmp_path / "in", tmp_path / "out", to="peft")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)


def test_excluded_modules_become_a_list_of_layers(tmp_path: Path) -> None:
    expected = save_gralora(tmp_path / "in", exclude_modules=["model.layers.0.self_attn.q_proj"])
    gralora.convert_adapter(tmp_path / "in", tmp_path / "out", to="peft")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert sum(hasattr(module, "gralora_A") for module in loaded.modules()) == 5
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)


# Strict loading


def test_two_adapters_of_different_formats_in_one_model(tmp_path: Path) -> None:
    expected = {name: save(tmp_path / name, name) for name in FORMATS}
    model = tiny_llama()
    for name in FORMATS:
        model = gralora.load_adapter(model, tmp_path / name, adapter_name=name)
        assert model.active_adapter == name
    for name in FORMATS:
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected[name], rtol=0, atol=1e-10)


def test_modules_to_save_are_loaded(tmp_path: Path) -> None:
    expected = save_peft(tmp_path, modules_to_save=["lm_head"])
    config, tensors = read(tmp_path)
    head = "base_model.model.lm_head.weight"
    write(tmp_path, config, tensors | {head: 2 * tensors[head]})
    torch.testing.assert_close(logits(gralora.load_adapter(tiny_llama(), tmp_path)), 2 * expected, rtol=0, atol=1e-10)


def remove_layer(tensors: dict) -> dict:
    return {name: t for name, t in tensors.items() if "layers.1.mlp.down_proj" not in name}


@pytest.mark.parametrize("loaded_before", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_layer, "selects 1 layers .* no tensors of: model.layers.1.mlp.down_proj"),
        (lambda t: t | {"base_model.model.extra.weight": torch.ones(1)}, "no place in the model: extra.weight"),
        (lambda t: {n.replace("layers.1", "layers.7"): x for n, x in t.items()}, "lacks 3 of the 6 .*layers.7"),
        (lambda t: {n: torch.zeros_like(x) if "lora_B" in n else x for n, x in t.items()}, "B factors .* zero"),
    ],
    ids=["missing", "unexpected", "no such layer", "zero"],
)
def test_misfits_raise_and_leave_the_model_alone(tmp_path: Path, change, message: str, loaded_before: bool) -> None:
    save_gralora(tmp_path)
    model = gralora.load_adapter(tiny_llama(), tmp_path) if loaded_before else tiny_llama()
    before = logits(model)
    names = [name for name, _ in model.named_modules()]
    config, tensors = read(tmp_path)
    write(tmp_path, config, change(tensors))
    with pytest.raises(ValueError, match=message):
        gralora.load_adapter(model, tmp_path, adapter_name="second")
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == names


def test_base_of_other_features_is_refused(tmp_path: Path) -> None:
    save_gralora(tmp_path)
    with pytest.raises(ValueError, match=r"down_proj.*\(48, 16\) in the base model and \(24, 16\)"):
        gralora.load_adapter(tiny_llama(intermediate_size=48), tmp_path)


def test_taken_name_is_refused(tmp_path: Path) -> None:
    save_gralora(tmp_path)
    model = gralora.load_adapter(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match="'default' is taken"):
        gralora.load_adapter(model, tmp_path)


def test_trainable_and_frozen(tmp_path: Path) -> None:
    save_gralora(tmp_path)
    for is_trainable in (False, True):
        model = gralora.load_adapter(tiny_llama(), tmp_path, is_trainable=is_trainable)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert bool(trainable) == is_trainable == model.training
        assert all("lora_" in name for name in trainable)


class Others(nn.Module):
    """One module of every kind that is not linear, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.linear, self.embedding, self.conv = nn.Linear(8, 8), nn.Embedding(8, 8), nn.Conv1d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)


NOT_LINEAR = {
    "embedding": ({"target_modules": ["linear", "embedding"]}, "lora_embedding_A"),
    "embedding-only": ({"target_modules": ["embedding"]}, "lora_embedding_A"),
    "convolution": ({"target_modules": ["linear", "conv"]}, "convolution.*'conv'"),
    "attention": ({"target_modules": ["attention"]}, r"'attention\.base_layer\.out_proj'"),
    "parameters": ({"target_modules": [], "target_parameters": ["linear.weight"]}, r"target_parameters=\['linear"),
}


TOOLS = {
    "inspect": lambda adapter, out: gralora.inspect_adapter(adapter),
    "export": gralora.to_lora,
    "convert": lambda adapter, out: gralora.convert_adapter(adapter, out, to="peft"),
}


def check_exported(folder: Path, fields: dict[str, Any]) -> None:
    """The plain LoRA for PEFT changes the base's weights as the adapter does."""
    merged = []
    torch.manual_seed(0)
    base = Others()
    trained = adapted(copy.deepcopy(base), gralora_config(2, **fields))
    trained.save_pretrained(folder / "adapter")
    gralora.to_lora(folder / "adapter", folder / "out")
    for model in (trained, peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "out")):
        merged.append(model.merge_and_unload().state_dict())
    assert any(not torch.equal(merged[0][name], t) for name, t in base.state_dict().items())
    for name, t in merged[0].items():
        torch.testing.assert_close(merged[1][name], t, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Could not identify embedding layer")
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_adapters_of_other_layers_are_refused(tmp_path: Path, kind: str, tool: str) -> None:
    """They read factors of linear layers; for others the error names field or layer, and what works instead.

    Only the export for PEFT has a form for convolutions and parameters, and inspect reads them.
    """
    fields, problem = NOT_LINEAR[kind]
    if tool in ("export", "inspect") and kind in ("convolution", "parameters"):
        check_exported(tmp_path, fields)
        described = gralora.inspect_adapter(tmp_path / "adapter")
        assert described["anomalies"] == [] and described["layers"]
        assert all(d["norm"] > 0 and d["rank"] > 0 for d in described["layers"].values())
        return
    adapted(Others(), gralora_config(2, **fields)).save_pretrained(tmp_path / "adapter")
    advice = "`gralora merge` merges it into a base model that transformers can load; gralora.load_adapter loads it"
    with pytest.raises(ValueError, match=f"{problem}.*{advice}"):
        TOOLS[tool](tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Could not identify embedding layer")
@pytest.mark.parametrize("hybrid_r", [0, 2])
@pytest.mark.parametrize("fields", [fields for fields, _ in NOT_LINEAR.values()], ids=NOT_LINEAR)
def test_adapters_of_other_layers_are_loaded(tmp_path: Path, fields: dict[str, Any], hybrid_r: int) -> None:
    """Strictly, too: a tensor that is missing, of another size, or of other ranks than the config's is an error."""
    torch.manual_seed(0)
    base = Others()
    trained = adapted(copy.deepcopy(base), gralora_config(2, r=8, hybrid_r=hybrid_r, **fields))
    trained.save_pretrained(tmp_path)
    loaded = gralora.load_adapter(copy.deepcopy(base), tmp_path)
    config, tensors = read(tmp_path)
    found, expected = loaded.merge_and_unload().state_dict(), trained.merge_and_unload().state_dict()
    assert all(torch.equal(found[name], t) for name, t in expected.items())
    assert any(not torch.equal(found[name], t) for name, t in base.state_dict().items())
    (name, A), *_ = [(name, t) for name, t in tensors.items() if re.search("lora_(embedding_)?A", name)]
    write(tmp_path, config, {other: t for other, t in tensors.items() if other != name})
    with pytest.raises(ValueError, match="missing"):
        gralora.load_adapter(copy.deepcopy(base), tmp_path)
    write(tmp_path, config, tensors | {name: torch.cat([A, A], -2)})
    with pytest.raises(ValueError, match="shape|features|must"):
        gralora.load_adapter(copy.deepcopy(base), tmp_path)
    write(tmp_path, config | {"r": 1 << 19}, tensors)
    with pytest.raises(ValueError, match="524288|524286"):
        gralora.load_adapter(copy.deepcopy(base), tmp_path)


# What programs write for fields that they leave alone

LEFT_ALONE: dict[str, dict[str, Any]] = {
    "Axolotl": {"fan_in_fan_out": None, "target_parameters": [], "modules_to_save": None, "loftq_config": {}},
    "PEFT, of mixtures of experts": {"target_parameters": [], "rank_pattern": {}, "alpha_pattern": {}},
    "null": dict.fromkeys(
        [
            "fan_in_fan_out",
            "use_rslora",
            "use_dora",
            "lora_bias",
            "ensure_weight_tying",
            "rank_pattern",
            "alpha_pattern",
            "gralora_k_pattern",
            "target_parameters",
            "exclude_modules",
            "modules_to_save",
            "layers_to_transform",
            "layers_pattern",
            "lora_dropout",
            "layer_replication",
            "trainable_token_indices",
            "alora_invocation_tokens",
            "megatron_config",
            "loftq_config",
            "bias",
            "init_lora_weights",
            "gralora_scaling",
            "megatron_core",
            "qalora_group_size",
            "runtime_config",
        ]
    ),
    # fields that say how another is meant, which is not set
    "without what they belong to": {"ensure_weight_tying": True, "qalora_group_size": 32, "megatron_core": "mine"},
    "empty": {"exclude_modules": [], "modules_to_save": [], "layer_replication": [], "megatron_config": {}},
    "of a newer PEFT": {"a_new_field": None, "another": [], "a_third": False},
}


@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")  # PEFT's, of a base without a name
@pytest.mark.filterwarnings("error:.*config.*:UserWarning")
@pytest.mark.parametrize("fields", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_fields_left_alone_are_not_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Loaded, converted to PEFT's tuner, exported to every program and merged: with the same logits as without."""
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]  # of what SGLang fuses, all or none
    expected = save_gralora(tmp_path / "in", target_modules=targets)
    edit(tmp_path / "in", **fields)
    torch.testing.assert_close(logits(gralora.load_adapter(tiny_llama(), tmp_path / "in")), expected)
    assert gralora.inspect_adapter(tmp_path / "in")["anomalies"] == []
    gralora.convert_adapter(tmp_path / "in", tmp_path / "tuner", to="peft")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "tuner")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)
    base_config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
    for target in TARGETS:
        for_gguf = {"base_config": base_config} if target in GGUF_TARGETS else {}
        gralora.to_lora(tmp_path / "in", tmp_path / target, target, **for_gguf)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)
    tiny_llama().save_pretrained(tmp_path / "base")
    gralora.merge_adapter(tmp_path / "in", tmp_path / "merged", tmp_path / "base")
    merged = type(tiny_llama()).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)


def test_config_made_as_axolotl_makes_it(tmp_path: Path) -> None:
    """Axolotl passes None and [] to PEFT's config, which saves them as they are."""
    fields = {"fan_in_fan_out": None, "target_parameters": [], "layers_to_transform": None, "modules_to_save": None}
    expected = save_gralora(tmp_path, **fields, init_lora_weights=True, bias="none", task_type="CAUSAL_LM")
    saved = read(tmp_path)[0]
    assert saved["fan_in_fan_out"] is None and saved["target_parameters"] == []
    torch.testing.assert_close(logits(gralora.load_adapter(tiny_llama(), tmp_path)), expected)


# Plain LoRA, which load_adapter takes too

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "ranks": ("llama", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "use_rslora": True}),
    "DoRA": ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
    "bias": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "parameters": ("llama", {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}),
    "initialised by EVA": ("llama", {"target_modules": ["q_proj"], "eva_config": {"rho": 2.0}}),
}


def save_plain(folder: Path, model: str = "llama", **fields: Any) -> Tensor:
    trained = adapted(MODELS[model](), peft.LoraConfig(r=4, lora_alpha=7, **fields))
    trained.save_pretrained(folder, save_embedding_layers=False)
    return logits(trained)


@pytest.mark.parametrize("loaded_before", [False, True])
@pytest.mark.parametrize("model, fields", PLAIN.values(), ids=PLAIN)
def test_plain_lora_is_loaded(tmp_path: Path, model: str, fields: dict[str, Any], loaded_before: bool) -> None:
    """With the logits that it had, also beside a GraLoRA adapter."""
    expected, base = save_plain(tmp_path / "plain", model, **fields), MODELS[model]()
    if loaded_before:
        save_gralora(tmp_path / "gralora", model)
        base = gralora.load_adapter(base, tmp_path / "gralora")
    loaded = gralora.load_adapter(base, tmp_path / "plain", "plain")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)
    assert loaded.active_adapter == "plain" and not loaded.peft_config["plain"].use_gralora


def rename(tensors: dict[str, Tensor], name: str) -> None:
    """Give a layer's factors the name of a layer that no model has."""
    for factor in (name, name.replace("lora_A", "lora_B")):
        tensors[factor.replace("layers.1", "layers.7")] = tensors.pop(factor)


PLAIN_FAULTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor], str], Any], str]] = {
    "NaN": (lambda c, t, n: t[n].view(-1)[0:1].fill_(torch.nan), "1 of 8 tensors have NaN or infinite .*q_proj"),
    "infinite": (lambda c, t, n: t[n].view(-1)[0:1].fill_(-torch.inf), "NaN or infinite"),
    "zero": (lambda c, t, n: [x.zero_() for name, x in t.items() if "lora_B" in name], "B factors .* zero"),
    "missing factor": (lambda c, t, n: t.pop(n), "layers.1.self_attn.q_proj': factor A is missing"),
    "missing layer": (lambda c, t, n: (t.pop(n), t.pop(n.replace("_A", "_B"))), "selects 1 layers .*q_proj"),
    "rank": (lambda c, t, n: c.update(r=1 << 20), "A .4, 24., B .16, 4.; the config gives it rank 1048576"),
    "unselected": (lambda c, t, n: c.update(target_modules=["q_proj"]), "not select 2 layers .*down_proj"),
    "other layers": (lambda c, t, n: rename(t, n), "lacks 1 of the 4 layers .*layers.7"),
    "features": (lambda c, t, n: t.update({n: torch.ones(4, 5)}), r"q_proj' has \(in, out\) features \(16, 16\)"),
    "wrong type": (lambda c, t, n: c.update(lora_alpha="8"), "lora_alpha='8'"),
    "pattern": (lambda c, t, n: c.update(rank_pattern={"(": 3}), "rank_pattern .* no regular expression"),
}


@pytest.mark.parametrize("change, message", PLAIN_FAULTS.values(), ids=PLAIN_FAULTS)
def test_plain_lora_with_faults_is_refused(tmp_path: Path, change: Callable, message: str) -> None:
    """As a GraLoRA adapter is, and the model stays as it was."""
    save_plain(tmp_path, target_modules=["q_proj", "down_proj"])
    config, tensors = read(tmp_path)
    change(config, tensors, "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight")
    write(tmp_path, config, tensors)
    model = tiny_llama()
    with assert_unchanged(model, token_ids(2, 5)), pytest.raises(ValueError, match=message):
        gralora.load_adapter(model, tmp_path)
