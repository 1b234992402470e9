"""What one sees of a run while it trains: losses, tokens per second, time left, peak memory."""

import sys
import time
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

SHOWN = {"loss": "loss {:.4f}", "grad_norm": "gradient {:.3g}", "learning_rate": "rate {:.3g}"}
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
    """The Trainer's progress bar, without what it prints."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass


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
        """Put it in the place of what the Trainer prints; its bar stays, unless `disable_tqdm`."""
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        if not trainer.args.disable_tqdm:
            trainer.add_callback(Bar)
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
        if "loss" in logs:
            parts += self.speed(state)
        if parts and state.is_world_process_zero:
            tqdm.write("  ".join([f"step {state.global_step}/{state.max_steps}", *parts]))

    def speed(self, state: TrainerState) -> list[str]:
        """Tokens per second since the last line, time left at the run's pace so far, and memory."""
        tokens, seconds = self.tokens - self.last[0], self.seconds - self.last[1]
        self.last = (self.tokens, self.seconds)
        pace = (time.monotonic() - self.started) / (state.global_step - self.first_step)  # seconds per step
        left = timedelta(seconds=round(pace * (state.max_steps - state.global_step)))
        return [f"{tokens / seconds:.0f} tok/s", f"{left} left", f"{peak_memory_gib():.1f} GiB peak"]
