"""GraLoRA adapters of diffusers' models: saved, read again, hotswapped, exported; and read there without gralora.

The models and pipelines are tiny and made from configs.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from helpers import add_by_transformers, gralora_config, randomize
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gralora
from gralora.tool import cli

diffusers = pytest.importorskip("diffusers")
from diffusers.training_utils import _collate_lora_metadata  # noqa: E402
from diffusers.utils import convert_state_dict_to_diffusers  # noqa: E402
from pictures import FILE, MODELS, TEXT_IDS, make, output, outputs_of_sdxl, pipeline_of, sdxl, text_encoder  # noqa: E402

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
hybrids = pytest.mark.parametrize("hybrid_r", [0, 4])


class Places(NamedTuple):
    """A model, and what a UNet has beside attention: convolutions."""

    model: str
    targets: list[str]


PLACES = [Places(name, TARGETS) for name in MODELS] + [Places("unet", [*TARGETS, "conv1", "conv_shortcut"])]
places = pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.model}-{len(place.targets)}")


def trained(name: str, targets: list[str], hybrid_r: int, seed: int = 0, **fields: Any) -> nn.Module:
    model = make(name)
    model.add_adapter(gralora_config(2, 8, hybrid_r, target_modules=targets, **fields))
    return randomize(model, seed=seed).eval()


@places
@hybrids
@torch.no_grad()
def test_what_is_saved_is_read(place, hybrid_r, tmp_path):
    model = trained(place.model, place.targets, hybrid_r)
    expected = output(place.model, model)
    assert (expected - output(place.model, make(place.model))).abs().max() > 0.1
    model.save_lora_adapter(tmp_path)
    read = make(place.model)
    read.load_lora_adapter(tmp_path, prefix=None, weight_name=FILE)
    assert torch.equal(output(place.model, read), expected)
    (config,) = read.peft_config.values()
    assert (config.use_gralora, config.gralora_k, config.hybrid_r) == (True, 2, hybrid_r)


@places
@hybrids
@torch.no_grad()
def test_hotswap(place, hybrid_r, tmp_path):
    for seed in (0, 1):
        trained(place.model, place.targets, hybrid_r, seed).save_lora_adapter(tmp_path / str(seed))
    expected = output(place.model, trained(place.model, place.targets, hybrid_r, 1))
    model = make(place.model)
    model.load_lora_adapter(tmp_path / "0", prefix=None, weight_name=FILE, adapter_name="one")
    before = output(place.model, model)
    model.load_lora_adapter(tmp_path / "1", prefix=None, weight_name=FILE, adapter_name="one", hotswap=True)
    assert torch.equal(output(place.model, model), expected) and not torch.allclose(before, expected, atol=0.1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_hotswap_of_lower_ranks(name, tmp_path):
    """After enable_lora_hotswap, as diffusers asks for adapters of other ranks and compiled models."""
    models = [trained(name, TARGETS, 4), make(name)]
    models[1].add_adapter(gralora_config(2, 6, 4, target_modules=TARGETS))
    randomize(models[1], seed=1)
    for i, model in enumerate(models):
        save_pipeline(tmp_path / str(i), name, model)
    pipeline = pipeline_of(name)
    pipeline.enable_lora_hotswap(target_rank=12)
    part = "unet" if name == "unet" else "transformer"
    for i in (0, 1, 0):
        swap = {"hotswap": True} if getattr(getattr(pipeline, part), "peft_config", {}) else {}
        pipeline.load_lora_weights(tmp_path / str(i), weight_name=FILE, adapter_name="one", **swap)
        torch.testing.assert_close(output(name, getattr(pipeline, part)), output(name, models[i]))


def save_pipeline(folder: Path, name: str, model: nn.Module, encoder: nn.Module | None = None) -> None:
    """As diffusers' training scripts save."""
    parts = {("unet" if name == "unet" else "transformer"): model} | ({"text_encoder": encoder} if encoder else {})
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(model) for part, model in parts.items()}
    if name == "unet":
        layers = {part: convert_state_dict_to_diffusers(tensors) for part, tensors in layers.items()}
    type(pipeline_of(name)).save_lora_weights(folder, **layers, **_collate_lora_metadata(parts))


def trained_encoder(hybrid_r: int) -> nn.Module:
    encoder = text_encoder()
    add_by_transformers(encoder, gralora_config(2, 8, hybrid_r, target_modules=["q_proj", "v_proj", "fc1"]))
    return randomize(encoder, seed=3).eval()


@pytest.mark.parametrize("name", MODELS)
@hybrids
@torch.no_grad()
def test_pipelines(name, hybrid_r, tmp_path):
    """Load, set_adapters with weights, fuse, unfuse, unload; of Stable Diffusion also the text encoder."""
    model, encoder = trained(name, TARGETS, hybrid_r), trained_encoder(hybrid_r) if name == "unet" else None
    save_pipeline(tmp_path, name, model, encoder)
    pipeline = pipeline_of(name)
    part = "unet" if name == "unet" else "transformer"
    base = output(name, getattr(pipeline, part))
    pipeline.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="style")
    expected = output(name, model)
    assert torch.equal(output(name, getattr(pipeline, part)), expected)
    if encoder is not None:
        assert torch.equal(
            pipeline.text_encoder.eval()(TEXT_IDS).last_hidden_state, encoder(TEXT_IDS).last_hidden_state
        )
    pipeline.set_adapters(["style"], [0.5])
    model.set_adapters(["default"], [0.5])
    half = output(name, model)
    assert torch.equal(output(name, getattr(pipeline, part)), half) and not torch.allclose(half, expected, atol=1e-3)
    pipeline.fuse_lora()
    torch.testing.assert_close(output(name, getattr(pipeline, part)), half, rtol=1e-4, atol=1e-4)
    pipeline.unfuse_lora()
    torch.testing.assert_close(output(name, getattr(pipeline, part)), half, rtol=1e-4, atol=1e-4)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(output(name, getattr(pipeline, part)), base, rtol=1e-4, atol=1e-4)


@places
@torch.no_grad()
def test_plain_lora_accelerated(place, tmp_path):
    """Outputs and files are those without: of an adapter that is added, scaled, saved, read, fused and unloaded."""
    found = []
    for accelerated in (False, True):
        model, folder = make(place.model), tmp_path / str(accelerated)
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=place.targets))
        model = randomize(model).eval()
        read = make(place.model)
        for one in (model, read) if accelerated else ():
            gralora.accelerate(one)
        model.save_lora_adapter(folder)
        read.load_lora_adapter(folder, prefix=None, weight_name=FILE, adapter_name="style")
        linears = sum(isinstance(layer, peft.tuners.lora.Linear) for layer in read.modules())
        assert linears and gralora.describe(read).startswith(f"{linears if accelerated else 0} of ")
        outputs = [output(place.model, model), output(place.model, read)]
        read.set_adapters(["style"], [0.5])
        outputs.append(output(place.model, read))
        read.fuse_lora()
        outputs.append(output(place.model, read))
        read.unfuse_lora()
        read.unload_lora()
        read.load_lora_adapter(folder, prefix=None, weight_name=FILE, adapter_name="again")
        assert gralora.describe(read).startswith(f"{linears if accelerated else 0} of ")
        found.append([*outputs, output(place.model, read)])
    files = [safe_open(tmp_path / which / FILE, "pt") for which in ("True", "False")]
    names = sorted(files[0].keys())
    assert names == sorted(files[1].keys()) and files[0].metadata() == files[1].metadata()
    assert all(torch.equal(*(file.get_tensor(name) for file in files)) for name in names)
    for own, wanted in zip(*found, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_file_without_a_config(name, tmp_path):
    """As `save_lora_weights` writes it without metadata: refused, and read as the refusal says."""
    model, encoder = trained(name, TARGETS, 4), trained_encoder(4)
    part = "unet" if name == "unet" else "transformer"
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(model)}
    if name == "unet":
        layers["text_encoder_lora_layers"] = get_peft_model_state_dict(encoder)
    pipeline = pipeline_of(name)
    pipeline.save_lora_weights(tmp_path, **layers)
    with pytest.raises(
        ValueError, match=r"has a GraLoRA adapter, whose .*lora_B.weight is \[2, 4, \d+\], and no config"
    ):
        pipeline.load_lora_weights(tmp_path)
    tensors = {n: t for n, t in load_file(tmp_path / FILE).items() if n.startswith(f"{part}.")}
    again = make(name)
    with pytest.raises(ValueError, match="peft.set_peft_model_state_dict"):
        again.load_lora_adapter(tensors, prefix=part)
    again.add_adapter(model.peft_config["default"])
    peft.set_peft_model_state_dict(again, {n.removeprefix(f"{part}."): t for n, t in tensors.items()})
    torch.testing.assert_close(output(name, again), output(name, model), rtol=1e-4, atol=1e-4)
    if name == "unet":
        with pytest.raises(ValueError, match="encoder.layers.* and no config"):
            pipeline.load_lora_into_text_encoder(load_file(tmp_path / FILE), None, pipeline.text_encoder)


@torch.no_grad()
def test_training_goes_on_from_what_was_saved(tmp_path):
    """The adapter that is read has the same trainable tensors, not those of a plain LoRA that equals it."""
    model = trained("unet", TARGETS, 4)
    model.save_lora_adapter(tmp_path)
    read = make("unet")
    read.load_lora_adapter(tmp_path, prefix=None, weight_name=FILE, adapter_name="default")
    tensors, again = (get_peft_model_state_dict(m) for m in (model, read))
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_plain_loras_are_read_as_before(tmp_path):
    """With and without gralora's class in between."""
    model = make("flux")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    save_pipeline(tmp_path, "flux", model)
    pipeline = pipeline_of("flux")
    pipeline.load_lora_weights(tmp_path, weight_name=FILE)
    with torch.no_grad():
        assert torch.equal(output("flux", pipeline.transformer), output("flux", model.eval()))
    (config,) = pipeline.transformer.peft_config.values()
    assert type(config) is peft.LoraConfig


# Export, read by a process that has never heard of gralora

STOCK = """
import sys
sys.path.insert(0, {tests!r})
import torch
from pictures import TEXT_IDS, output, outputs_of_sdxl, pipeline_of, sdxl
name, folder, file, out = sys.argv[1:]
pipeline = sdxl() if name == "sdxl" else pipeline_of(name)
pipeline.load_lora_weights(folder, weight_name=file)
with torch.no_grad():
    if name == "sdxl":
        torch.save(outputs_of_sdxl(pipeline), out)
        sys.exit("gralora" in sys.modules)
    part = pipeline.unet if name == "unet" else pipeline.transformer
    found = [output(name, part)]
    if name == "unet":
        found.append(pipeline.text_encoder.eval()(TEXT_IDS).last_hidden_state)
assert "gralora" not in sys.modules
torch.save(found, out)
"""


def stock(name: str, folder: Path, file: str) -> list[Tensor]:
    command = [
        sys.executable,
        "-c",
        STOCK.format(tests=str(Path(__file__).parent)),
        name,
        folder,
        file,
        folder / "y.pt",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(folder / "y.pt")


@places
@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True, "gralora_scaling": "matched", "lora_alpha": 1}], ids=["plain", "scaled"]
)
@torch.no_grad()
def test_export(place, fields, tmp_path, capsys):
    """In diffusers' layout with the text encoder of a UNet's pipeline, and of a UNet in kohya's."""
    model = trained(place.model, place.targets, 4, **fields)
    encoder = trained_encoder(4) if place.model == "unet" else None
    save_pipeline(tmp_path / "trained", place.model, model, encoder)
    assert cli.main(["export", str(tmp_path / "trained"), str(tmp_path / "out"), "--for", "diffusers"]) == 0
    assert "pipeline.load_lora_weights" in capsys.readouterr().out
    expected = [output(place.model, model)] + ([encoder(TEXT_IDS).last_hidden_state] if encoder is not None else [])
    for one, other in zip(stock(place.model, tmp_path / "out", FILE), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if place.model == "unet":
        save_pipeline(tmp_path / "unet", place.model, model)
        gralora.to_lora(tmp_path / "unet", tmp_path / "kohya", "diffusers")
        found = stock(place.model, tmp_path / "kohya", "kohya.safetensors")[0]
        torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4)


@hybrids
@torch.no_grad()
def test_sdxl(hybrid_r, tmp_path):
    """Its UNet, convolutions too, and both text encoders: trained, read, weighted, fused, and in stock diffusers."""
    pipeline = sdxl()
    base = outputs_of_sdxl(pipeline)
    pipeline.unet.add_adapter(gralora_config(2, 8, hybrid_r, target_modules=[*TARGETS, "conv1"]))
    parts = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    for i, (name, part) in enumerate(parts.items()):
        if name != "unet":
            add_by_transformers(part, gralora_config(2, 8, hybrid_r, target_modules=list(ATTENTION)))
        randomize(part, seed=i)
        for p in (p for n, p in part.named_parameters() if ".lora_" in n):
            p.mul_(0.5)  # larger ones drive attention to where rounding shows
    expected = outputs_of_sdxl(pipeline)
    assert all((one - other).abs().max() > 0.1 for one, other in zip(base, expected, strict=True))
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(part) for name, part in parts.items()}
    pipeline.save_lora_weights(tmp_path, **layers, **_collate_lora_metadata(parts))
    read = sdxl()
    read.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="style")
    assert all(torch.equal(*pair) for pair in zip(outputs_of_sdxl(read), expected, strict=True))
    read.set_adapters(["style"], [0.5])
    half = outputs_of_sdxl(read)
    assert not any(torch.allclose(*pair, atol=0.01) for pair in zip(half, expected, strict=True))
    for change, wanted in ((read.fuse_lora, half), (read.unfuse_lora, half), (read.unload_lora_weights, base)):
        change()
        for one, other in zip(outputs_of_sdxl(read), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for source in ("folder", "memory"):
        gralora.to_lora(tmp_path if source == "folder" else pipeline, tmp_path / source, "diffusers")
        for file in (FILE, "kohya.safetensors"):
            for one, other in zip(stock("sdxl", tmp_path / source, file), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


ATTENTION = ("q_proj", "k_proj", "out_proj")


def test_text_encoders_in_kohyas_layout(tmp_path):
    """diffusers 0.42 reads those of attention only beside out_proj (`test_sdxl`); the names are kohya's."""
    save_pipeline(tmp_path / "trained", "unet", trained("unet", TARGETS, 0), trained_encoder(4))
    gralora.to_lora(tmp_path / "trained", tmp_path / "out", "diffusers")
    theirs, kohya = (load_file(tmp_path / "out" / name) for name in (FILE, "kohya.safetensors"))
    names = {f"lora_te_text_model_encoder_layers_{i}_{layer}" for i in (0, 1) for layer in ENCODER_LAYERS}
    assert {name.partition(".")[0] for name in kohya if name.startswith("lora_te")} == names
    for i in (0, 1):
        for layer, ours in ENCODER_LAYERS.items():
            for down, A in (("down", "A"), ("up", "B")):
                name = f"lora_te_text_model_encoder_layers_{i}_{layer}.lora_{down}.weight"
                assert torch.equal(kohya[name], theirs[f"text_encoder.encoder.layers.{i}.{ours}.lora_{A}.weight"])
            assert kohya[f"lora_te_text_model_encoder_layers_{i}_{layer}.alpha"] == 2 * 4 + 4


ENCODER_LAYERS = {"mlp_fc1": "mlp.fc1", "self_attn_q_proj": "self_attn.q_proj", "self_attn_v_proj": "self_attn.v_proj"}


@torch.no_grad()
def test_export_of_what_is_in_memory(tmp_path):
    """A pipeline, a model of diffusers, a PeftModel of one, and what save_lora_adapter wrote: the same tensors."""
    pipeline = pipeline_of("unet")
    pipeline.unet = trained("unet", TARGETS, 4)
    pipeline.unet.save_lora_adapter(tmp_path / "saved")
    wrapped = randomize(peft.get_peft_model(make("unet"), gralora_config(2, 8, 4, target_modules=TARGETS)))
    sources: dict[str, Any] = {"pipeline": pipeline, "model": pipeline.unet, "wrapped": wrapped}
    wrapped.save_pretrained(tmp_path / "peft")
    sources |= {"saved": tmp_path / "saved", "file": tmp_path / "saved" / FILE, "peft": tmp_path / "peft"}
    found = {}
    for name, source in sources.items():
        report = gralora.to_lora(source, tmp_path / f"out-{name}", "diffusers")
        assert report["parity"]["relative_difference"] < 1e-7 and report["rank"] == 2 * 4 + 4
        found[name] = load_file(tmp_path / f"out-{name}" / FILE)
    for name, tensors in found.items():
        assert tensors.keys() == found["pipeline"].keys(), name
        assert all(torch.equal(t, found["pipeline"][key]) for key, t in tensors.items()), name


def test_export_refuses_what_the_layouts_cannot_hold(tmp_path):
    model = trained("unet", TARGETS, 0, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias=True .unet. cannot be kept"):
        gralora.to_lora(model, tmp_path / "out", "diffusers")
    with pytest.raises(ValueError, match="no adapter 'other'"):
        gralora.to_lora(model, tmp_path / "out", "diffusers", adapter_name="other")
    with pytest.raises(FileNotFoundError, match="neither adapter_config.json"):
        gralora.to_lora(tmp_path / "nothing", tmp_path / "out", "diffusers")
    save_file_without_config(tmp_path / FILE)
    with pytest.raises(ValueError, match="no config in its metadata"):
        gralora.to_lora(tmp_path, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


IGNORED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "--max-rank": (["--max-rank", "4"], {"max_rank": 4}),
    "--lossy": (["--lossy"], {"lossy": True}),
    "--from": (["--from", "peft"], {"source": "peft"}),
    "--base": (["--base", "model"], {"base": "model"}),
    "--arch": (["--arch", "llama"], {"base_config": {"model_type": "llama"}}),
}


@pytest.mark.parametrize("option", IGNORED)
def test_export_refuses_options_that_it_would_ignore(option, tmp_path, capsys):
    """By name, from the command line and from Python; without the option the same adapter is exported."""
    save_pipeline(tmp_path / "trained", "unet", trained("unet", TARGETS, 0))
    arguments, fields = IGNORED[option]
    command = ["export", str(tmp_path / "trained"), str(tmp_path / "out"), "--for", "diffusers"]
    assert cli.main([*command, *arguments]) != 0
    assert re.search(f"{option}.*'diffusers' does not use it.*leave it out", capsys.readouterr().err)
    with pytest.raises(ValueError, match=f"{next(iter(fields))} .*{option}"):
        gralora.to_lora(tmp_path / "trained", tmp_path / "out", "diffusers", **fields)
    assert not (tmp_path / "out").exists()
    assert cli.main(command) == 0


@torch.no_grad()
def test_adapters_of_other_programs_are_exported_once_converted(tmp_path):
    """As the refusal of --from advises: PEFT's own GRALORA, converted, and read by diffusers' export."""
    config = peft.GraloraConfig(r=8, gralora_k=2, hybrid_r=4, target_modules=TARGETS)
    model = peft.get_peft_model(make("unet"), config).eval()
    for name, p in model.named_parameters():
        if "gralora" in name:
            nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "peft")
    expected = output("unet", model)
    assert cli.main(["convert", str(tmp_path / "peft"), str(tmp_path / "ours"), "--from", "peft"]) == 0
    assert cli.main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--for", "diffusers"]) == 0
    assert not torch.allclose(expected, output("unet", make("unet")), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(stock("unet", tmp_path / "out", FILE)[0], expected, rtol=1e-4, atol=1e-4)


def save_file_without_config(path: Path) -> None:
    save_file({"unet.x.lora_A.weight": torch.ones(2, 2, 2)}, path)


def test_memory_to_the_other_targets(tiny_model, tmp_path):
    """A language model in memory, a PeftModel or one with an injected adapter, for PEFT."""
    from transformers import AutoModelForCausalLM

    ids, found = torch.arange(1, 9)[None], []
    for inject in (peft.get_peft_model, add_by_transformers):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model = randomize(inject(model, gralora_config(2, 8, 4, target_modules=["q_proj", "down_proj"]))).eval()
        out = tmp_path / f"out{len(found)}"
        gralora.to_lora(model, out, "peft")
        read = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(out))
        assert not read.peft_config["default"].use_gralora
        with torch.no_grad():
            found.append(read(ids).logits)
            torch.testing.assert_close(found[-1], model(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(*found)
