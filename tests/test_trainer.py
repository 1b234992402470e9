"""transformers' Trainer: a GraLoRA run can be interrupted and resumed, and its best checkpoint restored."""

import pytest
import torch
from helpers import MODELS, TARGETS, adapter_parameters, gralora_config, models, token_ids
from peft import PeftModel, get_peft_model, load_peft_weights
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

CONFIGS = {"k1": (1, 0), "k2-hybrid": (2, 2), "auto": ("auto", 0)}
configs = pytest.mark.parametrize("k, hybrid_r", CONFIGS.values(), ids=CONFIGS)


def make_trainer(model_name, folder, k, hybrid_r, init_seed=1, eval_metric=None, **arguments):
    """A Trainer for six steps with dropout, so that the random state matters too; checkpoints every two."""
    base = MODELS[model_name]()
    torch.manual_seed(init_seed)
    config = gralora_config(
        k, hybrid_r=hybrid_r, target_modules=TARGETS[model_name], lora_dropout=0.2, task_type="CAUSAL_LM"
    )
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids(12, 6)]
    options = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "seed": 5}
    options |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}
    return Trainer(
        model=get_peft_model(base, config),
        args=TrainingArguments(output_dir=str(folder), **options | arguments),
        train_dataset=data,
        eval_dataset=data[:2],
        compute_metrics=eval_metric,
    )


def loss_curve(trainer):
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


def weights(model):
    return {name: p.detach().clone() for name, p in adapter_parameters(model).items()}


@models
@configs
def test_resumed_run_equals_an_uninterrupted_one(model_name, k, hybrid_r, tmp_path):
    """A run resumed from a checkpoint has the very losses and final weights of one that was not interrupted."""
    whole = make_trainer(model_name, tmp_path, k, hybrid_r)
    whole.train()
    resumed = make_trainer(model_name, tmp_path, k, hybrid_r, init_seed=2)  # its start must not matter
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = loss_curve(whole)
    assert sorted(expected) == [1, 2, 3, 4, 5, 6] and len(set(expected.values())) == 6
    assert loss_curve(resumed) == expected
    final, resumed_final = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(final[name], resumed_final[name]) for name in final)
    start = weights(make_trainer(model_name, tmp_path, k, hybrid_r).model)
    assert not any(torch.equal(final[name], start[name]) for name in final)


@models
def test_checkpoint_holds_the_adapter_only(model_name, tmp_path):
    """A checkpoint is a PEFT adapter with the weights of its step, and nothing of the base model."""
    trainer = make_trainer(model_name, tmp_path, 2, 2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-6"
    saved = load_peft_weights(str(checkpoint))
    expected = {name.replace(".default", ""): p for name, p in weights(trainer.model).items()}
    assert set(saved) == set(expected) and all(torch.equal(saved[name], expected[name]) for name in saved)
    loaded = PeftModel.from_pretrained(MODELS[model_name](), checkpoint)
    ids = token_ids(2, 6)
    assert torch.equal(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)


@models
@configs
def test_best_checkpoint_is_restored(model_name, k, hybrid_r, tmp_path):
    """load_best_model_at_end puts the weights of the best checkpoint back, here the second of three."""
    scores = iter([0.5, 1.0, 0.0])
    trainer = make_trainer(
        model_name,
        tmp_path,
        k,
        hybrid_r,
        eval_metric=lambda _: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best, last = (load_file(tmp_path / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (4, 6))
    for name, p in weights(trainer.model).items():
        assert torch.equal(p, best[name.replace(".default", "")])
        assert not torch.equal(p, last[name.replace(".default", "")])
