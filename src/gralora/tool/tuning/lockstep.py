"""Train several candidates' adapters side by side on one base model, on the same batches."""

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from ..arguments import FinetuneArguments
from ..data.tokens import Row
from ..evaluation.loss import answer_losses
from ..training.dry_run import longest_batch
from ..training.trainer import AdapterTrainer
from .search import Search

MEANS = "means.safetensors"


class LockstepTrainer(AdapterTrainer):
    """A Trainer whose model has one adapter for each candidate; a step trains each of them on the same batch.

    A candidate is trained exactly as alone: its learning rate, its gradients and their clipping are its own, and
    AdamW's states are per parameter.

    Attributes:
        live: names of the candidates that are not stopped.
        together: candidates in one pass through the base model, each with rows of its own (PEFT's mixed batches).
        step_seconds: what `fastest_together` measured.
        means: parameter -> its mean over the steps since `forget`, float32.
        counted: how many steps these are.
    """

    def __init__(self, rates: dict[str, float], together: int, clip: float, **options: Any) -> None:
        """Take over the trainer's arguments.

        Args:
            rates: candidate -> learning rate.
            together: see the class.
            clip: norm to which each candidate's gradient is cut; 0: it is not.
            options: of the SFTTrainer.
        """
        self.rates, self.live, self.together, self.clip = rates, list(rates), together, clip
        self.step_seconds: dict[int, float] = {}
        self.means: dict[str, Tensor] = {}
        self.counted = 0
        super().__init__(**options)
        self.add_callback(Clip(self))

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        """As the Trainer's, with groups of parameters for each candidate, which have its learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        self.model.base_model.set_adapter(self.live)  # the Trainer passes over what takes no gradients
        optimizer = super().create_optimizer(*args, **options)
        owners = {p: owner(name, self.rates) for name, p in self.model.named_parameters() if p.requires_grad}
        optimizer.param_groups = [
            group | {"params": [p for p in group["params"] if owners[p] == name], "lr": rate, "candidate": name}
            for group in optimizer.param_groups
            for name, rate in self.rates.items()
        ]
        self.activate()
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Train each live candidate on a batch; returns the mean of their losses."""
        losses = []
        for first in range(0, len(self.live), self.together):
            names = self.live[first : first + self.together]
            batch = dict(inputs)
            if self.together > 1:
                batch = {key: repeated(value, len(names)) for key, value in inputs.items()}
                batch["adapter_names"] = [name for name in names for _ in range(len(inputs["input_ids"]))]
            elif self.model.active_adapters != names:
                self.model.set_adapter(names[0])
            losses.append(super().training_step(model, batch, num_items_in_batch))
        self.recent_losses.clear()
        return torch.stack(losses).sum() / len(self.live)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As the SFTTrainer's; of a batch of several candidates, the sum of their losses."""
        names = inputs.get("adapter_names")
        if names is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.model.eval()  # PEFT takes rows of several adapters in no other mode; see `can_mix`
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss if num_items_in_batch is not None else loss * len(set(names))

    def groups(self, name: str) -> list[dict[str, Any]]:
        return [group for group in self.optimizer.param_groups if group["candidate"] == name]

    def stop(self, names: list[str]) -> None:
        """Delete candidates, their gradients and the optimizer's states."""
        for name in names:
            self.live.remove(name)
            for group in self.groups(name):
                for p in group["params"]:
                    self.optimizer.state.pop(p, None)
                    p.grad = None
                group["params"] = []
        self.activate()
        for name in names:
            self.model.delete_adapter(name)
        gc.collect()

    def leave_out(self, names: list[str]) -> None:
        """Delete candidates that were stopped before training goes on from a checkpoint."""
        for name in names:
            self.live.remove(name)
            self.model.delete_adapter(name)

    def activate(self) -> None:
        """Let all live candidates take gradients, as a batch of several needs it."""
        if self.live:
            self.model.set_adapter(self.live[0])  # what the PeftModel calls active must be there, too
        if self.together > 1 and self.live:
            self.model.base_model.set_adapter(self.live)

    @torch.no_grad()
    def held_out(self, name: str | None, rows: list[Row], batch_size: int) -> list[float]:
        """Return the mean loss over each held-out answer's tokens, in nats; of the base model where `name` is None."""
        model = self.model.eval()
        if name is not None:
            model.set_adapter(name)
        with self.accelerator.autocast(), model.disable_adapter() if name is None else contextlib.nullcontext():
            losses = answer_losses(model, rows, batch_size, self.processing_class.pad_token_id)
        self.activate()
        return [total / count for total, count in losses]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the live candidates' parameters, which the Trainer loads when it goes on from there, and `means`."""
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(self.means, Path(output_dir, MEANS), {"counted": str(self.counted)})
        tensors = {name: p.detach().contiguous() for name, p in self.factors()}
        save_file(tensors, Path(output_dir, SAFE_WEIGHTS_NAME))

    def load_means(self, checkpoint: Path) -> None:
        with safe_open(checkpoint / MEANS, "pt", device=str(self.args.device)) as file:
            self.counted = int(file.metadata()["counted"])
            self.means = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict

    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of all live candidates."""
        return ((name, p) for name, p in self.model.named_parameters() if owner(name, self.rates))

    @torch.no_grad()
    def count_in(self) -> None:
        """Take the parameters as they are now into `means`."""
        self.counted += 1
        for name, p in self.factors():
            if self.counted == 1:
                self.means[name] = p.detach().clone(memory_format=torch.contiguous_format).float()
            else:
                self.means[name].lerp_(p.float(), 1 / self.counted)

    def forget(self) -> None:
        self.means, self.counted = {}, 0

    @contextlib.contextmanager
    def averaged(self, name: str) -> Iterator[None]:
        """Give a candidate the means of its parameters; as they were afterwards. Without means, leave it."""
        with torch.no_grad():
            own = [(p, self.means[key]) for key, p in self.factors() if owner(key, [name]) and key in self.means]
            before = [p.clone() for p, _ in own]
            for p, mean in own:
                p.copy_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), value in zip(own, before, strict=True):
                    p.copy_(value)


class Clip(TrainerCallback):
    """Cuts each candidate's gradient by its own norm; the Trainer would take the norm of all of them."""

    def __init__(self, trainer: LockstepTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self.trainer.clip:
            for name in self.trainer.live:
                parameters = [p for group in self.trainer.groups(name) for p in group["params"]]
                nn.utils.clip_grad_norm_(parameters, self.trainer.clip)


class Rungs(TrainerCallback):
    """Measures the candidates at certain steps, and stops the worse ones; the last of the steps is the end.

    Before the end, what is measured of a candidate is the mean of its parameters over the later half of the steps so
    far, or since the last rung. At a high learning rate they swing about what they settle at once the schedule has
    lowered it. The mean lies near that (arXiv 2301.02312), and a search that judges early without it takes too low a
    rate (arXiv 1803.02021).
    """

    def __init__(
        self, trainer: LockstepTrainer, search: Search, rows: list[Row], shares: list[float], batch_size: int
    ) -> None:
        self.trainer, self.search, self.rows, self.batch_size = trainer, search, rows, batch_size
        self.shares = shares
        self.seconds = 0.0  # of measuring

    def steps(self, state: TrainerState) -> list[int]:
        """Return the rungs, none before a step at the full rate: the first step of a warmup has rate 0."""
        last = state.max_steps
        first = min(self.trainer.args.get_warmup_steps(last) + 1, last)
        return sorted({max(first, round(share * last)) for share in self.shares} | {last})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        rungs = self.steps(state)
        step = state.global_step
        coming = next(rung for rung in rungs if rung >= step)
        if coming / 2 < step and coming < rungs[-1]:
            self.trainer.count_in()
        if step != coming:
            return
        started = time.monotonic()
        for name in self.trainer.live:
            with self.trainer.averaged(name):
                losses = self.trainer.held_out(name, self.rows, self.batch_size)
            self.search.report(name, step, losses)
            tqdm.write(f"step {step}/{state.max_steps}  {name}  held-out loss {math.fsum(losses) / len(losses):.4f}")
        self.trainer.forget()
        before = self.search.stopped([rung for rung in rungs if rung < step])
        self.search.wait([name for name in self.search.trials() if name not in before], step)
        if step < state.max_steps:
            stopped = self.search.stopped([rung for rung in rungs if rung <= step])
            self.trainer.stop([name for name in self.trainer.live if name in stopped])
            control.should_save = True
        control.should_training_stop |= not self.trainer.live
        self.seconds += time.monotonic() - started


def owner(parameter: str, names: Any) -> str | None:
    """Return the candidate whose adapter a parameter belongs to, by its name; None for the base model."""
    return next((part for part in parameter.split(".") if part in names), None)


def repeated(value: Any, times: int) -> Any:
    """Return a batch's tensor so many times below itself."""
    return value.repeat(times, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and times > 1 else value


def can_mix(args: FinetuneArguments, model: PeftModel) -> bool:
    """Whether several candidates can be in one batch: PEFT has that in evaluation mode only, so without dropout."""
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    drops |= bool(getattr(model.config, "attention_dropout", 0))
    return not (drops or args.gradient_checkpointing or args.neftune_noise_alpha or args.is_flat)


def fastest_together(args: FinetuneArguments, trainer: LockstepTrainer) -> dict[int, float]:
    """Let as many candidates go through the base model in one pass as is fastest: one, or all, or as many as fit.

    Returns:
        Candidates in one pass -> seconds of a step of all candidates on the longest batch.
    """
    count = len(trainer.live)
    batch = longest_batch(trainer, args.micro_batch_size)
    seconds = {1: step_seconds(trainer, batch, 1)}
    while count > 1 and len(seconds) == 1 and can_mix(args, trainer.model):
        try:
            seconds[count] = step_seconds(trainer, batch, count)
        except torch.OutOfMemoryError:
            trainer.model.zero_grad()
            count = math.ceil(count / 2)
            gc.collect()
            torch.cuda.empty_cache()
    trainer.together = min(seconds, key=seconds.__getitem__)
    trainer.activate()
    return seconds


def step_seconds(trainer: LockstepTrainer, batch: dict[str, Any], together: int) -> float:
    """Return the seconds of a step of all candidates on a batch, the second of two."""
    trainer.together = together
    trainer.activate()
    trainer.current_gradient_accumulation_steps = 1
    for _ in range(2):
        started = time.monotonic()
        with trainer.accelerator.autocast():
            trainer.training_step(trainer.model, dict(batch))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    trainer.model.zero_grad()
    return seconds
