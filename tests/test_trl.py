"""TRL: its trainers take `gralora.LoraConfig` as they take PEFT's."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import gralora
from gralora import LoraConfig

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
OPTIONS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 3e-2, "logging_steps": 1, "seed": 1}
OPTIONS |= {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prefer(completions, **_) -> list[float]:
    """A reward that differs between completions."""
    return [float(len(text)) for text in completions]


def sft(model, tokenizer, config, folder):
    data = datasets.Dataset.from_list([{"prompt": f"{i} is", "completion": f" {i}{i}"} for i in range(12)])
    args = trl.SFTConfig(output_dir=folder, max_length=64, **OPTIONS)
    return trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=config)


def dpo(model, tokenizer, config, folder):
    rows = [{"prompt": f"{i} is", "chosen": f" {i}{i}", "rejected": " no"} for i in range(12)]
    args = trl.DPOConfig(output_dir=folder, max_length=64, **OPTIONS)
    data = datasets.Dataset.from_list(rows)
    return trl.DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=config)


def grpo(model, tokenizer, config, folder):
    data = datasets.Dataset.from_list([{"prompt": f"{i} is"} for i in range(12)])
    args = trl.GRPOConfig(output_dir=folder, max_completion_length=6, num_generations=4, **OPTIONS)
    return trl.GRPOTrainer(
        model, prefer, args=args, train_dataset=data, processing_class=tokenizer, peft_config=config
    )


TRAINERS = {"sft": sft, "dpo": dpo, "grpo": grpo}


@pytest.mark.parametrize("name", TRAINERS)
def test_trains_saves_and_loads(name, tiny_model, tokenizer, tmp_path):
    """The adapter alone changes, and what is saved gives the logits of what was trained."""
    config = LoraConfig(use_gralora=True, gralora_k=2, hybrid_r=2, **CONFIG)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    trainer = TRAINERS[name](base, tokenizer, config, str(tmp_path))
    trained = {key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in key for key in trained)
    trainer.train()
    after = {key: p for key, p in trainer.model.named_parameters() if key in trained}
    moved = {key for key in trained if not torch.equal(trained[key], after[key])}
    assert {key for key in moved if "lora_B" in key} == {key for key in trained if "lora_B" in key}
    for key, p in trainer.model.get_base_model().state_dict().items():
        if "lora_" not in key:
            assert torch.equal(p, before[key.replace(".base_layer", "")]), key

    trainer.save_model(str(tmp_path / "adapter"))
    saved = json.loads(Path(tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["use_gralora"], saved["gralora_k"], saved["hybrid_r"]) == (True, 2, 2)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = tokenizer("3 is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-4)
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert len(log) == 3 and all(row["loss"] == row["loss"] for row in log)


def test_one_block_is_plain_lora(tiny_model, tokenizer, tmp_path):
    """With k = 1 the losses are those of PEFT's LoRA, so the trainer sees nothing special in the layers."""
    losses = []
    for granular in ({"use_gralora": True, "gralora_k": 1}, {}):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        trainer = sft(base, tokenizer, LoraConfig(**granular, **CONFIG), str(tmp_path))
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(set(losses[0])) > 1


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("way", ["model", "config"])
def test_plain_lora_accelerated(name, way, tiny_model, tokenizer, tmp_path):
    """The losses, and what is trained, are those without: DPO and GRPO also run the base by disabling adapters."""
    losses, trained = [], []
    for accelerate in (False, True):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        config = LoraConfig(**CONFIG, accelerate=accelerate and way == "config")
        trainer = TRAINERS[name](base, tokenizer, config, str(tmp_path))
        if accelerate and way == "model":
            gralora.accelerate(trainer.model)
        count = 4 if accelerate else 0
        assert gralora.describe(trainer.model).startswith(f"{count} of 4 LoRA layers run as one operation")
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        trained.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert name == "grpo" or len(set(losses[0])) > 1
    for own, wanted in zip(*trained, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-4)
