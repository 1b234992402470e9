"""Checkpoints of a run: saved when Ctrl-C ends it, and checked before it goes on from one."""

import signal
import sys
import threading
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def check_checkpoint(checkpoint: str | None, model: PeftModel) -> None:
    """Raise ValueError if `resume_from_checkpoint` is not a checkpoint of such an adapter.

    The Trainer loads weights alone: another `lora_alpha` would change the adapter, and nothing would say so.
    """
    if checkpoint is None:
        return
    if not Path(checkpoint, "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint={checkpoint!r} is not a folder with a checkpoint.")
    saved, asked = PeftConfig.from_pretrained(checkpoint), model.peft_config["default"]
    for name in (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "use_gralora",
        "gralora_k",
        "hybrid_r",
    ):
        if getattr(saved, name) != getattr(asked, name):
            raise ValueError(
                f"the checkpoint {checkpoint!r} has {name}={getattr(saved, name)!r}, this run "
                f"{getattr(asked, name)!r}; resume with the arguments of the run that wrote it."
            )


class SaveOnInterrupt(TrainerCallback):
    """Inside `with`, the first Ctrl-C makes the Trainer save a checkpoint at the end of the step and stop."""

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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.requested:
            control.should_save = control.should_training_stop = True


def train_or_interrupt(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint if one is given; raise KeyboardInterrupt if Ctrl-C ended it early."""
    with SaveOnInterrupt() as interrupt:
        trainer.add_callback(interrupt)
        trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.state
    if state.global_step < state.max_steps:
        saved = Path(trainer.args.output_dir, f"checkpoint-{state.global_step}")
        raise KeyboardInterrupt(
            f"stopped at step {state.global_step} of {state.max_steps}, checkpoint saved in {saved}; to go on, repeat "
            f"the command with --resume_from_checkpoint {saved}"
        )
