"""Other trainers, each the real program: from its command line to `gralora merge` and `gralora export`.

Each has an environment of its own, which `make test-trainers` makes; it is named by GRALORA_AXOLOTL_PYTHON and so on.
TRL is in the environment of the tests.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import gralora
from gralora.plugins import __path__ as plugins

pytestmark = pytest.mark.slow

ROWS = [{"instruction": f"What is {i}+{i}?", "input": "", "output": f"{2 * i}"} for i in range(40)]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<end>{% endfor %}"

AXOLOTL = """
base_model: {folder}/model
plugins: [gralora.plugins.axolotl.GraloraPlugin]
adapter: gralora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
gralora_k: 2
hybrid_r: 4
datasets: [{{path: {folder}/data.json, ds_type: json, type: alpaca}}]
sequence_len: 512
micro_batch_size: 2
gradient_accumulation_steps: 1
max_steps: 3
learning_rate: 0.01
optimizer: adamw_torch
lr_scheduler: constant
output_dir: {folder}/out
dataset_prepared_path: {folder}/prepared
bf16: false
tf32: false
val_set_size: 0
"""
LLAMA_FACTORY = """
model_name_or_path: {folder}/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset_dir: {folder}
dataset: tiny
template: default
cutoff_len: 512
output_dir: {folder}/out
per_device_train_batch_size: 2
max_steps: 3
learning_rate: 1.0e-2
report_to: none
"""
SWIFT = (
    "-m swift.cli.main sft --model {folder}/model --model_type llama --template default --dataset {folder}/data.jsonl "
    "--external_plugins {plugins}/ms_swift.py --tuner_type gralora --lora_rank 8 --lora_alpha 16 --target_modules "
    "--torch_dtype float32 --max_steps 3 --per_device_train_batch_size 2 --learning_rate 1e-2 "
    "--output_dir {folder}/out --add_version false --report_to none --save_steps 3 --max_length 512 "
    "--dataset_num_proc 1"
)
TRL = (
    "-m gralora.tool.cli run -- trl sft --model_name_or_path {folder}/model --dataset_name {folder}/rows --use_peft "
    "--lora_r 8 --lora_target_modules q_proj v_proj --max_steps 2 --learning_rate 1e-2 --output_dir {folder}/out "
    "--report_to none --use_cpu --bf16 false --gradient_checkpointing false --gralora_k 2 --hybrid_r 4"
)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with room for prompts and a chat template, and data in the layouts that the programs read."""
    AutoModelForCausalLM.from_pretrained(tiny_model, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "data.json"}}))
    turns = [(("user", row["instruction"]), ("assistant", row["output"])) for row in ROWS]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in turn]}) for turn in turns]
    (tmp_path / "rows").mkdir()
    for path in (tmp_path / "data.jsonl", tmp_path / "rows" / "train.jsonl"):
        path.write_text("\n".join(lines))
    (tmp_path / "axolotl.yml").write_text(AXOLOTL.format(folder=tmp_path))
    (tmp_path / "llamafactory.yaml").write_text(LLAMA_FACTORY.format(folder=tmp_path))
    return tmp_path


def python_of(program: str) -> str:
    python = os.environ.get(f"GRALORA_{program.upper()}_PYTHON")
    if not python:
        pytest.skip(f"GRALORA_{program.upper()}_PYTHON names no environment; run `make test-trainers`")
    return python


def run(command: list[str], folder: Path) -> None:
    settings = {"CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1", "DISABLE_VERSION_CHECK": "1"}
    settings |= {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | settings)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


def check(folder: Path, adapter: Path) -> None:
    """It is the GraLoRA that was asked for, trained, and what merge and export make of it says what it says."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["use_gralora"], config["gralora_k"], config["hybrid_r"], config["r"]) == (True, 2, 4, 8)

    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)

    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        plain = base()(ids).logits
        expected = gralora.load_adapter(base(), adapter)(ids).logits
        assert (expected - plain).abs().max() > 1e-4
        gralora.merge_adapter(adapter, folder / "merged", folder / "model")
        gralora.to_lora(adapter, folder / "lora", "peft")
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
        exported = PeftModel.from_pretrained(base(), str(folder / "lora"))
        for model in (merged, exported):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_axolotl(folder: Path) -> None:
    run([python_of("axolotl"), "-m", "axolotl.cli.train", "axolotl.yml"], folder)
    check(folder, folder / "out")


def test_ms_swift(folder: Path) -> None:
    command = SWIFT.format(folder=folder, plugins=plugins[0]).replace(
        "--target_modules", "--target_modules all-linear"
    )
    settings = ["--model_kwargs", '{"gralora_k": 2, "gralora_hybrid_r": 4}']
    run([python_of("swift"), *command.split(), *settings], folder)
    check(folder, folder / "out" / "checkpoint-3")


def test_llamafactory(folder: Path) -> None:
    python = python_of("llamafactory")
    program = str(Path(python).parent / "llamafactory-cli")
    command = ["-m", "gralora.tool.cli", "run", "--gralora_k", "2", "--", program, "train", "llamafactory.yaml"]
    run([python, *command, "--hybrid_r", "4"], folder)
    check(folder, folder / "out")


# Plain LoRA, which the plugins accelerate: what runs is written down where training ends

SPY = """
from pathlib import Path
import gralora, transformers
train = transformers.Trainer.train
def spied(self, *args, **options):
    found = train(self, *args, **options)
    Path("described").write_text(gralora.describe(self.model))
    return found
transformers.Trainer.train = spied
"""


def check_accelerated(folder: Path, adapter: Path) -> None:
    """PEFT's files of a plain LoRA that was trained, each layer of it as one operation."""
    assert re.match(r"(\d+) of \1 LoRA layers run as one operation", (folder / "described").read_text())
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert not {name for name in config if "gralora" in name or name in ("hybrid_r", "accelerate")}
    weights = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dim() for tensor in weights.values()} == {2}
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_axolotl_accelerates(folder: Path) -> None:
    spy = SPY + "from axolotl.integrations.base import BasePlugin\nclass Spy(BasePlugin): pass\n"
    (folder / "spy.py").write_text(spy)
    text = (folder / "axolotl.yml").read_text().replace("GraloraPlugin]", "GraloraPlugin, spy.Spy]")
    lines = text.replace("adapter: gralora", "adapter: lora\nlora_mlp_kernel: false").splitlines()
    lines = [line for line in lines if not line.startswith(("gralora_k", "hybrid_r"))]
    (folder / "axolotl.yml").write_text("\n".join(lines))
    code = "import sys; sys.path.insert(0, '.'); from axolotl.cli.train import do_cli; do_cli('axolotl.yml')"
    run([python_of("axolotl"), "-c", code], folder)
    check_accelerated(folder, folder / "out")


def test_ms_swift_accelerates(folder: Path) -> None:
    (folder / "spy.py").write_text(SPY)
    command = SWIFT.format(folder=folder, plugins=plugins[0]).replace(
        "--tuner_type gralora", "--tuner_type accelerated_lora"
    )
    command = command.replace("/ms_swift.py", f"/ms_swift.py {folder}/spy.py")
    run([python_of("swift"), *command.replace("--target_modules", "--target_modules all-linear").split()], folder)
    check_accelerated(folder, folder / "out" / "checkpoint-3")


UNSLOTH = """
import unsloth, torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
options = {{"dtype": torch.bfloat16, "load_in_4bit": False}}
model, tokenizer = unsloth.FastLanguageModel.from_pretrained("{folder}/model", **options)
model = unsloth.FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, random_state=0)
config = SFTConfig("{folder}/out", max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False)
data = load_dataset("json", data_files="{folder}/data.jsonl", split="train")
SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer).train()
model.save_pretrained("{folder}/out")
"""


def test_unsloth(folder: Path) -> None:
    (folder / "train.py").write_text(UNSLOTH.format(folder=folder))
    flags = ["run", "--gralora_k", "2", "--hybrid_r", "4", "--"]
    python = python_of("unsloth")
    run([python, "-m", "gralora.tool.cli", *flags, python, "train.py"], folder)
    check(folder, folder / "out")


@pytest.mark.parametrize("first", ["before", "after"])
def test_unsloths_fused_functions(first: str, folder: Path) -> None:
    """Those that train, decode and merge on GPUs, called on the CPU; gralora imported before Unsloth, or after it."""
    run([python_of("unsloth"), str(Path(__file__).parent / "trainers" / "with_unsloth.py"), first], folder)


@pytest.mark.parametrize("processes", [1, 2])
def test_trl(folder: Path, processes: int) -> None:
    """With two processes, each is a worker that accelerate starts."""
    workers = ["--num_processes", "2", "--num_machines", "1"] if processes > 1 else []
    run([sys.executable, *TRL.format(folder=folder).split(), *workers], folder)
    check(folder, folder / "out")


TORCHRUN = """
import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
config = SFTConfig("{folder}/out", max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False)
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
data = load_dataset("json", data_files="{folder}/data.jsonl", split="train")
trainer = SFTTrainer("{folder}/model", config, train_dataset=data, peft_config=lora)
assert torch.distributed.get_world_size() == 2 and torch.distributed.get_backend() == "gloo"
trainer.train()
trainer.save_model()
"""


def test_torchrun(folder: Path) -> None:
    """The line of docs/trainers.md: two workers, a script that knows PEFT only."""
    (folder / "train.py").write_text(TORCHRUN.format(folder=folder))
    words = ["run", "--gralora_k", "2", "--hybrid_r", "4", "--", "torchrun", "--nproc_per_node", "2", "train.py"]
    run([sys.executable, "-m", "gralora.tool.cli", *words], folder)
    check(folder, folder / "out")
