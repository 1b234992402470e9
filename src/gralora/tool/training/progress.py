"""What one sees of a run while it trains: losses, tokens per second, time left, peak memory."""

import sys
import time
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .. import output

SHOWN = {"loss": "loss {:.4f}", "grad_norm": "grad {:.2g}", "learning_rate": "rate {:.2g}"}
SHOWN |= {"eval_loss": "held-out loss {:.4f}"}


def peak_memory_gib() -> float:
    """Most memory used so far in GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def reset_peak_memory() -> None:
    """Let `peak_memory_gib` count from now on, on a GPU; of a process, the most is known for all of its time only."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


class Bar(ProgressCallback):
    """The Trainer's progress bars, with a word before each, and without what it prints."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        label(self.training_bar, "training")

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        is_new = self.prediction_bar is None
        super().on_prediction_step(*args, **kwargs)
        if is_new:
            label(self.prediction_bar, "held out")

    def on_log(self, *_: Any, **__: Any) -> None:
        pass


def label_bars(trainer: Trainer) -> None:
    """Give a trainer our bars in the place of what it shows; none with `disable_tqdm`."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Bar)


def label(bar: Any, text: str) -> None:
    if bar is not None:  # as in all processes but one
        bar.set_description(text)


class Progress(TrainerCallback):
    """A line for each thing that the Trainer logs.

    Attributes:
        tokens: that went into optimizer steps, over all devices, without padding.
        seconds: that these steps took, without evaluations and checkpoints.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self.last = (0, 0.0)  # of both, at the last line

    @classmethod
    def replace(cls, trainer: Trainer) -> "Progress":
        """Put it in the place of what the Trainer prints; see `label_bars` for the bar."""
        label_bars(trainer)
        progress = cls()
        trainer.add_callback(progress)
        return progress

    @property
    def tokens_per_s(self) -> float | None:
        return round(self.tokens / self.seconds, 1) if self.seconds else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first_step, self.first_tokens = state.global_step, state.num_input_tokens_seen
        self.started = time.monotonic()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step_started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.monotonic() - self.step_started
        self.tokens = state.num_input_tokens_seen - self.first_tokens

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        parts = [shown.format(logs[name]) for name, shown in SHOWN.items() if name in logs]
        if logs.get("learning_rate") == 0 and state.global_step <= args.get_warmup_steps(state.max_steps):
            parts[-1] += " (warmup)"  # whose first step of transformers' schedules has no rate yet
        if "loss" in logs:
            parts += self.speed(state)
        if parts and state.is_world_process_zero:
            tqdm.write(output.fitted([f"step {state.global_step}/{state.max_steps}", *parts]))

    def speed(self, state: TrainerState) -> list[str]:
        """Tokens per second since the last line, time left at the pace so far, and peak memory."""
        tokens, seconds = self.tokens - self.last[0], self.seconds - self.last[1]
        self.last = (self.tokens, self.seconds)
        pace = (time.monotonic() - self.started) / (state.global_step - self.first_step)  # seconds per step
        left = timedelta(seconds=round(pace * (state.max_steps - state.global_step)))
        return [f"{tokens / seconds:.0f} tok/s", f"{left} left", f"{peak_memory_gib():.1f} GiB"]
