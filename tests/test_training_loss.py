"""The loss that training computes, against TRL's, and adapters on the output layer, which TRL refuses."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import adapted, gralora_config, randomize
from peft import AutoPeftModelForCausalLM, get_peft_model, load_peft_weights
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from gralora.tool import cli
from gralora.tool.training import trainer as module
from gralora.tool.training.trainer import AdapterTrainer

ROWS = [  # of different lengths, and with learnt tokens at different places
    {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, 8, -100, 10]},
    {"input_ids": [11, 12, 13], "labels": [-100, -100, 13]},
    {"input_ids": [21, 22, 23, 24], "labels": [-100, 22, -100, 24]},
]


def make_trainer(folder: Path, tmp_path: Path, targets: list[str], **settings) -> AdapterTrainer:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = randomize(get_peft_model(model, gralora_config(target_modules=targets)))
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False} | settings
    return AdapterTrainer(
        model=model,
        args=SFTConfig(str(tmp_path / "run"), max_length=None, **settings),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(folder),
    )


def tokenizer(folder: Path):
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.pad_token = loaded.eos_token
    return loaded


def loss_and_gradients(compute, trainer, **options) -> tuple[float, list[torch.Tensor]]:
    model = trainer.model
    model.zero_grad()
    loss = compute(trainer, model, dict(trainer.data_collator(ROWS)), **options)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("count", [None, 17])
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_loss_and_gradients_are_those_of_trl(tiny_model, tmp_path, count, padding_free):
    trainer = make_trainer(tiny_model, tmp_path, ["q_proj", "down_proj"], padding_free=padding_free)
    assert trainer.asks_for_logits and not trainer.adapts_output
    ours, gradients = loss_and_gradients(AdapterTrainer.compute_loss, trainer, num_items_in_batch=count)
    theirs, others = loss_and_gradients(SFTTrainer.compute_loss, trainer, num_items_in_batch=count)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert any(gradient.abs().max() > 1e-4 for gradient in others)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)


def test_a_cpu_computes_less_than_with_trl(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, ["q_proj", "down_proj"])
    flops = {}

    forms = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # is not counted by default
    for name, compute in (("ours", AdapterTrainer.compute_loss), ("theirs", SFTTrainer.compute_loss)):
        with FlopCounterMode(display=False, custom_mapping=forms) as counter:
            loss_and_gradients(compute, trainer)
        flops[name] = counter.get_total_flops()
    assert flops["ours"] < 0.85 * flops["theirs"]


def test_many_logits_are_left_to_trl(tiny_model, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model, tmp_path, ["q_proj"])
    asked = []
    monkeypatch.setattr(module, "MOST_LOGITS", 100)
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *_: asked.append(True) or torch.zeros(()))
    trainer.compute_loss(trainer.model, dict(trainer.data_collator(ROWS)))
    assert asked


def test_an_adapter_on_the_output_layer_is_learnt(tiny_model, tmp_path):
    """Its loss is that of the whole model's logits, and its factors get gradients."""
    trainer = make_trainer(tiny_model, tmp_path, ["lm_head", "q_proj"])
    assert trainer.adapts_output
    batch = trainer.data_collator(ROWS)
    ours, _ = loss_and_gradients(AdapterTrainer.compute_loss, trainer)
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert ours == pytest.approx(expected.item(), rel=1e-6)
    factors = {name: p for name, p in trainer.model.named_parameters() if "lm_head" in name and p.requires_grad}
    assert factors and all(p.grad.abs().max() > 1e-5 for p in factors.values())
    with trainer.model.disable_adapter():
        without = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert (logits - without).abs().max() > 1e-3


def test_other_losses_of_an_adapted_output_layer_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="output layer of LlamaForCausalLM is adapted.*loss_type='dft'"):
        make_trainer(tiny_model, tmp_path, ["lm_head"], loss_type="dft")


@pytest.fixture
def command(tiny_model, tmp_path):
    """Run `gralora finetune` on a few texts; returns its status and output folder."""

    def run(*flags: str) -> tuple[int, Path]:
        data = tmp_path / "data.jsonl"
        data.write_text("\n".join(json.dumps({"prompt": f"{i}:", "completion": " add" * 9}) for i in range(24)))
        out = tmp_path / "out"
        argv = ["finetune", "--base_model", str(tiny_model), "--data_path", str(data), "--output_dir", str(out)]
        argv += ["--use_gralora", "--lora_r", "8", "--max_steps", "3", "--batch_size", "4", "--val_set_size", "4"]
        return cli.main([*argv, "--learning_rate", "1e-2", *flags]), out

    return run


def test_the_command_trains_an_output_layer(command, capfd):
    status, out = command("--lora_target_modules", "lm_head", "q_proj", "--verify")
    assert status == 0, capfd.readouterr().err
    factors = [t for name, t in load_peft_weights(str(out)).items() if "lm_head.lora_B" in name]
    assert factors and all(t.abs().max() > 0 for t in factors)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["held_out_loss"]["after"] < metrics["held_out_loss"]["before"]
    assert metrics["max_logit_difference"]["merged"] < 1e-3
    AutoPeftModelForCausalLM.from_pretrained(out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do them")
@pytest.mark.parametrize("flag", ["--activation_offloading", "--use_liger_kernel", "--fp16"])
def test_what_needs_a_gpu_is_refused_by_name(command, capsys, flag):
    status, out = command(flag)
    assert status == cli.USER_ERROR and not out.exists()
    assert f"{flag[2:]}=True needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora_target_modules", "all-linear", "lm_head"], "all-linear stands alone"),
        (["--gradient_checkpointing_kwargs", '{"every_n_layers": 2}'], "needs gradient_checkpointing"),
    ],
)
def test_flags_that_cannot_be_are_refused(command, capsys, flags, message):
    status, _ = command(*flags)
    assert status == cli.USER_ERROR and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--padding_free"],
        ["--loss_type", "dft"],
        ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"preserve_rng_state": false}'],
        ["--packing", "--packing_strategy", "bfd_split", "--max_seq_length", "64"],
        ["--neftune_noise_alpha", "5"],
        ["--auto_find_batch_size"],
    ],
    ids=lambda flags: flags[-2] if len(flags) > 1 else flags[0],
)
def test_fields_of_trl_train(command, capfd, flags):
    status, out = command(*flags)
    assert status == 0, capfd.readouterr().err
    assert all(t.abs().max() > 0 for t in load_peft_weights(str(out)).values())


def test_adapted_models_in_evaluation_are_left_as_they_were(tiny_model, tmp_path):
    """The refusal that is switched off for the output layer comes back: the model's own method is there again."""
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny_model), gralora_config(target_modules=["lm_head"]))
    head = model.get_output_embeddings()
    AdapterTrainer(
        model=model,
        args=SFTConfig(str(tmp_path / "run"), max_length=None, report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(tiny_model),
    )
    assert model.get_output_embeddings() is head


def test_factors_are_where_the_trainer_has_moved_the_model(tiny_model, tmp_path, monkeypatch):
    """To a GPU, here to "meta": what keeps their dtype must not leave them on the CPU."""
    monkeypatch.setattr(AdapterTrainer, "_move_model_to_device", lambda self, model, device: model.to("meta"))
    trainer = make_trainer(tiny_model, tmp_path, ["q_proj"])
    assert {(p.device.type, p.dtype) for p in trainer.model.parameters()} == {("meta", torch.float32)}
