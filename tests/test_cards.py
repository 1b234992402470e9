"""Model cards: that of a GraLoRA adapter says that gralora is needed, whoever writes it; a plain LoRA's does not."""

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from helpers import gralora_config, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from gralora import cards

CONFIGS = {"gralora": lambda: gralora_config(target_modules=["q_proj"]), "lora": lambda: LoraConfig(r=4)}
ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in token_ids(4, 6)]


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def adapted(folder: Path, kind: str) -> PeftModel:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), CONFIGS[kind]())


def saved(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder)


def by_trainer(model: PeftModel, folder: Path) -> None:
    """Saved, then described by the Trainer, whose card takes the place of PEFT's."""
    args = TrainingArguments(output_dir=str(folder), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    trainer = Trainer(model=model, args=args, train_dataset=Dataset.from_list(ROWS))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    assert "Training procedure" in card(folder), "the Trainer's own"


def by_sft_trainer(model: PeftModel, folder: Path) -> None:
    """TRL writes over PEFT's card when it saves a checkpoint."""
    args = SFTConfig(output_dir=str(folder), max_steps=1, save_steps=1, use_cpu=True, report_to=[], max_length=None)
    tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().name_or_path)
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    trainer.train()
    assert "Quick start" in card(folder), "TRL's own"
    assert (cards.WORDS in card(folder / "checkpoint-1")) == (cards.WORDS in card(folder))


@pytest.mark.parametrize("write", [saved, by_trainer, by_sft_trainer])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_card_says_what_is_needed(kind, write, tiny_model, tmp_path):
    """Once, below what others have written; of a plain LoRA it says nothing."""
    write(adapted(tiny_model, kind), tmp_path)
    assert card(tmp_path).count(cards.WORDS) == (kind == "gralora")
    assert ("gralora" in card(tmp_path).lower()) == (kind == "gralora")


def test_a_card_that_says_it_is_left(tiny_model, tmp_path):
    """As that of `gralora finetune`, or a user's."""
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n\nMine. First: import gralora\n")
    adapted(tiny_model, "gralora").save_pretrained(tmp_path)
    assert card(tmp_path).count("import gralora") == 1 and cards.NOTE.strip() not in card(tmp_path)


def test_another_trl_is_left():
    cards.install_in_trl(ModuleType("trl"))
    trainer: Any = SimpleNamespace(_BaseTrainer=SimpleNamespace())
    cards.install_in_trl(trainer)
    assert not hasattr(trainer._BaseTrainer, "create_model_card")
