"""The plain LoRA of an export: bit for bit the blocks, and what every target gets."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gguf
import peft
import pytest
import torch
from helpers import MODELS, TARGETS, Case, cases, naive_delta, random_factors, tiny_llama, token_ids
from safetensors.torch import load_file
from saved import FORMATS, WEIGHTS, edit, logits, read, save, save_gralora, write
from torch import Tensor

import gralora
from gralora import factors
from gralora.checkpoints import formats, targets
from gralora.checkpoints.adapter import Adapter
from gralora.checkpoints.export import REPORT
from gralora.checkpoints.files import LazyTensors, read_adapter_folder
from gralora.checkpoints.plain import plain_lora
from gralora.checkpoints.targets import GGUF_TARGETS, VLLM_RANKS
from gralora.checkpoints.targets import TARGETS as PROGRAMS
from gralora.tool import cli

PREFIX = "base_model.model."
LLAMA = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}


def blocks_in_place(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a plain LoRA, element by element: rank (j, i, s) reads chunk i of the input, writes chunk j."""
    k, chunk_in, r = A.shape
    chunk_out, q = B.shape[2], r // k
    A_lora, B_lora = torch.zeros(k * r, k * chunk_in, dtype=A.dtype), torch.zeros(k * chunk_out, k * r, dtype=B.dtype)
    for j in range(k):
        for i in range(k):
            for s in range(q):
                rank = (j * k + i) * q + s
                A_lora[rank, i * chunk_in : (i + 1) * chunk_in] = A[i, :, j * q + s]
                B_lora[j * chunk_out : (j + 1) * chunk_out, rank] = B[j, i * q + s]
    return A_lora, B_lora


# Tensor functions


@cases
def test_compact_lora_is_exact(case: Case) -> None:
    f = random_factors(case)
    A, B = factors.compact_lora(*factors.hybrid_to_lora(*f))
    assert A.shape[0] == min(case.k * case.r_g + case.hybrid_r, case.in_features, case.out_features)
    torch.testing.assert_close(B @ A, naive_delta(f), rtol=0, atol=1e-12)


@cases
def test_truncate_lora_is_the_best_of_its_rank(case: Case) -> None:
    f = random_factors(case)
    dW = naive_delta(f)
    A, B, values = factors.truncate_lora(*factors.hybrid_to_lora(*f), 3)
    expected = torch.linalg.svdvals(dW)
    torch.testing.assert_close(values[: len(expected)], expected[: len(values)], rtol=0, atol=1e-10)
    assert A.shape[0] == B.shape[1] == 3
    torch.testing.assert_close((B @ A - dW).norm(), expected[3:].norm(), rtol=1e-8, atol=1e-10)


@cases
def test_block_norms_and_singular_values(case: Case) -> None:
    f = random_factors(case)
    grid = naive_delta(f._replace(hybrid_A=None, hybrid_B=None))
    norms = torch.stack([torch.stack([b.norm() for b in row.chunk(case.k, 1)]) for row in grid.chunk(case.k, 0)])
    torch.testing.assert_close(factors.block_norms(f.A, f.B), norms, rtol=1e-10, atol=0)
    values = factors.singular_values(*factors.hybrid_to_lora(*f))
    expected = torch.linalg.svdvals(naive_delta(f))
    torch.testing.assert_close(values[: len(expected)], expected[: len(values)], rtol=1e-10, atol=1e-7)
    assert (values[len(expected) :] < 1e-7).all()


def test_permute_heads_pairs_the_halves() -> None:
    rows = torch.arange(16)[:, None]  # two heads of 8: (half, i) -> (i, half)
    permuted = targets.permute_heads(rows, 2)
    assert permuted.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(targets.unpermute_heads(permuted, 2), rows)


# Bit for bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [name for name, program in PROGRAMS.items() if program.is_peft])
def test_exported_tensors_are_the_blocks(tmp_path: Path, target: str, dtype: torch.dtype) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]  # of what SGLang fuses, all or none
    save_gralora(tmp_path / "in", target_modules=targets, r=10, hybrid_r=2, lora_alpha=20)
    config, tensors = read(tmp_path / "in")
    write(tmp_path / "in", config, {name: t.to(dtype) for name, t in tensors.items()})
    report = gralora.to_lora(tmp_path / "in", tmp_path / "out", target)
    tensors, exported = read(tmp_path / "in")[1], read(tmp_path / "out")[1]
    layers = {name.split(".lora_")[0] for name in tensors}
    assert len(exported) == 2 * len(layers) == 16
    for layer in layers:
        A, B = blocks_in_place(tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"])
        A = torch.cat([A, tensors[f"{layer}.lora_A.hybrid_weight"]])
        B = torch.cat([B, tensors[f"{layer}.lora_B.hybrid_weight"]], dim=1)
        assert exported[f"{layer}.lora_A.weight"].dtype == dtype
        assert torch.equal(exported[f"{layer}.lora_A.weight"], A)
        assert torch.equal(exported[f"{layer}.lora_B.weight"], 2 * B)  # scaling 20 / 10
    assert report["method"] == "copied" and report["rank"] == 2 * 8 + 2
    assert report["parity"]["relative_difference"] < 1e-15


def test_half_precision_goes_to_float32_where_folding_would_round(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in", lora_alpha=24)
    config, tensors = read(tmp_path / "in")
    write(tmp_path / "in", config, {name: t.bfloat16() for name, t in tensors.items()})
    report = gralora.to_lora(tmp_path / "in", tmp_path / "out")
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    B = read(tmp_path / "in")[1][f"{layer}.lora_B.hybrid_weight"]
    exported = read(tmp_path / "out")[1]
    assert torch.equal(exported[f"{layer}.lora_B.weight"][:, -2:], 3 * B.float())
    assert report["dtype"] == "float32" and report["parity"]["relative_difference"] < 1e-15
    rounded = gralora.to_lora(tmp_path / "in", tmp_path / "half", dtype=torch.bfloat16)
    assert rounded["dtype"] == "bfloat16" and 1e-4 < rounded["parity"]["relative_difference"] < 1e-2


# The form that is safe everywhere


def test_stock_peft_gives_the_same_logits_without_gralora(tmp_path: Path) -> None:
    """In a process that never imports gralora."""
    expected = save_gralora(tmp_path / "in", use_rslora=True, lora_alpha=6)
    gralora.to_lora(tmp_path / "in", tmp_path / "out")
    tiny_llama().save_pretrained(tmp_path / "base")
    script = Path(__file__).parent / "serve" / "with_peft.py"
    arguments = [tmp_path / "base", tmp_path / "out", json.dumps(token_ids(2, 5).tolist()), tmp_path / "logits.pt"]
    subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_can_be_exported(tmp_path: Path, name: str) -> None:
    expected = save(tmp_path / "in", name)
    gralora.to_lora(tmp_path / "in", tmp_path / "out", "vllm")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_patterns_and_rslora_become_one_rank_and_scale(tmp_path: Path, model: str) -> None:
    pattern = {TARGETS[model][0]: 4}
    fields = {"rank_pattern": pattern, "alpha_pattern": {TARGETS[model][1]: 7}, "use_rslora": True, "hybrid_r": 0}
    expected = save_gralora(tmp_path / "in", model, **fields)
    gralora.to_lora(tmp_path / "in", tmp_path / "out", "vllm")
    config, tensors = read(tmp_path / "out")
    assert config["r"] == config["lora_alpha"] == 16 and isinstance(config["lora_alpha"], int)
    assert {t.shape[0] if "lora_A" in name else t.shape[1] for name, t in tensors.items()} == {16}
    assert not any("pattern" in name or "gralora" in name or "rslora" in name for name in config)
    loaded = peft.PeftModel.from_pretrained(MODELS[model](), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"layers_to_transform": [1]}, {"target_modules": r".*\.1\..*(q|down)_proj"}, {"exclude_modules": ["k_proj"]}],
)
def test_only_the_adapters_layers_are_selected(tmp_path: Path, fields: dict) -> None:
    expected = save_gralora(tmp_path / "in", **fields)
    gralora.to_lora(tmp_path / "in", tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    saved = {name for name in read(tmp_path / "in")[1] if name.endswith("lora_A.weight")}
    assert sum(hasattr(m, "lora_A") for m in loaded.modules()) == len(saved)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)


def test_what_targets_cannot_take_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_gralora(tmp_path / "saved", modules_to_save=["lm_head"])
    save_gralora(tmp_path / "tokens", trainable_token_indices=[1, 2])
    save_gralora(tmp_path / "bias", "gpt2", lora_bias=True)
    for name, field in {"saved": "modules_to_save", "tokens": "trainable_token_indices", "bias": "lora_bias"}.items():
        for target in PROGRAMS.keys() - {"peft"}:
            with pytest.raises(ValueError, match=f"{target} takes nothing but A and B.*{field}.*gralora merge"):
                options = {"base_config": LLAMA} if target in GGUF_TARGETS else {}
                gralora.to_lora(tmp_path / name, tmp_path / "out", target, **options)
    assert not (tmp_path / "out").exists()


def test_peft_keeps_what_it_can(tmp_path: Path) -> None:
    save_gralora(tmp_path / "saved", modules_to_save=["lm_head"])
    config, tensors = read(tmp_path / "saved")
    write(tmp_path / "saved", config, {n: 2 * t if "lm_head" in n else t for n, t in tensors.items()})
    save_gralora(tmp_path / "bias", "gpt2", lora_bias=True)
    for name, model in {"saved": "llama", "bias": "gpt2"}.items():
        expected = logits(gralora.load_adapter(MODELS[model](), tmp_path / name))
        gralora.to_lora(tmp_path / name, tmp_path / f"{name}_out")
        loaded = peft.PeftModel.from_pretrained(MODELS[model](), tmp_path / f"{name}_out")
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)


# Ranks


def save_wide(folder: Path, k: int = 4, r: int = 16) -> Tensor:
    """k * r = 64 ranks for layers of at most 24 features."""
    return save_gralora(folder, k=k, r=r, hybrid_r=0)


def test_rank_above_the_features_is_compacted_where_a_limit_needs_it(tmp_path: Path) -> None:
    expected = save_wide(tmp_path / "in")
    assert gralora.to_lora(tmp_path / "in", tmp_path / "full")["rank"] == 64
    report = gralora.to_lora(tmp_path / "in", tmp_path / "out", max_rank=20)
    assert (report["rank"], report["method"], report["truncation_errors"]) == (16, "compacted", {})
    assert report["parity"]["relative_difference"] < 1e-6
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)


def test_truncation_needs_a_flag_and_reports_its_error(tmp_path: Path) -> None:
    save_wide(tmp_path / "in")
    with pytest.raises(ValueError, match=r"rank 16 .*more than max_rank=5.*--max-rank 5 --lossy"):
        gralora.to_lora(tmp_path / "in", tmp_path / "out", max_rank=5)
    report = gralora.to_lora(tmp_path / "in", tmp_path / "out", max_rank=5, lossy=True)
    assert (report["rank"], report["method"]) == (5, "truncated")
    assert len(report["truncation_errors"]) == 6
    adapter = formats.read(*read_adapter_folder(tmp_path / "in"))
    for layer, error in report["truncation_errors"].items():
        values = torch.linalg.svdvals(dense(adapter, layer))
        assert error == pytest.approx((values[5:].norm() / values.norm()).item(), rel=1e-4)
        assert report["parity"]["layers"][layer] == pytest.approx(error, rel=0.5)  # an estimate, of what was written


def dense(adapter: Adapter, layer: str) -> Tensor:
    A, B = blocks_in_place(adapter.factors(layer).A, adapter.factors(layer).B)
    return B.double() @ A.double()


def test_layers_within_the_limit_stay_exact_when_others_are_truncated(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in", r=8, hybrid_r=0, rank_pattern={"q_proj": 2})
    report = gralora.to_lora(tmp_path / "in", tmp_path / "out", max_rank=4, lossy=True)
    assert not any("q_proj" in layer for layer in report["truncation_errors"])
    assert all(report["parity"]["layers"][f"model.layers.{i}.self_attn.q_proj"] < 1e-7 for i in (0, 1))


def shape_only(k: int, r: int, features: int) -> Adapter:
    """An adapter of one layer without values."""
    layer, chunk = PREFIX + "layer", features // k
    specs = {f"{layer}.lora_A.weight": torch.empty(k, chunk, r, device="meta")}
    specs |= {f"{layer}.lora_B.weight": torch.empty(k, r, chunk, device="meta")}
    config = gralora.LoraConfig(r=r, use_gralora=True, gralora_k=k, lora_alpha=r)
    return Adapter(config, LazyTensors(specs, specs.__getitem__))


@pytest.mark.parametrize(
    ("k", "r", "features", "rank", "method"),
    [
        (4, 64, 4096, 256, "copied"),
        (4, 128, 4096, 512, "copied"),
        (8, 128, 512, 512, "compacted"),
        (8, 128, 4096, None, "refused"),
    ],
)
def test_vllm_gets_a_rank_that_it_takes(k: int, r: int, features: int, rank: int | None, method: str) -> None:
    adapter = shape_only(k, r, features)
    if rank is None:
        with pytest.raises(ValueError, match="rank 1024 .*the target's limit 512.*gralora merge.*--max-rank 512"):
            plain_lora(adapter, VLLM_RANKS[-1])
    else:
        plain = plain_lora(adapter, VLLM_RANKS[-1])
        assert (plain.rank, plain.method) == (rank, method)


# Other programs' files


@pytest.mark.parametrize("target", GGUF_TARGETS)
def test_gguf_holds_what_llama_cpp_reads(tmp_path: Path, target: str) -> None:
    """q and k rows in the order that llama.cpp gives the base's: head by head, the halves interleaved."""
    save_gralora(tmp_path / "in", target_modules="all-linear", r=10, hybrid_r=2, lora_alpha=30)
    report = gralora.to_lora(tmp_path / "in", tmp_path / "out", target, base_config=LLAMA)
    gralora.to_lora(tmp_path / "in", tmp_path / "plain")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == report["rank"] == 18
    written = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    plain = read(tmp_path / "plain")[1]
    assert len(written) == len(plain) == 2 * 2 * 7
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name, t in plain.items():
        block, kind = re.search(r"layers\.(\d)\.\w+\.(\w+)\.", name).groups()
        side = "lora_a" if "lora_A" in name else "lora_b"
        if side == "lora_b" and kind in ("q_proj", "k_proj"):
            head = 8
            order = [
                h * head + half * head // 2 + i for h in range(len(t) // head) for i in range(4) for half in (0, 1)
            ]
            t = t[order]
        assert torch.equal(written[f"blk.{block}.{names[kind]}.weight.{side}"], t), name
    if target == "ollama":
        assert (tmp_path / "out" / "Modelfile").read_text() == "FROM BASE_MODEL\nADAPTER ./adapter.gguf\n"


def test_gguf_needs_to_know_the_base(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in")
    with pytest.raises(ValueError, match="give --base FOLDER"):
        gralora.to_lora(tmp_path / "in", tmp_path / "out", "llamacpp")
    with pytest.raises(ValueError, match="model_type='bloom'.*llama, mistral"):
        gralora.to_lora(tmp_path / "in", tmp_path / "out", "llamacpp", base_config={"model_type": "bloom"})
    with pytest.raises(ValueError, match="num_attention_heads=None"):
        gralora.to_lora(tmp_path / "in", tmp_path / "out", "llamacpp", base_config={"model_type": "llama"})
    tiny_llama().config.save_pretrained(tmp_path / "base")
    gralora.to_lora(tmp_path / "in", tmp_path / "out", "llamacpp", base=tmp_path / "base")


def test_mlx_files(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in", layers_to_transform=[1])
    report = gralora.to_lora(tmp_path / "in", tmp_path / "out", "mlx")
    gralora.to_lora(tmp_path / "in", tmp_path / "plain")
    tensors, plain = load_file(tmp_path / "out" / "adapters.safetensors"), read(tmp_path / "plain")[1]
    assert len(tensors) == len(plain) == 6
    for name, t in plain.items():
        mlx = name.removeprefix(PREFIX).replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")
        assert torch.equal(tensors[mlx], t.T)
    parameters = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_parameters"]
    keys = ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj"]
    assert parameters == {"rank": report["rank"], "scale": 1.0, "dropout": 0.0, "keys": keys}


def test_mlx_refuses_layers_outside_its_list(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight.*save_embedding_layers=False"):
        gralora.to_lora(tmp_path / "in", tmp_path / "out", "mlx")
    config, tensors = read(tmp_path / "in")  # PEFT saves the base's lm_head with it
    write(tmp_path / "in", config, {name: t for name, t in tensors.items() if "base_layer" not in name})
    gralora.to_lora(tmp_path / "in", tmp_path / "out", "mlx")  # as advised, and MLX adapts lm_head
    assert "lm_head.lora_a" in load_file(tmp_path / "out" / "adapters.safetensors")
    save_gralora(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ValueError, match=r"what is in model.layers, and lm_head, .*'transformer\.h.*gralora merge"):
        gralora.to_lora(tmp_path / "gpt2", tmp_path / "no", "mlx")


# The report


def test_report_is_written_and_compares_logits_with_the_base(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in")
    tiny_llama().save_pretrained(tmp_path / "base")
    report = gralora.to_lora(tmp_path / "in", tmp_path / "out", "vllm", base=tmp_path / "base")
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == report
    assert report["logits"]["max_difference"] < 1e-4 < report["logits"]["max_logit"]
    assert report["command"].startswith(f"vllm serve {tmp_path / 'base'} --enable-lora --max-lora-rank 16 ")


def test_parity_sees_a_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block in the wrong place, as if the copying were at fault."""
    save_gralora(tmp_path / "in")
    from gralora.checkpoints import plain

    right = plain.hybrid_to_lora
    monkeypatch.setattr(plain, "hybrid_to_lora", lambda *a: (right(*a)[0].roll(1, 0), right(*a)[1]))
    report = gralora.to_lora(tmp_path / "in", tmp_path / "out")
    assert report["parity"]["relative_difference"] > 0.1


def test_not_finite_and_existing_outputs(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in")
    config, tensors = read(tmp_path / "in")
    first = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[first][0, 0, 0] = torch.nan
    write(tmp_path / "nan", config, tensors)
    with pytest.raises(ValueError, match="NaN or infinite.*gralora inspect"):
        gralora.to_lora(tmp_path / "nan", tmp_path / "out")
    gralora.to_lora(tmp_path / "in", tmp_path / "out")
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError):
        gralora.to_lora(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before
    with pytest.raises(ValueError, match="target 'tgi' is not known; use one of peft, vllm"):
        gralora.to_lora(tmp_path / "in", tmp_path / "tgi", "tgi")


IGNORED = {  # target, option of to_lora -> its value, and the command's flags
    ("peft", "base_config"): (LLAMA, ["--arch", "llama"]),
    ("vllm", "base_config"): (LLAMA, ["--heads", "2"]),
    ("sglang", "base_config"): (LLAMA, ["--kv-heads", "1"]),
    ("mlx", "base_config"): (LLAMA, ["--arch", "llama", "--heads", "2"]),
    ("llamacpp", "dtype"): (torch.bfloat16, ["--dtype", "bfloat16"]),
    ("ollama", "dtype"): (torch.float16, ["--dtype", "float16"]),
}


@pytest.mark.parametrize("case", IGNORED, ids="-".join)
def test_options_that_a_target_would_ignore_are_refused(tmp_path: Path, capsys, case: tuple[str, str]) -> None:
    """By name, from the command line and from Python; without the option the export is written, as advised."""
    (target, option), (value, flags) = case, IGNORED[case]
    save_gralora(tmp_path / "in", target_modules=["q_proj", "k_proj", "v_proj"])
    gguf_needs = {"base_config": LLAMA} if target in GGUF_TARGETS else {}
    with pytest.raises(ValueError, match=rf"{option} \(.*{flags[0]}.*target '{target}' does not use it.*leave it out"):
        gralora.to_lora(tmp_path / "in", tmp_path / "out", target, **gguf_needs | {option: value})
    command = ["export", str(tmp_path / "in"), str(tmp_path / "out"), "--for", target]
    needed = ["--arch", "llama", "--heads", "2", "--kv-heads", "1"] if gguf_needs else []
    assert cli.main([*command, *needed, *flags]) == 2
    assert f"target '{target}' does not use it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*command, *needed]) == 0


def test_one_source_of_the_bases_architecture(tmp_path: Path) -> None:
    save_gralora(tmp_path / "in")
    tiny_llama().config.save_pretrained(tmp_path / "base")
    options = {"base": tmp_path / "base", "base_config": LLAMA}
    with pytest.raises(ValueError, match="base_config.*and base .*config.json.*give one of the two"):
        gralora.to_lora(tmp_path / "in", tmp_path / "out", "llamacpp", **options)
    for i, name in enumerate(options):
        gralora.to_lora(tmp_path / "in", tmp_path / f"out{i}", "llamacpp", **{name: options[name]})


def test_options_of_the_other_kind_of_source_are_refused(tmp_path: Path) -> None:
    """A model in memory has a name for its adapter, and no format; a folder has a format, and no name."""
    save_gralora(tmp_path / "in")
    model = gralora.load_adapter(tiny_llama(), tmp_path / "in")
    with pytest.raises(ValueError, match=r"source \(--from\) is 'gralora', but a model in memory does not use it"):
        gralora.to_lora(model, tmp_path / "out", source="gralora")
    with pytest.raises(ValueError, match="adapter_name is 'default2', but the folder .* holds one adapter"):
        gralora.to_lora(tmp_path / "in", tmp_path / "out", adapter_name="default2")
    report = gralora.to_lora(model, tmp_path / "out")
    assert report["source"]["adapter"] == "PeftModel in memory"
    gralora.to_lora(tmp_path / "in", tmp_path / "out2")
    assert torch.equal(
        *(read(tmp_path / out)[1][PREFIX + "model.layers.0.self_attn.q_proj.lora_B.weight"] for out in ("out", "out2"))
    )


def test_source_is_passed_on(tmp_path: Path) -> None:
    save(tmp_path / "in", "peft")
    edit(tmp_path / "in", alpha=...)
    with pytest.raises(ValueError, match="--from peft"):
        gralora.to_lora(tmp_path / "in", tmp_path / "out")
    assert gralora.to_lora(tmp_path / "in", tmp_path / "out", source="peft")["source"]["format"] == "peft"


@pytest.mark.parametrize("name", ["self_attn", "q_proj", "model", "layers"])
def test_adapters_named_like_layers_are_not_cut(tmp_path: Path, name: str) -> None:
    """PEFT (0.21, its issue 3584) leaves out what it takes for another adapter's, or adds that: never silently."""
    fields = {"r": 4, "use_gralora": True, "gralora_k": 2, "init_lora_weights": False}
    config = gralora.LoraConfig(target_modules=["q_proj", "gate_proj"], **fields)
    model = peft.get_peft_model(tiny_llama(), config)
    model.add_adapter(name, config)
    with pytest.raises(ValueError, match=f"saves other tensors for the adapter 'default' .*'{name}'"):
        gralora.to_lora(model, tmp_path / "out")
    model.save_pretrained(tmp_path)
    refused = pytest.raises(ValueError, match=r"has no GraLoRA tensors|no tensors of|none of this adapter")
    with refused:
        gralora.load_adapter(tiny_llama(), tmp_path)
    assert gralora.load_adapter(tiny_llama(), tmp_path / name)
    model.delete_adapter(name)
    gralora.to_lora(model, tmp_path / "out")
