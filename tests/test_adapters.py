"""Merging on disk, inspecting, and the four commands."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import MODELS, Factors, naive_delta, tiny_gpt2, tiny_llama
from matplotlib.axes import Axes
from safetensors.torch import load_file
from saved import FORMATS, edit, logits, read, save, save_gralora, write
from torch import nn
from transformers import AutoModelForCausalLM

import gralora
from gralora.checkpoints import drawing, files, formats, merge
from gralora.checkpoints.base import INDEX
from gralora.checkpoints.files import LazyTensors, new_folder, read_safetensors, write_safetensors
from gralora.tool import adapters, cli


def save_base(folder: Path, model: nn.Module, shards: bool = False) -> Path:
    model.save_pretrained(folder, max_shard_size="4KB" if shards else "1GB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


# Merge


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_merged_model_gives_the_adapters_logits(tmp_path: Path, model: str, shards: bool) -> None:
    expected = save_gralora(tmp_path / "in", model)
    save_base(tmp_path / "base", MODELS[model](), shards)
    result = gralora.merge_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base")
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=1e-4)
    assert (expected - logits(load(tmp_path / "base"))).abs().max() > 0.1
    assert result["layers"] == result["verified"] > 0
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (len([name for name in names if name.endswith(".safetensors")]) > 2) == shards


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_can_be_merged(tmp_path: Path, name: str) -> None:
    expected = save(tmp_path / "in", name)
    gralora.merge_adapter(tmp_path / "in", tmp_path / "out", save_base(tmp_path / "base", tiny_llama()))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chosen", [False, True])
def test_merged_weights_are_rounded_once(tmp_path: Path, dtype: torch.dtype, chosen: bool) -> None:
    """From a base of the dtype, or from a float32 base with --dtype: the float32 sum, cast."""
    save_gralora(tmp_path / "in")
    base = tiny_llama() if chosen else tiny_llama(dtype)
    save_base(tmp_path / "base", base, shards=True)
    gralora.merge_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base", dtype=dtype if chosen else None)
    merged = load(tmp_path / "out", "auto")
    assert merged.dtype == dtype
    with_adapter = gralora.load_adapter(base.float(), tmp_path / "in")
    expected = with_adapter.merge_and_unload().state_dict()
    for name, t in merged.state_dict().items():
        assert torch.equal(t, expected[name].to(dtype)), name
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tensors = [t for path in (tmp_path / "out").glob("*.safetensors") for t in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in tensors)


def test_modules_to_save_replace_the_bases(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in", modules_to_save=["lm_head"])
    config, tensors = read(tmp_path / "in")
    write(tmp_path / "in", config, {n: 2 * t if "lm_head" in n else t for n, t in tensors.items()})
    save_base(tmp_path / "base", tiny_llama())
    result = gralora.merge_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base")
    expected = logits(gralora.load_adapter(tiny_llama(), tmp_path / "in"))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=1e-4)
    assert result["replaced"] == ["lm_head.weight"]


def test_output_layer_with_its_saved_base_weight(tmp_path: Path) -> None:
    expected = save_gralora(tmp_path / "in", target_modules=["lm_head", "q_proj"])
    gralora.merge_adapter(tmp_path / "in", tmp_path / "out", save_base(tmp_path / "base", tiny_llama()))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=1e-4)


def test_bias_of_an_adapter_is_merged(tmp_path: Path) -> None:
    expected = save_gralora(tmp_path / "in", "gpt2", lora_bias=True)
    gralora.merge_adapter(tmp_path / "in", tmp_path / "out", save_base(tmp_path / "base", tiny_gpt2()))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=1e-4)
    biases = [name for name in read(tmp_path / "in")[1] if name.endswith("lora_B.bias")]
    assert len(biases) == 6


def test_square_weight_of_unclear_orientation_is_merged_in_memory(tmp_path: Path) -> None:
    """GPT-2's attn.c_proj is square; c_attn shows that the base stores weights the other way than the config says."""
    save_gralora(tmp_path / "in", "gpt2")
    save_base(tmp_path / "base", tiny_gpt2())
    gralora.merge_adapter(tmp_path / "in", tmp_path / "expected", tmp_path / "base")
    edit(tmp_path / "in", fan_in_fan_out=False)
    result = gralora.merge_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base")
    assert "in memory" in result["notices"][0] and "c_proj" in result["notices"][0]
    found, expected = (read_safetensors(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def test_interrupted_merge_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = save_gralora(tmp_path / "in")
    save_base(tmp_path / "base", tiny_llama(), shards=True)
    calls = []

    def stops_at_third(path: Path, tensors: LazyTensors, done: object) -> None:
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_safetensors(path, tensors, done)

    monkeypatch.setattr(merge, "write_safetensors", stops_at_third)
    with pytest.raises(KeyboardInterrupt):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base")
    assert not (tmp_path / "out").exists()
    result = gralora.merge_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base")
    assert len(result["resumed"]) == 2 and calls[2] == calls[3]
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "in", "out"]


def test_interrupted_merge_of_another_adapter_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_gralora(tmp_path / "other", lora_alpha=1)
    expected = save_gralora(tmp_path / "in")
    save_base(tmp_path / "base", tiny_llama(), shards=True)
    monkeypatch.setattr(merge, "copy_other_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        gralora.merge_adapter(tmp_path / "other", tmp_path / "out", tmp_path / "base")
    monkeypatch.undo()
    assert gralora.merge_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base")["resumed"] == []
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", ["dtype", "base", "file"])
def test_interrupted_merge_goes_on_with_what_is_unchanged_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Another dtype or other weights of the base: nothing of it. A file that is gone: the others."""
    save_gralora(tmp_path / "in")
    base = save_base(tmp_path / "base", tiny_llama(), shards=True)
    monkeypatch.setattr(merge, "copy_other_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", base)
    monkeypatch.undo()
    written = sorted(path.name for path in (tmp_path / ".out.partial").glob("*.safetensors"))
    model, dtype = tiny_llama(), torch.bfloat16 if change == "dtype" else None
    if change == "base":  # of the same sizes
        for p in model.parameters():
            p.data *= 2
        save_base(base, model, shards=True)
    if change == "file":
        (tmp_path / ".out.partial" / written[2]).unlink()
    result = gralora.merge_adapter(tmp_path / "in", tmp_path / "out", base, dtype=dtype)
    assert result["resumed"] == ([name for name in written if name != written[2]] if change == "file" else [])
    expected = gralora.load_adapter(model, tmp_path / "in").merge_and_unload().to(dtype or torch.float32).state_dict()
    merged = load(tmp_path / "out", "auto").state_dict()
    for name, t in merged.items():
        torch.testing.assert_close(t, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checked", [8, 2])
def test_wrong_weights_on_disk_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: int, dtype: torch.dtype | None
) -> None:
    """Also of a sample, which is spread over the layers, and if they are off by few roundings of a low precision."""
    save_gralora(tmp_path / "in")
    base = save_base(tmp_path / "base", tiny_llama(), shards=True)
    monkeypatch.setattr(merge, "VERIFIED", checked)
    result = gralora.merge_adapter(tmp_path / "in", tmp_path / "good", tmp_path / "base", dtype=dtype)
    assert result["verified"] == min(checked, 6)
    shutil.rmtree(tmp_path / "good")
    layers = formats.read(*files.read_adapter_folder(tmp_path / "in")).layers
    wrong = f"{layers[3]}.weight"

    def damaged(path: Path, tensors: LazyTensors, done: object) -> None:
        factor = 1 + 4 * torch.finfo(dtype or torch.bfloat16).eps
        write_safetensors(path, {n: t * factor if n == wrong else t for n, t in tensors.items()})

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"weight '{wrong}' is not base"):
        patch.setattr(merge, "write_safetensors", damaged)
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base", dtype=dtype)
    assert not (tmp_path / "out").exists()
    result = gralora.merge_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base", dtype=dtype)
    shards = {path.name for path in base.glob("*.safetensors")}
    assert shards - set(result["resumed"]) == {json.loads((base / INDEX).read_text())["weight_map"][wrong]}
    expected = gralora.load_adapter(tiny_llama(), tmp_path / "in").merge_and_unload().to(dtype or torch.float32)
    for name, t in load(tmp_path / "out", "auto").state_dict().items():
        torch.testing.assert_close(t, expected.state_dict()[name], rtol=0, atol=1e-6)


def test_what_can_be_known_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the last layer of an adapter is no surprise after hours."""
    save_gralora(tmp_path / "in")
    config, tensors = read(tmp_path / "in")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"].view(-1)[-1] = torch.nan
    write(tmp_path / "in", config, tensors)
    save_base(tmp_path / "base", tiny_llama(), shards=True)
    monkeypatch.setattr(merge, "write_safetensors", lambda *_: pytest.fail("a file was written"))
    with pytest.raises(ValueError, match="1 of 24 tensors have NaN or infinite values: .*q_proj"):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "in"]


def test_sum_that_no_dtype_holds_leaves_nothing_behind(tmp_path: Path) -> None:
    """float16 ends at 65504: such a merge can never be done, so its files are of no use."""
    save_gralora(tmp_path / "in", lora_alpha=10**7)
    save_base(tmp_path / "base", tiny_llama(), shards=True)
    with pytest.raises(ValueError, match="NaN or infinite values in torch.float16"):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "in"]


def test_layer_without_an_update_is_merged(tmp_path: Path) -> None:
    """Its weight is rounded, and of its update, which is zero, nothing is lost."""
    save_gralora(tmp_path / "in", hybrid_r=0)
    config, tensors = read(tmp_path / "in")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"].zero_()
    write(tmp_path / "in", config, tensors)
    save_base(tmp_path / "base", tiny_llama())
    result = gralora.merge_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base", dtype=torch.bfloat16)
    rounding = result["rounding"]["model.layers.1.self_attn.q_proj"]
    assert rounding["of_update"] == 0 < rounding["of_weight"]


def test_the_bar_of_a_merge_is_for_terminals(monkeypatch):
    """Where it is wanted, TQDM_DISABLE still turns it off, which the command sets; a False of ours would not."""
    given = []
    monkeypatch.setattr("tqdm.tqdm", lambda **options: given.append(options))
    for show in (True, False):
        merge._progress_bar(SimpleNamespace(files={}, file_of={}), [], show)
    assert ["disable" in options for options in given] == [False, True]


@pytest.mark.parametrize("tool", ["load", "inspect", "convert", "export", "merge"])
@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["q_proj", "k_proj"]}, {"exclude_modules": ["down_proj"]}, {"layers_to_transform": [0]}],
    ids=str,
)
def test_layers_that_the_config_does_not_select_are_refused(tmp_path: Path, tool: str, fields: dict) -> None:
    """By every tool: PEFT would load such an adapter without them."""
    save_gralora(tmp_path / "in")
    edit(tmp_path / "in", **fields)
    save_base(tmp_path / "base", tiny_llama())
    tools = {
        "load": lambda adapter, out: gralora.load_adapter(tiny_llama(), adapter),
        "inspect": lambda adapter, out: gralora.inspect_adapter(adapter),
        "convert": gralora.convert_adapter,
        "export": gralora.to_lora,
        "merge": lambda adapter, out: gralora.merge_adapter(adapter, out, tmp_path / "base"),
    }
    (name,) = fields
    with pytest.raises(ValueError, match=f"the config does not select [23] layers of the file: .*{name}="):
        tools[tool](tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_merged_config_names_the_dtype_as_the_bases_does(tmp_path: Path, key: str) -> None:
    save_gralora(tmp_path / "in")
    base = save_base(tmp_path / "base", tiny_llama())
    config = json.loads((base / "config.json").read_text())
    config[key] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    gralora.merge_adapter(tmp_path / "in", tmp_path / "out", base, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {key: "bfloat16"}


def test_merge_refuses_what_does_not_fit(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in")
    with pytest.raises(FileNotFoundError, match="--base FOLDER"):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="not in the local Hub cache"):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", "nobody/nothing")
    wide = save_base(tmp_path / "wide", tiny_llama(intermediate_size=48))
    with pytest.raises(ValueError, match=r"down_proj.weight' is \(16, 48\)"):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", wide)
    short = save_base(tmp_path / "short", tiny_llama(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"do not have 3 of the tensors.*layers\.1"):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", short)
    save_gralora(tmp_path / "vocabulary", modules_to_save=["lm_head"])
    more = save_base(tmp_path / "more", tiny_llama(vocab_size=40))
    with pytest.raises(ValueError, match=r"lm_head.weight' is \(32, 16\) .* and \(40, 16\) in the base"):
        gralora.merge_adapter(tmp_path / "vocabulary", tmp_path / "out", more)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(ValueError, match="quantised"):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", short)


# Inspect


def test_inspect_measures_the_updates(tmp_path: Path) -> None:
    save_gralora(tmp_path, r=10, hybrid_r=2, lora_alpha=5, rank_pattern={"q_proj": 4})
    description = gralora.inspect_adapter(tmp_path)
    assert description["format"] == "gralora" and description["anomalies"] == []
    assert description["parameters"] == sum(t.numel() for t in read(tmp_path)[1].values())
    model = gralora.load_adapter(tiny_llama().double(), tmp_path)
    squares = 0.0
    for layer, d in description["layers"].items():
        dW = model.base_model.model.get_submodule(layer).get_delta_weight("default").double()
        assert d["norm"] == pytest.approx(dW.norm().item(), rel=1e-5)
        assert d["spectral_norm"] == pytest.approx(torch.linalg.matrix_norm(dW, 2).item(), rel=1e-5)
        assert d["rank"] == torch.linalg.matrix_rank(dW, rtol=1e-4) == d["lora_rank"]
        squares += d["norm"] ** 2
    assert {d["rank"] for d in description["layers"].values()} == {6, 8, 16}  # 2 * 2 + 2; 8 features; of 2 * 8 + 2
    assert description["norm"] == pytest.approx(squares**0.5)


def test_rank_counts_what_float32_tells_from_zero(tmp_path: Path) -> None:
    """And the norms of a layer's factors are those of all its tensors, the hybrid part included."""
    save_gralora(tmp_path)
    config, tensors = read(tmp_path)
    prefix = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    tensors[f"{prefix}B.hybrid_weight"] *= torch.tensor([1e-3, 1e-12])
    write(tmp_path, config, tensors)
    layer = gralora.inspect_adapter(tmp_path)["layers"]["model.layers.1.self_attn.q_proj"]
    assert layer["rank"] == layer["lora_rank"] - 1
    for factor in "AB":
        norms = [tensors[f"{prefix}{factor}.{name}"].norm().item() for name in ("weight", "hybrid_weight")]
        assert layer[f"norm_{factor}"] == pytest.approx(sum(norm**2 for norm in norms) ** 0.5)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_can_be_inspected(tmp_path: Path, name: str) -> None:
    save(tmp_path, name)
    description = gralora.inspect_adapter(tmp_path)
    assert (description["format"], description["r"], description["hybrid_r"]) == (name, 8, 2)
    assert description["anomalies"] == [] and bool(description["notices"]) == (name == "fork")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t[n].view(-1)[0:1].fill_(torch.nan), "q_proj: NaN or infinite"),
        (lambda t, n: [t[x].zero_() for x in (n, n.replace(".weight", ".hybrid_weight"))], "q_proj: B is zero"),
        (
            lambda t, n: [t[x.replace("_B", "_A")].zero_() for x in (n, n.replace(".weight", ".hybrid_weight"))],
            "q_proj: A is zero",
        ),
        (lambda t, n: [t[x].zero_() for x in t if "lora_B" in x], "all B factors are zero"),
        (lambda t, n: t.update({"base_model.model.extra.weight": torch.ones(1)}), "does not explain.*extra"),
    ],
)
def test_anomalies_are_found(tmp_path: Path, change, message: str) -> None:
    save_gralora(tmp_path)
    config, tensors = read(tmp_path)
    change(tensors, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    write(tmp_path, config, tensors)
    (anomaly,) = gralora.inspect_adapter(tmp_path)["anomalies"]
    assert re.search(message, anomaly)


def test_missing_module_to_save_is_an_anomaly(tmp_path: Path) -> None:
    save_gralora(tmp_path)
    edit(tmp_path, modules_to_save=["lm_head"])
    assert "'lm_head'" in gralora.inspect_adapter(tmp_path)["anomalies"][0]


# Files


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def test_safetensors_round_trip_of_every_dtype(tmp_path: Path) -> None:
    floats = {str(d): torch.randn(3, 5).to(d) for d in files.DTYPES.values() if d.is_floating_point}
    integers = {str(d): torch.randint(0, 2, (7,)).to(d) for d in files.DTYPES.values() if not d.is_floating_point}
    tensors = (
        floats | integers | {"transposed": torch.randn(4, 6).T, "scalar": torch.tensor(2.0), "empty": torch.ones(0)}
    )
    write_safetensors(tmp_path / "file", tensors)
    content = (tmp_path / "file").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0
    assert all(header[name]["data_offsets"][0] % t.element_size() == 0 for name, t in tensors.items())  # aligned
    for result in (dict(read_safetensors(tmp_path / "file")), load_file(tmp_path / "file")):
        assert result.keys() == tensors.keys()
        for name, t in tensors.items():
            assert result[name].dtype == t.dtype and result[name].shape == t.shape
            assert torch.equal(as_bytes(result[name]), as_bytes(t)), name


def test_tensor_that_is_not_as_announced_is_refused(tmp_path: Path) -> None:
    tensors = LazyTensors({"a": torch.ones(2)}, lambda name: torch.ones(3))
    with pytest.raises(ValueError, match=r"'a' is \(3,\)"):
        write_safetensors(tmp_path / "file", tensors)
    tensors = LazyTensors({"a": torch.ones(2)}, lambda name: torch.ones(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"'a' is \(2,\) torch.int32, announced as \(2,\) torch.float32"):
        write_safetensors(tmp_path / "file", tensors)


def test_lazy_tensors_are_a_mapping(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "file", {"a": torch.ones(2)})
    for tensors in (
        read_safetensors(tmp_path / "file"),
        LazyTensors({"a": torch.ones(2)}, lambda name: torch.ones(2)),
    ):
        assert "b" not in tensors and tensors.get("b") is None and len(tensors) == 1
        with pytest.raises(KeyError, match="b"):
            tensors["b"]


def test_json_that_programs_read_differently_is_refused(tmp_path: Path) -> None:
    """A field that is there twice, wherever; and what nests so deep that some cannot read it."""
    for text in ('{"r": 8, "alpha": 1, "r": 4}', '{"rank_pattern": {"r": 8, "r": 8}}'):
        (tmp_path / "file").write_text(text)
        with pytest.raises(ValueError, match="the field 'r' is there twice"):
            files.read_json(tmp_path / "file")
    for depth in (files.DEPTH, files.DEPTH + 1):
        (tmp_path / "file").write_text('{"a":' * depth + "1" + "}" * depth)
        if depth == files.DEPTH:
            assert list(files.read_json(tmp_path / "file")) == ["a"]
        else:
            with pytest.raises(ValueError, match=f"nests deeper than {files.DEPTH} levels"):
                files.read_json(tmp_path / "file")


def test_new_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(FileExistsError, match="out' exists; choose another name"), new_folder(tmp_path / "out"):
        pytest.fail("written into")


# Commands


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(tmp_path / "in", "fork")
    adapters.convert_command([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "peft"])
    out = capsys.readouterr().out
    assert "dropped 12 tensors" in out and "fork -> peft: 6 layers" in out
    assert read(tmp_path / "out")[0]["peft_type"] == "GRALORA"


def test_export_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_gralora(tmp_path / "in")
    arguments = ["--for", "llamacpp", "--arch", "llama", "--heads", "2", "--kv-heads", "1"]
    adapters.export_command([str(tmp_path / "in"), str(tmp_path / "out"), *arguments])
    out = capsys.readouterr().out
    assert "rank 14, float32, copied" in out
    assert out.endswith(f"llama-server --model BASE_MODEL.gguf --lora {tmp_path / 'out' / 'adapter.gguf'}\n")
    adapters.export_command(
        [
            str(tmp_path / "in"),
            str(tmp_path / "lossy"),
            "--for",
            "peft",
            "--max-rank",
            "3",
            "--lossy",
            "--dtype",
            "float16",
        ]
    )
    out = capsys.readouterr().out
    assert "rank 3, float16, truncated" in out and "relative error of dW by layer" in out and "worst: 0." in out


def test_merge_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_gralora(tmp_path / "in")
    base = save_base(tmp_path / "base", tiny_llama())
    edit(tmp_path / "in", base_model_name_or_path=str(base))
    adapters.merge_command([str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", "bfloat16"])
    captured = capsys.readouterr()
    assert "merged 6 layers, checked 6" in captured.out and "merge: 100%" in captured.err
    assert load(tmp_path / "out", "auto").dtype == torch.bfloat16


def test_inspect_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_gralora(tmp_path / "in")
    adapters.inspect_command([str(tmp_path / "in"), "--json"])
    assert json.loads(capsys.readouterr().out) == gralora.inspect_adapter(tmp_path / "in")
    png = tmp_path / "norms.png"
    adapters.inspect_command([str(tmp_path / "in"), "--png", str(png), "--layers", "q_proj"])
    out = capsys.readouterr().out
    assert "no anomalies" in out and "drew the blocks of 2 layers" in out and "q_proj" in out
    assert png.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="matches none"):
        adapters.inspect_command([str(tmp_path / "in"), "--png", str(png), "--layers", "nothing"])


def test_inspect_prints_numbers_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In a pipe of any width, and in 80 columns, where long names go on in the next line."""
    save_gralora(tmp_path / "in")
    layers = gralora.inspect_adapter(tmp_path / "in")["layers"]
    for columns in ("20", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        adapters.inspect_command([str(tmp_path / "in")])
        printed = capsys.readouterr().out
        rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(" layers.")}
        assert len(rows) == len(layers) and "\N{HORIZONTAL ELLIPSIS}" not in printed
        for name, d in layers.items():
            shown = rows[name.removeprefix("model.")]
            assert shown[:2] == [str(d["in_features"]), str(d["out_features"])], shown
            assert f"{d['norm']:.3g}" in shown and f"{d['rank']}/{d['lora_rank']}" in shown
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    adapters.inspect_command([str(tmp_path / "in")])
    printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert max(map(len, printed.splitlines())) <= 80 and "\N{HORIZONTAL ELLIPSIS}" not in printed


def test_a_heat_map_of_all_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A row for each kind of layer, a column for each depth; nothing where an adapter has no layer."""
    save_gralora(tmp_path / "in")
    config, tensors = read(tmp_path / "in")
    renamed = {name.replace("layers.1.", "layers.3."): t for name, t in tensors.items() if "layers.1.mlp" not in name}
    write(tmp_path / "in", config, renamed)
    drawn: list[Any] = []
    imshow = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, image, **options: drawn.append(image) or imshow(self, image))
    assert cli.main(["inspect", str(tmp_path / "in"), "--png", str(tmp_path / "norms.png")]) == 0
    found = gralora.inspect_adapter(tmp_path / "in")["layers"]
    assert f"drew the norms of all {len(found)} layers" in capsys.readouterr().out
    kinds = list(dict.fromkeys(name.split(".", 3)[3] for name in found))
    norms = {name: d["norm"] for name, d in found.items()}
    expected = [[norms.get(f"model.layers.{d}.{kind}", torch.nan) for d in range(4)] for kind in kinds]
    torch.testing.assert_close(torch.tensor(drawn[0]), torch.tensor(expected), equal_nan=True)
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(tmp_path / "in"), "--layers", "q_proj"])


def test_kinds_and_depths_of_layers() -> None:
    places = {
        "model.layers.12.self_attn.q_proj": ("self_attn.q_proj", 12),
        "model.layers.3.mlp.experts.7.w1": ("mlp.experts.*.w1", 3),
        "transformer.h.4.attn.c_attn": ("transformer.attn.c_attn", 4),
        "lm_head": ("lm_head", 0),
        "down_blocks.1.resnets.0.conv1": ("down_blocks.resnets.*.conv1", 1),
    }
    assert {name: drawing.place_of(name) for name in places} == places


def test_commands_are_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(tmp_path / "in", "squeezebits")
    assert cli.main(["inspect", str(tmp_path / "in")]) == 0
    assert cli.main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert cli.main(["export", str(tmp_path / "out"), str(tmp_path / "plain"), "--for", "mlx"]) == 0
    save_base(tmp_path / "base", tiny_llama())
    assert cli.main(["merge", str(tmp_path / "out"), str(tmp_path / "merged"), "--base", str(tmp_path / "base")]) == 0
    assert cli.main(["inspect", str(tmp_path / "plain")]) == cli.USER_ERROR
    assert "adapter_model.safetensors" in capsys.readouterr().err


def test_public_names_are_lazy_and_complete() -> None:
    assert all(callable(getattr(gralora, name)) for name in gralora.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = gralora.nothing


def test_inputs_are_not_changed(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in")
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    gralora.to_lora(tmp_path / "in", tmp_path / "out")
    gralora.merge_adapter(tmp_path / "in", tmp_path / "merged", save_base(tmp_path / "base", tiny_llama()))
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def test_layers_are_inspected_in_their_order(tmp_path: Path) -> None:
    """Layer 10 comes after layer 2, and the layers of a block stay together."""
    save_gralora(tmp_path / "in")
    config, tensors = read(tmp_path / "in")
    later = {"layers.0.": "layers.10.", "layers.1.": "layers.2."}
    renamed = {re.sub("|".join(later), lambda found: later[found[0]], name): t for name, t in tensors.items()}
    write(tmp_path / "in", config, renamed)
    layers = list(gralora.inspect_adapter(tmp_path / "in")["layers"])
    assert [name.split(".")[2] for name in layers] == ["2"] * (len(layers) // 2) + ["10"] * (len(layers) // 2)


def test_heat_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry (j, i) is the norm of dW's block there; of more layers than fit, those drawn are spread over all."""
    save_gralora(tmp_path / "in", hybrid_r=0)
    config, tensors = read(tmp_path / "in")
    names = {"layers.0": "layers.2", "layers.1": "layers.10"}
    tensors = {re.sub("|".join(names), lambda m: names[m[0]], name): t for name, t in tensors.items()}
    write(tmp_path / "in", config, tensors)
    drawn: list[Any] = []
    imshow = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, image, **options: drawn.append(image) or imshow(self, image))
    monkeypatch.setattr(drawing, "PANELS", 3)
    layers, matching = drawing.draw_block_norms(tmp_path / "in", tmp_path / "norms.png")
    assert matching == len(gralora.inspect_adapter(tmp_path / "in")["layers"])
    assert len({name.split(".")[-1] for name in layers}) == len(layers) == 3, "of three kinds"
    assert {name.split(".")[2] for name in layers} == {"2", "10"}, "and of both depths"
    read_back = formats.read(*files.read_adapter_folder(tmp_path / "in"))
    for layer, norms in zip(layers, drawn, strict=True):
        dW = read_back.scaling(layer) * naive_delta(Factors(*read_back.factors(layer)[:4]))
        (rows, columns), k = dW.shape, len(norms)
        blocks = dW.reshape(k, rows // k, k, columns // k).double()
        torch.testing.assert_close(torch.tensor(norms).double(), blocks.norm(dim=(1, 3)), rtol=1e-5, atol=0)


def test_commands_for_scripts(tmp_path, capsys):
    """--json: one object on stdout; --quiet: nothing; what is written is the same."""
    save_gralora(tmp_path / "in")
    base = save_base(tmp_path / "base", tiny_llama())
    commands = {
        "convert": (["--to", "peft"], "layers"),
        "export": (["--for", "peft"], "rank"),
        "merge": (["--base", str(base)], "layers"),
    }
    for name, (flags, key) in commands.items():
        for flag in ("--json", "--quiet"):
            arguments = [name, str(tmp_path / "in"), str(tmp_path / f"{name}{flag}"), *flags, flag]
            assert cli.main(arguments) == 0
            out = capsys.readouterr().out
            assert json.loads(out)[key] > 0 if flag == "--json" else out == ""
        written = [sorted(f.name for f in (tmp_path / f"{name}{flag}").iterdir()) for flag in ("--json", "--quiet")]
        assert written[0] == written[1]
