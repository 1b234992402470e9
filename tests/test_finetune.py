"""Fine-tuning a tiny model: what is trained, what is written, interruption, and the check of the saved adapter."""

import itertools
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, load_peft_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from gralora import LoraConfig, quantize_fp8
from gralora.ops import fp8, plans
from gralora.tool import arguments as arguments_module
from gralora.tool import cli, output
from gralora.tool import finetune as module
from gralora.tool.arguments import FinetuneArguments
from gralora.tool.data.examples import file_examples, split
from gralora.tool.data.tokens import encode
from gralora.tool.finetune import finetune
from gralora.tool.models import load_model, load_tokenizer
from gralora.tool.training import resume
from gralora.tool.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without use_gralora")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Forty records with one simple rule: say the word three times."""
    path = tmp_path_factory.mktemp("data") / "words.jsonl"
    words = ["".join(letters) for letters in itertools.product("abcd", repeat=3)][:40]
    path.write_text("\n".join(json.dumps({"instruction": f"Repeat {x}", "output": x * 3}) for x in words))
    return path


@pytest.fixture
def arguments(tiny_model, dataset, tmp_path):
    """Arguments of a run of few steps, with changes."""

    def make(**changes) -> FinetuneArguments:
        defaults = {"base_model": str(tiny_model), "data_path": str(dataset), "output_dir": str(tmp_path / "out")}
        defaults |= {"max_steps": 6, "batch_size": 4, "micro_batch_size": 2, "max_seq_length": 100, "val_set_size": 5}
        defaults |= {"lora_r": 8, "lora_alpha": 16, "learning_rate": 3e-2, "use_gralora": True, "logging_steps": 2}
        return FinetuneArguments(**defaults | {"lora_target_modules": ["q_proj", "up_proj"]} | changes)

    return make


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_peft_weights(str(folder))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_gralora_run(arguments, capsys):
    """The loss falls, and what is printed and written is what the saved adapter does."""
    args = arguments(gralora_k="4", hybrid_r=4)
    metrics = finetune(args)
    output = Path(args.output_dir)

    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["use_gralora"], config["gralora_k"], config["r"], config["hybrid_r"]) == (True, 4, 8, 4)
    assert {key.split(".")[-2] for key in weights(output)} == {"lora_A", "lora_B"}
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert metrics["examples"] == {"train": 35, "held_out": 5, "left_out": 0} and metrics["steps"] == 6
    assert [row["step"] for row in metrics["history"] if "loss" in row] == [1, 2, 4, 6]
    assert [row["step"] for row in metrics["history"] if "held_out_loss" in row] == [0, 2, 4, 6]

    loss = metrics["held_out_loss"]
    assert loss["after"] < loss["before"] - 0.05
    model = AutoPeftModelForCausalLM.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.base_model)
    held_out = encode(tokenizer, split(file_examples(args.data_path).examples, 5)[1], 100)
    for adapter, name in ((True, "after"), (False, "before")):
        model.base_model.enable_adapter_layers() if adapter else model.base_model.disable_adapter_layers()
        with torch.no_grad():
            losses = [model(**{key: torch.tensor([ids]) for key, ids in row.items()}).loss for row in held_out]
        torch.testing.assert_close(torch.stack(losses).mean().item(), loss[name], rtol=1e-5, atol=0)

    printed = capsys.readouterr().out
    assert re.search(r"^training GraLoRA r=8 k=4 hybrid_r=4, .* on cpu by (fused torch|reference)", printed, re.M)
    assert f"data: {args.data_path}: rows with something to train on: 40 of instruction+output" in printed
    assert f"\n\n### Response:\n>>>{printed.split('Repeat ')[1][:3] * 3}<end><<<\n----\n" in printed
    assert f"held-out loss: {loss['before']:.4f} before, {loss['after']:.4f} after 6 steps" in printed
    assert metrics["sample"]["prompt"] in printed and metrics["sample"]["prompt"].startswith(
        "### Instruction:\nRepeat"
    )
    assert str(output) in printed


def test_without_use_gralora_it_is_plain_lora_of_the_same_size(arguments, tmp_path):
    plain = finetune(arguments(use_gralora=False, max_steps=1, val_set_size=0))
    assert "use_gralora" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {tensor.dim() for tensor in weights(tmp_path / "out").values()} == {2}
    assert plain["held_out_loss"] is None and plain["sample"]["before"] == ""
    granular = finetune(arguments(max_steps=1, val_set_size=0, overwrite=True))
    assert plain["parameters"] == granular["parameters"] and plain["parameters"]["trainable"] > 0
    assert granular["arguments"]["gralora_k"] == 2, "the number that auto stands for"


def test_plain_lora_is_accelerated(arguments, capsys, monkeypatch):
    """As by gralora.accelerate, unless --kernels torch or reference leaves it to PEFT; the losses are the same."""
    monkeypatch.setattr(plans, "choice", "auto")  # put back at the end
    losses = {}
    for kernels in ("auto", "torch", "reference", "portable"):
        args = arguments(use_gralora=False, max_steps=2, kernels=kernels, overwrite=True)
        losses[kernels] = finetune(args)["held_out_loss"]["after"]
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training LoRA")]
        is_ours = kernels in ("auto", "portable")
        assert (" by PEFT" in line) != is_ours and (f" by {plans.describe('cpu')}" in line) == is_ours, line
        assert plans.choice == kernels
    assert all(loss == pytest.approx(losses["torch"], abs=1e-4) for loss in losses.values())
    with pytest.raises(ValueError, match="kernels='fast' must be one of auto, portable"):
        arguments(kernels="fast")


def test_model_card(arguments, tmp_path):
    """It says what was trained on what; each run writes its own, and leaves one that a person wrote."""
    card = tmp_path / "out" / "README.md"
    for alpha in (16, 48):
        args = arguments(max_steps=1, val_set_size=2, lora_alpha=alpha, overwrite=True)
        loss = finetune(args)["held_out_loss"]
        text = card.read_text()
        assert f"- base model: {args.base_model}" in text and f"- data: {args.data_path}" in text
        assert f"| lora_alpha | {alpha} |" in text and "| lora_target_modules | ['q_proj', 'up_proj'] |" in text
        assert f"{loss['before']:.4f} before training, {loss['after']:.4f} after" in text
        assert text.count("---\n") == 2 and "base_model: " in text, "with PEFT's metadata"
        assert "|\n\n### Framework" in text, "what PEFT adds is no row of the table"
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert isinstance(names["model"], PeftModel) and names["tokenizer"].eos_token == "<end>"
    card.write_text("---\nlicense: mit\n---\nMy own words.\n")
    finetune(arguments(max_steps=1, val_set_size=0, overwrite=True))
    assert "license: mit" in card.read_text() and "---\nMy own words.\n" in card.read_text()
    assert "lora_alpha" not in card.read_text()


def test_conversations(arguments, tiny_model, tmp_path):
    """`messages` need the base model's chat template, and train what the same text as prompt and completion does."""
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    words = ["ab", "cd", "ef", "gh"]
    turns = [[{"role": "user", "content": x}, {"role": "assistant", "content": x * 2}] for x in words]
    chats.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    pairs.write_text("\n".join(json.dumps({"prompt": f"user {x}\n", "completion": x * 2}) for x in words))
    with pytest.raises(ValueError, match="chats.jsonl, line 1: field 'messages' needs a chat template"):
        finetune(arguments(data_path=str(chats)))

    base = tmp_path / "chat model"
    shutil.copytree(tiny_model, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}user {{ m.content }}\n{% else %}{{ m.content }}<end>"
        "{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(base)
    with chats.open("a") as file:
        file.write("\nbroken")
    for name, path in (("chats", chats), ("pairs", pairs)):
        changes = {"base_model": str(base), "data_path": str(path), "max_steps": 2, "val_set_size": 0}
        changes |= {"skip_bad_rows": True}
        finetune(arguments(output_dir=str(tmp_path / name), **changes))
    assert equal(weights(tmp_path / "chats"), weights(tmp_path / "pairs"))


def test_training_flags_reach_the_trainer(arguments, tmp_path):
    """Gradient checkpointing changes nothing; the others do."""
    runs = {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "rslora": {"use_rslora": True},
        "weight decay": {"weight_decay": 0.5},
        "schedule": {"lr_scheduler_type": "constant"},
        "optimizer": {"optim": "sgd"},
        "inputs": {"train_on_inputs": True},
        "clipping": {"max_grad_norm": 1e-3},
        "noise": {"neftune_noise_alpha": 5.0},
    }
    for name, changes in runs.items():
        finetune(arguments(output_dir=str(tmp_path / name), max_steps=3, val_set_size=0, **changes))
        same = name in ("plain", "checkpointing")
        assert equal(weights(tmp_path / name), weights(tmp_path / "plain")) == same, name
    assert json.loads((tmp_path / "rslora" / "adapter_config.json").read_text())["use_rslora"] is True


def test_packed_and_padded_runs_learn_the_same(arguments, tmp_path):
    """One step on the same examples, as two padded batches of two or as one row."""
    path = tmp_path / "four.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "a" * i, "completion": "b" * (12 - 2 * i)}) for i in range(1, 5)))
    same = {"data_path": str(path), "max_steps": 1, "val_set_size": 0, "warmup_steps": 0}
    finetune(arguments(output_dir=str(tmp_path / "padded"), batch_size=4, micro_batch_size=2, **same))
    packed = finetune(
        arguments(output_dir=str(tmp_path / "packed"), batch_size=1, micro_batch_size=1, packing=True, **same)
    )
    assert packed["examples"]["train"] == 4 and packed["tokens"] == sum(13 - i for i in range(1, 5))
    torch.testing.assert_close(weights(tmp_path / "packed"), weights(tmp_path / "padded"), rtol=1e-4, atol=1e-6)
    finetune(arguments(output_dir=str(tmp_path / "other"), batch_size=2, micro_batch_size=2, **same))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(weights(tmp_path / "other"), weights(tmp_path / "padded"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "quantization, precision",
    [("4bit", {}), ("4bit", {"bf16": True}), ("8bit", {"bf16": True}), ("fp8", {}), ("fp8", {"bf16": True})],
)
def test_quantised_base(arguments, tmp_path, monkeypatch, quantization, precision):
    """It learns, also after the evaluation at the start; reloaded it is the same, merged when dequantised."""
    pytest.importorskip("torchao" if quantization == "fp8" else "bitsandbytes")
    monkeypatch.setattr(module, "verify_in_new_process", lambda folder: None)
    loaded = []
    adapt = module.get_peft_model
    monkeypatch.setattr(module, "get_peft_model", lambda model, config: loaded.append(model) or adapt(model, config))
    metrics = finetune(arguments(quantization=quantization, verify=True, gradient_checkpointing=True, **precision))
    kinds = {type(part).__name__ for part in (*loaded[0].modules(), *loaded[0].parameters())}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt", "fp8": "Float8Tensor"}[quantization] in kinds
    assert metrics["held_out_loss"]["after"] < metrics["held_out_loss"]["before"] - 0.05
    differences = verify(tmp_path / "out")
    assert differences["reloaded"] == 0 and differences["base"] > 10 * differences["merged"] > 0
    changed = load_file(tmp_path / "out" / WEIGHTS)
    save_file({name: tensor * 0.5 for name, tensor in changed.items()}, tmp_path / "out" / WEIGHTS)
    with pytest.raises(ValueError, match="the reloaded adapter"):
        verify(tmp_path / "out")


def test_base_of_fp8_files(arguments, tiny_model, tmp_path, monkeypatch, request):
    """In float32, which torchao's layers refuse as they are read: resumed bit for bit, and merged when dequantised."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(module, "verify_in_new_process", lambda folder: None)
    folder, out = tmp_path / "fp8", tmp_path / "out"
    quantize_fp8(load_model(str(tiny_model), torch.bfloat16)).save_pretrained(folder)
    load_tokenizer(str(tiny_model)).save_pretrained(folder)
    assert {p.dtype for p in load_model(str(folder), torch.float32).parameters()} == {torch.float32}
    changes = {"base_model": str(folder), "lora_target_modules": ["all-linear"], "save_steps": 3, "verify": True}
    finetune(arguments(**changes))
    whole = weights(out)
    shutil.rmtree(out / "checkpoint-6")
    finetune(arguments(resume_from_checkpoint=str(out / "checkpoint-3"), **changes))
    assert equal(weights(out), whole)
    differences = verify(out)
    assert differences["reloaded"] == 0 and differences["base"] > 10 * differences["merged"] > 0
    # with products, which the merged model has not, but which are the same in training and reloaded
    monkeypatch.setattr(plans, "CPU", replace(plans.CPU, fp8_product="fp8"))
    monkeypatch.setattr(fp8, "choice", "products")
    plans.fp8_module.cache_clear()
    request.addfinalizer(plans.fp8_module.cache_clear)
    with pytest.raises(ValueError, match="the reloaded adapter"):
        verify(out)
    finetune(arguments(**changes, overwrite=True))
    differences = verify(out)
    assert differences["reloaded"] == 0 and differences["base"] > 100 * differences["merged"] > 0


def test_early_stopping_keeps_the_best_adapter(arguments, tmp_path):
    """Held out is what gets less likely by training, so that the first loss after the start is the best."""
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"prompt": "", "completion": "UVWXYZ"}))
    changes = {"max_steps": 30, "eval_steps": 1, "save_total_limit": 2, "eval_data_path": str(path)}
    changes |= {"val_set_size": None, "early_stopping_patience": 2, "learning_rate": 1e-2, "warmup_steps": 0}
    metrics = finetune(arguments(lora_target_modules=["all-linear"], **changes))
    losses = [row["held_out_loss"] for row in metrics["history"] if "held_out_loss" in row]
    best = min(range(1, len(losses)), key=losses.__getitem__)
    assert metrics["steps"] == best + 2 < 30 and losses[best] < losses[-1]
    assert metrics["held_out_loss"] == {"before": losses[0], "after": losses[best]}
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "out" / f"checkpoint-{best}"))
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 2

    # another that ends by itself, and is resumed with no step left
    changes |= {"max_steps": best + 2, "lr_scheduler_type": "constant", "output_dir": str(tmp_path / "short")}
    for more in ({}, {"resume_from_checkpoint": "latest"}):
        metrics = finetune(arguments(lora_target_modules=["all-linear"], **changes, **more))
        assert metrics["steps"] == best + 2
        assert equal(weights(tmp_path / "short"), weights(tmp_path / "short" / f"checkpoint-{best}"))
        (tmp_path / "short" / WEIGHTS).unlink()


def test_speed_and_memory_are_measured(arguments, capsys):
    """Tokens are those of the training batches; padding does not count."""
    args = arguments(max_steps=9, batch_size=4, num_train_epochs=1)
    metrics = finetune(args)
    tokenizer = AutoTokenizer.from_pretrained(args.base_model)
    rows = encode(tokenizer, split(file_examples(args.data_path).examples, 5)[0], 100)
    assert metrics["tokens"] == sum(len(row["input_ids"]) for row in rows), "one pass over all"
    assert metrics["tokens_per_s"] > 0 and 0.1 < metrics["peak_memory_gib"] < 100
    lines = [line for line in capsys.readouterr().out.splitlines() if "tok/s" in line]
    assert [line.split()[1] for line in lines] == ["1/9", "2/9", "4/9", "6/9", "8/9"]
    assert all(word in lines[-1] for word in ("loss ", "grad ", "rate ", "0:00:00 left", " GiB"))
    assert "rate 0 (warmup)" in lines[0] and "(warmup)" not in lines[-1], "the first step of a warmup has no rate"
    assert max(map(len, lines)) <= 80


def test_settings_of_gralora_need_use_gralora(arguments, tmp_path):
    """As flags are given one by one, so that none is forgotten by a plain LoRA."""
    for name, value in {"gralora_k": 2, "hybrid_r": 4, "gralora_scaling": "matched"}.items():
        with pytest.raises(ValueError, match=f"^--{name} {value}: without --use_gralora a plain LoRA is trained"):
            finetune(arguments(use_gralora=False, **{name: value}))
    assert not (tmp_path / "out").exists()
    finetune(arguments(use_gralora=False, gralora_k="auto", max_steps=1, val_set_size=0))  # the default


def test_lines_fit_a_terminal():
    """Several spaces, one, or several lines, whatever fits first; no part is cut or divided."""
    parts = ["step 1000/12000", "loss 3.2268", "grad 0.17", "rate 0.0003", "12345 tok/s", "12:04:35 left"]
    assert output.fitted(parts[:3]) == "step 1000/12000  loss 3.2268  grad 0.17"
    parts[3] = "rate 0.00029"
    assert output.fitted(parts) == " ".join(parts)
    assert output.fitted([*parts, "11.7 GiB"]) == " ".join(parts) + "\n  11.7 GiB"
    assert output.fitted(parts, (", ",), sys.maxsize) == ", ".join(parts)
    assert output.fitted(parts[:3], (", ",), 30) == "step 1000/12000, loss 3.2268,\n  grad 0.17"


@pytest.fixture
def flags(arguments):
    args = arguments(max_steps=1)
    words = ["--lora_target_modules", "q_proj", "--use_gralora", "--max_steps", "1", "--val_set_size", "2"]
    words += ["--max_seq_length", "100"]
    return ["finetune", "--base_model", args.base_model, "--data_path", args.data_path, *words]


def test_json_is_all_of_stdout(flags, tmp_path, capsys):
    assert cli.main([*flags, "--output_dir", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    assert json.loads(line) == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "examples to train on" in captured.err
    assert cli.main([*flags, "--output_dir", str(tmp_path / "out"), "--json"]) == cli.USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == "" and "holds an adapter of an earlier run" in captured.err


def test_bars_say_of_what(flags, tmp_path, capsys):
    """They are drawn here, in a process that has imported tqdm before `gralora_command.main` can turn it off."""
    assert cli.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    bars = capsys.readouterr().err
    assert "training: 100%|" in bars and "held out: 100%|" in bars


def test_quiet_prints_nothing_but_errors(flags, tmp_path, capsys):
    assert cli.main([*flags, "--output_dir", str(tmp_path / "out"), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == "" and (tmp_path / "out" / "metrics.json").exists()
    assert cli.main([*flags, "--output_dir", str(tmp_path / "out"), "--quiet", "--json", "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    assert cli.main([*flags, "--output_dir", str(tmp_path / "out"), "--quiet"]) == cli.USER_ERROR
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("off", range(4))
def test_bars_are_afterwards_as_they_were(off):
    """Those of each library, whether all were on or one was off."""
    bars, hub = transformers.logging, huggingface_hub.utils

    def are_off() -> list[bool]:
        return [not bars.is_progress_bar_enabled(), *(one.are_progress_bars_disabled() for one in (hub, datasets))]

    try:
        [lambda: None, bars.disable_progress_bar, hub.disable_progress_bars, datasets.disable_progress_bars][off]()
        before = are_off()
        assert any(before) == (off > 0)
        with output.without_bars():
            assert all(are_off())
        assert are_off() == before
    finally:
        bars.enable_progress_bar()
        datasets.enable_progress_bars()


def test_report_to(monkeypatch):
    assert FinetuneArguments(report_to="none").training_arguments().report_to == []
    monkeypatch.setattr(arguments_module, "get_available_reporting_integrations", list)
    with pytest.raises(ImportError, match="report_to='wandb' needs .*: pip install wandb"):
        FinetuneArguments(report_to="wandb")
    monkeypatch.setattr(arguments_module, "get_available_reporting_integrations", lambda: ["wandb"])
    assert FinetuneArguments(report_to="wandb").training_arguments().report_to == ["wandb"]


def test_seed_and_accumulation(arguments, tmp_path):
    """The same seed gives the same adapter, however the batch is divided; another seed does not."""
    runs = {
        "first": {},
        "again": {},
        "whole": {"micro_batch_size": 4},
        "other seed": {"seed": 1},
        "other batch": {"batch_size": 2},
    }
    saved = {}
    for name, changes in runs.items():
        finetune(arguments(output_dir=str(tmp_path / name), max_steps=3, val_set_size=0, **changes))
        saved[name] = weights(tmp_path / name)
    assert equal(saved["first"], saved["again"])
    torch.testing.assert_close(saved["first"], saved["whole"], rtol=1e-3, atol=1e-5)
    for name in ("other seed", "other batch"):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(saved["first"], saved[name], rtol=1e-3, atol=1e-5)


class CtrlC(resume.SaveOnInterrupt):
    """Ctrl-C during step 3."""

    times = 1

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def test_interrupted_run_resumes_as_if_nothing_had_happened(arguments, tmp_path, monkeypatch):
    changes = {"lora_dropout": 0.2}
    whole = finetune(arguments(output_dir=str(tmp_path / "whole"), **changes))
    checkpoint = tmp_path / "out" / "checkpoint-3"
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match=f"step 3 of 6.*{checkpoint}"):
        patched.setattr(resume, "SaveOnInterrupt", CtrlC)
        finetune(arguments(**changes))
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "out" / WEIGHTS).exists() and not equal(weights(checkpoint), weights(tmp_path / "whole"))

    set_seed(99)
    resumed = finetune(arguments(resume_from_checkpoint=str(checkpoint), **changes))
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert resumed["held_out_loss"] == whole["held_out_loss"]


def test_second_interrupt_stops_at_once(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SaveOnInterrupt", CtrlC)
    monkeypatch.setattr(CtrlC, "times", 2)
    with pytest.raises(KeyboardInterrupt, match="without a checkpoint"):
        finetune(arguments())
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_interrupt_of_the_last_step_lets_the_run_end(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SaveOnInterrupt", CtrlC)
    assert finetune(arguments(max_steps=3))["steps"] == 3 and (tmp_path / "out" / WEIGHTS).exists()


def test_resuming_another_adapter_is_refused(arguments, tmp_path):
    finetune(arguments(max_steps=1, val_set_size=0))
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(ValueError, match="lora_alpha=16, this run 32"):
        finetune(arguments(resume_from_checkpoint=checkpoint, lora_alpha=32))
    with pytest.raises(ValueError, match="use_gralora=True, this run False"):
        finetune(arguments(resume_from_checkpoint=checkpoint, use_gralora=False))


def test_verify_of_an_adapter_without_recorded_logits_says_who_writes_them(tiny_model, tmp_path, capsys):
    """As PEFT saves one; the command that the message names first works on it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LoraConfig(use_gralora=True, r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert cli.main(["verify", str(tmp_path)]) == cli.USER_ERROR
    said = capsys.readouterr().err
    assert "has no logits.safetensors and no metrics.json" in said and "`gralora finetune --verify` writes" in said
    assert cli.main(["inspect", str(tmp_path)]) == 0


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bfloat16"])
def test_verify(arguments, tmp_path, monkeypatch, precision):
    """The saved adapter gives the logits of the end of training; a changed one, or a wrong merge, is noticed."""
    monkeypatch.setattr(module, "verify_in_new_process", lambda folder: None)
    finetune(arguments(verify=True, **precision))
    output = tmp_path / "out"
    differences = verify(output)
    assert differences["reloaded"] == 0 and differences["base"] > 20 * differences["merged"]
    assert json.loads((output / "metrics.json").read_text())["max_logit_difference"] == differences

    with monkeypatch.context() as patched:
        patched.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
        with pytest.raises(ValueError, match="the merged adapter"):
            verify(output)
    changed = load_file(output / WEIGHTS)
    save_file({name: -tensor for name, tensor in changed.items() if "lora_A" in name} | changed, output / WEIGHTS)
    assert verify(output)["reloaded"] == 0, "writing the file again changes nothing"
    for name, tensor in changed.items():
        changed[name] = tensor * 0.5 if "lora_B" in name else tensor
    save_file(changed, output / WEIGHTS)
    with pytest.raises(ValueError, match="the reloaded adapter"):
        verify(output)


def test_verify_runs_in_another_process(arguments, capfd):
    metrics = finetune(arguments(verify=True))
    assert 0 <= metrics["max_logit_difference"]["merged"] < 1e-4 < metrics["max_logit_difference"]["base"]
    assert "adapter merged: " in capfd.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 6, "micro_batch_size": 4}, "batch_size=6 .* micro_batch_size=4 .*use batch_size=4 or 8"),
        ({"batch_size": 2, "micro_batch_size": 4}, "use batch_size=4,"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"gralora_k": "many"}, "gralora_k='many' must be a whole number or 'auto'"),
        ({"bf16": True, "fp16": True}, "exclude each other"),
        ({"optim": "adamm"}, "optim='adamm' must be one of adamw_torch"),
        ({"lr_scheduler_type": "flat"}, "lr_scheduler_type='flat' must be one of linear, .*constant"),
        ({"quantization": "3bit"}, "quantization='3bit' must be one of none, 4bit, 8bit, fp8"),
        ({"batch_size": 8, "gradient_accumulation_steps": 4}, "is gradient_accumulation_steps=2, not 4; give one of"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
        ({"early_stopping_patience": 2, "val_set_size": 0}, "early_stopping_patience=2 needs a held-out loss"),
        ({"streaming": True, "data_path": "x"}, "streaming=True needs max_steps"),
        ({"streaming": True, "max_steps": 5}, "streaming=True needs data_path"),
        ({"train_split": "train"}, "train_split='train' needs data_path"),
        ({"eval_split": "test"}, "eval_split='test' needs data_path"),
        ({"data_path": "x", "train_split": "a", "eval_split": "a"}, "eval_split='a' is the split that is trained on"),
        ({"report_to": "wand"}, "report_to='wand' must be one of none, .*wandb"),
    ],
)
def test_arguments_that_contradict(changes, message):
    with pytest.raises(ValueError, match=message):
        FinetuneArguments(**changes)


def test_batch_is_divided_among_devices():
    args = FinetuneArguments(batch_size=24, micro_batch_size=4)
    assert [args.accumulation(devices) for devices in (1, 2, 3, 6)] == [6, 3, 2, 1]
    whole = FinetuneArguments(gradient_accumulation_steps=3)
    assert [whole.accumulation(devices) for devices in (1, 5)] == [3, 3]
    assert FinetuneArguments(batch_size=24, gradient_accumulation_steps=6).accumulation(1) == 6
    with pytest.raises(ValueError, match="4 device.*use batch_size=16 or 32"):
        args.accumulation(4)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"gralora_k": 3}, ValueError, "gralora_k=3"),
        ({"lora_target_modules": ["nonsense"]}, ValueError, "nonsense"),
        ({"max_seq_length": 4}, ValueError, "max_seq_length=4 has no room"),
        ({"max_seq_length": 129}, ValueError, "max_seq_length=129 is more than the 128 tokens"),
        ({"val_set_size": 40}, ValueError, "val_set_size=40"),
        ({"data_path": "missing.jsonl"}, OSError, "missing.jsonl"),
        ({"base_model": "./missing"}, OSError, "base_model='./missing' could not be loaded.*'embedded'"),
        ({"resume_from_checkpoint": "missing"}, ValueError, "resume_from_checkpoint='missing'"),
    ],
)
def test_what_does_not_fit_is_named(arguments, changes, error, message):
    with pytest.raises(error, match=message):
        finetune(arguments(**changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in float16")
def test_fp16_needs_a_gpu(arguments):
    with pytest.raises(ValueError, match="fp16=True needs a GPU"):
        finetune(arguments(fp16=True))


def test_missing_packages_are_named(monkeypatch, capsys):
    for name in ("gralora.tool.finetune", "trl"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert cli.main(["finetune", "--print_config"]) == cli.USER_ERROR
    wanted = (
        f"finetune needs the package trl, which is not installed: pip install '{Path(__file__).parents[1]}[finetune]'"
    )
    assert wanted in capsys.readouterr().err


def test_flags_of_the_research_scripts():
    flags = "--base_model gpt2 --output_dir o --use_gralora --lora_r 64 --lora_alpha 128 --lora_dropout 0.1 "
    flags += "--lora_target_modules c_attn c_proj --gralora_k 4 --hybrid_r 16 --seed 1 --num_train_epochs 2 "
    flags += "--max_steps 5 --batch_size 8 --micro_batch_size 2 --learning_rate 1e-4 --cutoff_len 512 "
    flags += "--logging_steps 1 --save_steps 2 --bf16"
    expected = {"base_model": "gpt2", "output_dir": "o", "use_gralora": True, "lora_r": 64, "lora_alpha": 128}
    expected |= {"lora_dropout": 0.1, "lora_target_modules": ["c_attn", "c_proj"], "gralora_k": 4, "hybrid_r": 16}
    expected |= {"seed": 1, "num_train_epochs": 2, "max_steps": 5, "batch_size": 8, "micro_batch_size": 2}
    expected |= {"learning_rate": 1e-4, "max_seq_length": 512, "logging_steps": 1, "save_steps": 2, "bf16": True}
    (args,) = HfArgumentParser(FinetuneArguments).parse_args_into_dataclasses(flags.split())
    assert {name: asdict(args)[name] for name in expected} == expected


def test_flags_of_trl():
    flags = "--model_name_or_path gpt2 --dataset_name data.jsonl --per_device_train_batch_size 2 --max_length 512 "
    flags += "--load_in_4bit --gradient_accumulation_steps 8 --dataset_train_split a --dataset_test_split b "
    flags += "--gradient_checkpointing --optim sgd --lr_scheduler_type cosine --weight_decay 0.1 --use_rslora"
    expected = {"base_model": "gpt2", "data_path": ["data.jsonl"], "micro_batch_size": 2, "max_seq_length": 512}
    expected |= {"gradient_checkpointing": True, "optim": "sgd", "lr_scheduler_type": "cosine", "weight_decay": 0.1}
    expected |= {"use_rslora": True, "report_to": None, "quantization": "4bit", "gradient_accumulation_steps": 8}
    expected |= {"train_split": "a", "eval_split": "b"}
    args = vars(module.make_parser().parse_args(flags.split()))
    assert {name: args[name] for name in expected} == expected
    assert module.make_parser().parse_args(["--load_in_8bit", "true"]).quantization == "8bit"
    assert module.make_parser().parse_args([]).quantization == "none"


def test_every_flag_is_explained():
    for field in fields(FinetuneArguments):
        assert field.metadata["help"].endswith(".")


def test_all_linear_is_passed_as_one_word():
    assert FinetuneArguments(lora_target_modules=["all-linear"]).lora_config().target_modules == "all-linear"
