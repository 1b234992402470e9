"""Checkpoints: which are complete, which are gone on from, and what is never overwritten by accident."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import load_peft_weights

from gralora import LoraConfig
from gralora.tool.arguments import FinetuneArguments
from gralora.tool.finetune import finetune
from gralora.tool.training import resume
from gralora.tool.training.resume import fault, find_checkpoint

KILLED_WHILE_SAVING = """
import os, signal, sys
from transformers import Trainer
from gralora.tool import cli

save = Trainer._save_optimizer_and_scheduler

def save_and_die(self, folder):
    if self.state.global_step == 4:
        open(os.path.join(folder, "optimizer.pt"), "wb").write(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)

Trainer._save_optimizer_and_scheduler = save_and_die
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i} and {i + 1} are numbers"}) for i in range(20)))
    return path


@pytest.fixture
def arguments(tiny_model, data, tmp_path):
    def make(**changes) -> FinetuneArguments:
        options = {"base_model": str(tiny_model), "data_path": str(data), "output_dir": str(tmp_path / "out")}
        options |= {"max_steps": 6, "save_steps": 2, "batch_size": 2, "micro_batch_size": 2, "max_seq_length": 100}
        options |= {"val_set_size": 0, "use_gralora": True, "lora_r": 4, "lora_target_modules": ["q_proj"]}
        return FinetuneArguments(**options | {"lora_dropout": 0.1} | changes)

    return make


@pytest.fixture(scope="module")
def run(tiny_model, data, tmp_path_factory) -> Path:
    """The folder of a finished run with checkpoints 2, 4 and 6; not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "out"
    finetune(
        FinetuneArguments(
            **{"base_model": str(tiny_model), "data_path": str(data), "output_dir": str(folder), "max_steps": 6},
            **{"save_steps": 2, "batch_size": 2, "micro_batch_size": 2, "max_seq_length": 100, "val_set_size": 0},
            **{"use_gralora": True, "lora_r": 4, "lora_target_modules": ["q_proj"], "lora_dropout": 0.1},
        )
    )
    return folder


def equal(a: Path, b: Path) -> bool:
    first, second = load_peft_weights(str(a)), load_peft_weights(str(b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_file_that_is_needed_is_checked(run, tmp_path):
    """Cut off or missing, as a kill or a full disk leaves it."""
    assert fault(run / "checkpoint-4") is None
    names = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    for name in names:
        checkpoint = tmp_path / name / "checkpoint-4"
        shutil.copytree(run / "checkpoint-4", checkpoint)
        os.truncate(checkpoint / name, (checkpoint / name).stat().st_size - 20)
        assert name in fault(checkpoint), name
    for name in ("optimizer.pt", "trainer_state.json", "adapter_config.json"):
        checkpoint = tmp_path / f"no {name}"
        shutil.copytree(run / "checkpoint-4", checkpoint)
        (checkpoint / name).unlink()
        assert "is missing" in fault(checkpoint), name


def test_resuming_with_shares_of_the_steps_warns_of_nothing(arguments, caplog):
    """The Trainer compares eval_steps=0.25 with the number of steps that it had made of it."""
    shares = {"val_set_size": 2, "eval_steps": 0.25, "save_steps": 0.3}
    finetune(arguments(**shares))
    shutil.rmtree(Path(arguments().output_dir, "checkpoint-6"))
    transformers.logging.enable_propagation()
    try:
        finetune(arguments(**shares, resume_from_checkpoint="latest"))
        assert "do not match" not in caplog.text
        shutil.rmtree(Path(arguments().output_dir, "checkpoint-6"))
        finetune(arguments(**shares | {"eval_steps": 3}, resume_from_checkpoint="latest"))
        assert "eval_steps: 3 (from args) != 2" in caplog.text
    finally:
        transformers.logging.disable_propagation()


FIELDS = {"r": 8, "lora_alpha": 3, "lora_dropout": 0.5, "use_rslora": True, "target_modules": ["k_proj"]}
FIELDS |= {"use_gralora": False, "gralora_k": 4, "gralora_k_pattern": {"q_proj": 2}, "hybrid_r": 2}
FIELDS |= {"gralora_scaling": "matched"}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.filterwarnings("ignore:.*has no effect without use_gralora")
def test_every_setting_of_the_adapter_must_be_the_checkpoints(field, tmp_path):
    """Those that shape what the adapter computes; weights alone are read from a checkpoint."""
    settings = {"r": 4, "target_modules": ["q_proj"], "use_gralora": True, "gralora_k": 1}
    asked = LoraConfig(**settings)
    asked.save_pretrained(tmp_path)
    model = SimpleNamespace(peft_config={"default": asked})
    resume.check_checkpoint(str(tmp_path), model)
    setattr(asked, field, FIELDS[field])
    with pytest.raises(ValueError, match=f"has {field}=.*, this run .*; resume with the arguments of the run"):
        resume.check_checkpoint(str(tmp_path), model)


ZERO = "global_step4/zero_pp_rank_{}_mp_rank_00_{}_states.pt"
ENGINES = {  # how engines name the optimizer's state
    "one process or DDP": ["optimizer.pt"],
    "FSDP2": ["optimizer_0/.metadata"],
    "FSDP2 whole": ["optimizer.bin"],
    "DeepSpeed ZeRO-2 on 1 process": [ZERO.format(0, "optim"), "global_step4/mp_rank_00_model_states.pt"],
    "DeepSpeed ZeRO-2 on 2 processes": [ZERO.format(rank, "optim") for rank in (0, 1)],
    "DeepSpeed ZeRO-3 on 2 processes": [ZERO.format(rank, what) for rank in (0, 1) for what in ("optim", "model")],
}


@pytest.mark.parametrize("writer", ENGINES)
def test_an_engine_that_cannot_read_the_optimizers_state_refuses_it(writer, tmp_path):
    """The Trainer would pass over DeepSpeed's, and go on with a new one."""
    for name in ENGINES[writer]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    writer = writer.removesuffix(" whole")
    assert resume.saved_by(tmp_path) == writer
    for reader in sorted({name.removesuffix(" whole") for name in ENGINES}):
        config = SimpleNamespace(is_zero3=lambda name=reader: "ZeRO-3" in name)
        plugin = SimpleNamespace(deepspeed_plugin=SimpleNamespace(hf_ds_config=config))
        accelerator = SimpleNamespace(state=plugin, num_processes=1 if "on 1" in reader else 2)
        kinds = {"is_deepspeed_enabled": "DeepSpeed" in reader, "is_fsdp_enabled": "FSDP" in reader}
        trainer = SimpleNamespace(accelerator=accelerator, **kinds)
        if reader == writer:
            resume.check_engine(str(tmp_path), trainer)
        else:
            with pytest.raises(
                ValueError, match=f"was saved by {writer}, and this run is {reader}, which cannot read"
            ):
                resume.check_engine(str(tmp_path), trainer)


def test_the_last_complete_checkpoint_is_taken(run, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(run, out)
    assert find_checkpoint("latest", str(out)) == find_checkpoint("True", str(out)) == str(out / "checkpoint-6")
    (out / "checkpoint-6" / "trainer_state.json").unlink()
    (out / "checkpoint-10").mkdir()
    assert find_checkpoint("latest", str(out)) == str(out / "checkpoint-4"), "10 is after 6"
    captured = capsys.readouterr()
    assert f"passed over, since incomplete: {out / 'checkpoint-10'}: trainer_state.json is missing" in captured.err
    assert f"going on from {out / 'checkpoint-4'}" in captured.out
    with pytest.raises(ValueError, match="checkpoint-10' is no complete checkpoint: trainer_state.json is missing"):
        find_checkpoint(str(out / "checkpoint-10"), str(out))
    for step in (2, 4):
        shutil.rmtree(out / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="no complete checkpoint in output_dir=.*checkpoint-6: trainer_state"):
        find_checkpoint("latest", str(out))
    with pytest.raises(ValueError, match="there is none at all"):
        find_checkpoint("latest", str(tmp_path / "elsewhere"))
    assert find_checkpoint(None, str(out)) is find_checkpoint("false", str(out)) is None


def test_run_killed_while_saving_goes_on_from_the_checkpoint_before(arguments, run, tmp_path, capsys):
    args = arguments()
    flags = ["--base_model", args.base_model, "--data_path", args.data_path, "--output_dir", args.output_dir]
    flags += ["--max_steps", "6", "--save_steps", "2", "--batch_size", "2", "--micro_batch_size", "2", "--lora_r", "4"]
    flags += ["--max_seq_length", "100", "--val_set_size", "0", "--use_gralora", "--lora_target_modules", "q_proj"]
    flags += ["--lora_dropout", "0.1"]
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, "finetune", *flags], capture_output=True)
    assert killed.returncode == -9
    assert (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").read_bytes() == b"half a file"
    with pytest.raises(ValueError, match="holds checkpoints, the last of step 4 of an earlier run"):
        finetune(args)
    finetune(arguments(resume_from_checkpoint="latest"))
    assert f"going on from {tmp_path / 'out' / 'checkpoint-2'}" in capsys.readouterr().out
    assert equal(tmp_path / "out", run), "as if it had not been killed"
    assert fault(tmp_path / "out" / "checkpoint-4") is None


def test_a_complete_checkpoint_that_is_written_over_counts_as_incomplete(arguments, run, tmp_path, monkeypatch):
    """Else its old files would vouch for the new ones if the run were killed between them."""
    out = tmp_path / "out"
    shutil.copytree(run, out)
    save, seen = resume.Trainer._save_checkpoint, []

    def watched(trainer, *args):
        seen.append(fault(out / f"checkpoint-{trainer.state.global_step}"))
        save(trainer, *args)

    monkeypatch.setattr(resume.Trainer, "_save_checkpoint", watched)
    finetune(arguments(resume_from_checkpoint=str(out / "checkpoint-2")))
    assert seen == ["trainer_state.json is missing or cut off"] * 2 and fault(out / "checkpoint-6") is None


def test_an_earlier_run_is_neither_overwritten_nor_mixed_with(arguments, run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run, out)
    with pytest.raises(ValueError, match="holds an adapter of an earlier run; give another output_dir, --overwrite"):
        finetune(arguments())
    with pytest.raises(ValueError, match="holds an adapter of an earlier run"):
        finetune(arguments(resume_from_checkpoint=str(run / "checkpoint-2")))
    with pytest.raises(OSError, match="missing.jsonl"):
        finetune(arguments(overwrite=True, data_path="missing.jsonl"))
    assert equal(out, run) and len(resume.checkpoints(out)) == 3, "what is refused changes nothing"
    finetune(arguments(overwrite=True, max_steps=4, seed=7))
    assert [path.name for path in resume.checkpoints(out)] == ["checkpoint-4", "checkpoint-2"]
    assert not equal(out, run)


def test_finished_run_can_be_resumed_for_more_steps(arguments, run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run, out)
    metrics = finetune(arguments(resume_from_checkpoint="latest", max_steps=8))
    assert metrics["steps"] == 8 and not equal(out, run)
    assert finetune(arguments(resume_from_checkpoint="latest", max_steps=8))["steps"] == 8, "with nothing left to do"
