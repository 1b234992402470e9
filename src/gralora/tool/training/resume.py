"""Checkpoints of a run: found and checked before it goes on from one, saved when Ctrl-C ends it."""

import json
import math
import pickle
import shutil
import signal
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...checkpoints.files import CONFIG, WEIGHTS, write_json
from ...config import names, same
from .distributed import any_process

LATEST = ("latest", "true")
STATE = "trainer_state.json"  # what the Trainer writes last
CONTENTS = "gralora_checkpoint.json"  # written once a checkpoint is whole: its files, and a digest of the data
KEPT = (".pt", ".pth", ".bin", ".safetensors", ".distcp", ".json")  # files that resuming reads
PLAIN, FSDP = "one process or DDP", "FSDP2"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The Trainer's checkpoint folders in a folder, complete or not, the last step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted((path for path in folders if path.is_dir()), key=lambda path: -int(path.name.split("-")[1]))


def fault(checkpoint: Path) -> str | None:
    """What a checkpoint lacks to go on from it; None if nothing. A run killed while saving leaves such folders."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        step, steps = state["global_step"], state["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{STATE} is missing or cut off"
    named = checkpoint.name.removeprefix("checkpoint-")
    if not isinstance(step, int) or not 0 <= step <= steps or (named.isdigit() and int(named) != step):
        return f"{STATE} says global_step={step!r} of max_steps={steps!r}, which cannot be for {checkpoint.name!r}"
    if not (checkpoint / CONFIG).is_file():
        return f"{CONFIG} is missing"
    if saved_by(checkpoint) is None:
        return "the optimizer's state is missing"  # the Trainer would begin a new one and not say so
    if saved_by(checkpoint) == PLAIN and not (checkpoint / "scheduler.pt").is_file():
        return "scheduler.pt is missing"  # without it the Trainer begins a new optimizer, too
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
            return f"{file.name} is cut off"
        if file.suffix == ".safetensors":
            try:
                safe_open(file, "pt").__enter__()
            except (SafetensorError, OSError):
                return f"{file.name} is cut off"
    for name, size in contents(checkpoint).get("files", {}).items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (checkpoint / name).stat().st_size != size:
            return f"{name} is not as it was written"
    return None


def contents(checkpoint: Path) -> dict[str, Any]:
    """What `CONTENTS` says of a checkpoint; empty where another program wrote it."""
    try:
        found = json.loads((checkpoint / CONTENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}


def write_contents(checkpoint: Path, data: str) -> None:
    files = sorted(path for path in checkpoint.rglob("*") if path.suffix in KEPT and path.is_file())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files if path.name != CONTENTS}
    write_json(checkpoint / CONTENTS, {"data": data, "files": sizes})


def saved_by(checkpoint: Path) -> str | None:
    """The engine that wrote a checkpoint, which the files of the optimizer's state show; None if there are none."""
    if (checkpoint / "optimizer.pt").is_file():
        return PLAIN
    if (checkpoint / "optimizer.bin").is_file() or any(checkpoint.glob("optimizer_*")):
        return FSDP
    shares = [*checkpoint.glob("global_step*/*_optim_states.pt")]
    sharded = any(checkpoint.glob("global_step*/*zero_pp_rank_*_model_states.pt"))
    return deepspeed(sharded, len(shares)) if shares else None


def engine(trainer: Trainer) -> str:
    """The engine of a run, in the words of `saved_by`."""
    if trainer.is_deepspeed_enabled:
        sharded = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.is_zero3()
        return deepspeed(sharded, trainer.accelerator.num_processes)
    return FSDP if trainer.is_fsdp_enabled else PLAIN


def deepspeed(sharded: bool, processes: int) -> str:
    """Stages 1 and 2 write the same files, and DeepSpeed takes back only as many shares as there are processes."""
    return f"DeepSpeed ZeRO-{3 if sharded else 2} on {processes} process{'es' * (processes > 1)}"


def check_engine(checkpoint: str | None, trainer: Trainer) -> None:
    """Raise ValueError if a run cannot read the optimizer's state in `checkpoint`.

    Of a checkpoint of DeepSpeed's, without DeepSpeed, the Trainer would begin a new state and not say so.
    """
    if checkpoint is None or (saved := saved_by(Path(checkpoint))) == (asked := engine(trainer)):
        return
    raise ValueError(
        f"the checkpoint {checkpoint!r} was saved by {saved}, and this run is {asked}, which cannot read that "
        "optimizer's state; go on with the accelerate config of the run that wrote it."
    )


def find_checkpoint(asked: str | None, output_dir: str) -> str | None:
    """The complete checkpoint folder that `resume_from_checkpoint` means; incomplete ones are named and passed over.

    Raises:
        ValueError: if there is none. A run never starts over because of that.
    """
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() not in LATEST:
        if problem := fault(Path(asked)):
            raise ValueError(f"resume_from_checkpoint={asked!r} is no complete checkpoint: {problem}.")
        return asked
    problems = []
    for checkpoint in checkpoints(output_dir):
        problem = fault(checkpoint)
        if problem is None:
            print(f"going on from {checkpoint}")
            return str(checkpoint)
        problems.append(f"{checkpoint}: {problem}")
        print(f"passed over, since incomplete: {problems[-1]}", file=sys.stderr)
    raise ValueError(
        f"resume_from_checkpoint={asked!r}: no complete checkpoint in output_dir={output_dir!r}"
        f" ({'; '.join(problems) or 'there is none at all'}); leave the flag out to start from the beginning."
    )


def check_output(output_dir: str, checkpoint: str | None, overwrite: bool) -> None:
    """Raise ValueError if the run would mix with an earlier one in `output_dir`."""
    if overwrite or (checkpoint is not None and Path(checkpoint).resolve().parent == Path(output_dir).resolve()):
        return
    if Path(output_dir, WEIGHTS).exists():
        holds = "an adapter"
    elif found := checkpoints(output_dir):
        holds = f"checkpoints, the last of step {found[0].name.split('-')[1]}"
    else:
        return
    raise ValueError(
        f"output_dir={output_dir!r} holds {holds} of an earlier run; give another output_dir, --overwrite to start "
        "anew, or --resume_from_checkpoint latest to go on."
    )


def delete_checkpoints(output_dir: str) -> None:
    for checkpoint in checkpoints(output_dir):
        shutil.rmtree(checkpoint)


def check_checkpoint(checkpoint: str | None, model: PeftModel) -> None:
    """Raise ValueError if `resume_from_checkpoint` is not a checkpoint of such an adapter.

    The Trainer loads weights alone: another `lora_alpha` would change the adapter, and nothing would say so.
    """
    if checkpoint is None:
        return
    saved, asked = PeftConfig.from_pretrained(checkpoint), model.peft_config["default"]
    for name in sorted(names(lambda facts: facts.resume), key=lambda name: (name != "use_gralora", name)):
        if not same(name, getattr(saved, name), getattr(asked, name)):
            raise ValueError(
                f"the checkpoint {checkpoint!r} has {name}={getattr(saved, name)!r}, this run "
                f"{getattr(asked, name)!r}; resume with the arguments of the run that wrote it."
            )


def check_tensors(checkpoint: str | None, model: PeftModel) -> None:
    """Raise ValueError if a checkpoint's adapter lacks tensors of the model's, which would keep their first values."""
    if checkpoint is None:
        return
    with safe_open(Path(checkpoint, WEIGHTS), "pt") as file:
        saved = set(file.keys())
    expected = set(get_peft_model_state_dict(model))
    if saved != expected:
        lacking, left = sorted(expected - saved), sorted(saved - expected)
        what = f"lacks {lacking[0]!r}" if lacking else f"has a tensor of another adapter, {left[0]!r}"
        raise ValueError(
            f"the checkpoint {checkpoint!r} is not whole: {WEIGHTS} {what}; go on from another one, or start anew."
        )


def check_data(checkpoint: str | None, data: str) -> None:
    """Raise ValueError if a checkpoint was trained on data with another digest.

    Losses that were measured on other data would be reported as this run's.
    """
    if checkpoint is None:
        return
    if contents(Path(checkpoint)).get("data", data) != data:
        raise ValueError(
            f"the checkpoint {checkpoint!r} was trained on other data, or on the same cut or held out otherwise, and "
            "resuming goes on in the middle of that data. Give the data of that run; or train its adapter on this "
            f"data as a new run, with --base_model {checkpoint} and another output_dir."
        )


def take_steps(checkpoint: str | None, training: TrainingArguments) -> None:
    """Replace shares of all steps in the arguments by the steps that the checkpoint's run has made of them.

    The Trainer goes on with those; but it compares them with the arguments, and would warn that 10 is not 0.25.
    """
    if checkpoint is None:
        return
    state = TrainerState.load_from_json(str(Path(checkpoint, STATE)))
    for name in ("logging_steps", "eval_steps", "save_steps"):
        share = getattr(training, name)
        if share is not None and share < 1 and math.ceil(share * state.max_steps) == getattr(state, name):
            setattr(training, name, getattr(state, name))


class NothingLeft(Exception):
    """The checkpoint to go on from is that of the last step, so only the end of the run is left."""


class SaveOnInterrupt(TrainerCallback):
    """Inside `with`, the first Ctrl-C makes the Trainer save a checkpoint at the end of the step and stop."""

    data = ""  # digest of what is trained on, for `CONTENTS`

    def __enter__(self) -> "SaveOnInterrupt":
        self.requested = False
        self.handles = threading.current_thread() is threading.main_thread()  # Python allows no other to
        if self.handles:
            self.previous = signal.signal(signal.SIGINT, self.request)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.handles:
            signal.signal(signal.SIGINT, self.previous)

    def request(self, *_: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt("stopped at once, without a checkpoint of the last step")
        self.requested = True
        print("\nCtrl-C: saving a checkpoint after this step; once more to stop at once", file=sys.stderr)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise NothingLeft  # the Trainer would train one step more

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # of several processes, each hears of it in a step of its own
        self.requested = any_process(self.requested, args.device)
        if self.requested:
            control.should_save = control.should_training_stop = True
        if control.should_save and state.is_world_process_zero:
            # a complete checkpoint that is written over is incomplete until the Trainer writes the first of these
            for name in (STATE, CONTENTS):
                Path(args.output_dir, f"checkpoint-{state.global_step}", name).unlink(missing_ok=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if distributed.is_initialized():
            distributed.barrier()  # each process writes files of its own
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and checkpoint.is_dir():
            write_contents(checkpoint, self.data)


def train_or_interrupt(trainer: Trainer, checkpoint: str | None, data: str = "") -> bool:
    """Train, from a checkpoint if one is given; whether there were steps left to train.

    Args:
        trainer: of the run.
        checkpoint: the folder of one that is whole.
        data: digest of what is trained on, kept in checkpoints.

    Raises:
        KeyboardInterrupt: if Ctrl-C ended it early.
        ValueError: if the checkpoint holds objects that are no tensors, whose loading could run a stranger's code.
    """
    check_engine(checkpoint, trainer)
    take_steps(checkpoint, trainer.args)
    trained = True
    with SaveOnInterrupt() as interrupt:
        interrupt.data = data
        trainer.add_callback(interrupt)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except NothingLeft:
            trained = False
            print(
                f"nothing left to train: {checkpoint} is of the last step, {trainer.state.global_step}; measuring it"
            )
            if trainer.args.load_best_model_at_end and (best := trainer.state.best_model_checkpoint):
                set_peft_model_state_dict(trainer.model, load_peft_weights(best))
        except pickle.UnpicklingError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"the checkpoint {checkpoint!r} holds objects that are no tensors, and is not read: {reason}"
            ) from error
    state = trainer.state
    if interrupt.requested and state.global_step < state.max_steps:
        saved = Path(trainer.args.output_dir, f"checkpoint-{state.global_step}")
        raise KeyboardInterrupt(
            f"stopped at step {state.global_step} of {state.max_steps}, checkpoint saved in {saved}; to go on, repeat "
            f"the command with --resume_from_checkpoint {saved}"
        )
    return trained


def measured_now(trainer: Trainer) -> dict[str, float] | None:
    """Held-out losses without and with the adapter as it is; None if nothing is held out."""
    if trainer.eval_dataset is None:
        return None
    log = list(trainer.state.log_history)
    after = trainer.evaluate()["eval_loss"]
    with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
        before = trainer.evaluate()["eval_loss"]
    trainer.state.log_history = log
    return {"before": before, "after": after}
