"""Where answers end, and when training has failed: learnt end tokens, and the losses of a run that diverged."""

import math
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data.corpus import Corpus
from .distributed import any_process
from .trainer import AdapterTrainer


def learnt_ends(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens with which the answers to train on end; how many answers have none is printed."""
    without = corpus.ends.get(None, 0)
    if without:
        print(
            f"no end: {without} of {corpus.ends.total()} texts that are not cut end in no token that ends a turn, so "
            "the model does not learn from them to stop; the chat template should write one after each answer, such "
            f"as {tokenizer.eos_token!r}"
        )
    return sorted(token for token in corpus.ends if token is not None)


def stop_at(model: PreTrainedModel, ends: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Add tokens to those at which the model stops generating; what is new is printed."""
    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    new = [token for token in ends if token not in stops]
    if new:
        print(
            f"stops: answers end with {', '.join(repr(tokenizer.decode([token])) for token in new)}, where the base "
            f"model's generation config does not stop ({tokenizer.decode(stops)!r}); generation_config.json beside "
            "the adapter does"
        )
        model.generation_config.eos_token_id = stops + new


def check_loss(losses: list[dict[str, float]], vocabulary: int, args: TrainingArguments) -> None:
    """Refuse a run that ended without a model: its loss rose to where all tokens are equally likely, or above.

    A learning rate that is far too high often ends there, with losses that are finite and do not change.

    Args:
        losses: rows of `loss`, of training, and `held_out_loss`, in the order of steps; without two of training, those
            held out count.
        vocabulary: tokens that the model knows.
        args: of the run.

    Raises:
        ValueError: if it did.
    """
    rows = [[row[name] for row in losses if name in row] for name in ("loss", "held_out_loss")]
    name, found = next(((n, r) for n, r in zip(("loss", "held-out loss"), rows, strict=True) if len(r) > 1), ("", []))
    chance = math.log(vocabulary)
    # a model that knows nothing yet starts there too, and batches differ
    if found and found[-1] > max(0.999 * chance, 1.05 * found[0]):
        raise ValueError(
            f"training diverged: the {name} was {found[0]:.4g} at first and is {found[-1]:.4g} at the end, where "
            f"tokens drawn by lot would have {chance:.4g}. {what_is_left(args)}"
        )


def learnt_nothing(loss: dict[str, float] | None, args: TrainingArguments, steps: int) -> str | None:
    """What to say of an adapter whose held-out loss after so many steps is not below the first; None where it is."""
    if loss is None or loss["after"] < loss["before"]:
        return None
    rate = f"learning_rate (now {args.learning_rate:g})"
    if steps == 1 and args.get_warmup_steps(steps):
        return "the adapter learnt nothing: the only step is the first of a warmup, whose rate is 0. Take more steps."
    if math.isclose(loss["after"], loss["before"], rel_tol=1e-6):
        return f"the adapter learnt nothing: the held-out loss is what it was before training. Try a higher {rate}."
    return (
        f"the adapter is worse than what training began with: the held-out loss rose from {loss['before']:.4f} to "
        f"{loss['after']:.4f}. Try a lower {rate}, fewer steps, or early_stopping_patience, which keeps the best."
    )


def what_is_left(args: TrainingArguments) -> str:
    """What a run that diverged leaves behind, and what to try instead."""
    return (
        f"No adapter was written; what {args.output_dir!r} held before is still there, and so are the checkpoints of "
        f"this run. Try a lower learning_rate (now {args.learning_rate:g}), more warmup_steps, or bf16, not fp16."
    )


class StopAtNonFinite(TrainerCallback):
    """Ends a run whose loss or adapter is no longer finite, before anything of it is logged or saved.

    On a CPU after each step; on others, where looking waits for the device, before each log and checkpoint.
    """

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.device.type == "cpu" or control.should_log or control.should_save or control.should_evaluate:
            self.check(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.check(args, state)

    def check(self, args: TrainingArguments, state: TrainerState) -> None:
        """Raise ValueError if a loss since the last check, or a factor, is not finite in any process."""
        losses, self.trainer.recent_losses = self.trainer.recent_losses, []
        bad = next((i for i, loss in enumerate(losses) if not torch.isfinite(loss)), None)
        factors = [p.detach() for p in self.trainer.model.parameters() if p.requires_grad and p.numel()]
        factors = [p.to_local() if hasattr(p, "to_local") else p for p in factors]
        broken = bool(factors) and not torch.stack([torch.isfinite(p).all() for p in factors]).all()
        if not any_process(bad is not None or broken, args.device):
            return
        what = "the loss" if bad is not None else "the adapter" if broken else "another process's loss or adapter"
        value = f" is {losses[bad].item()}" if bad is not None else " is no longer finite"
        raise ValueError(
            f"training diverged: {what}{value} at step {state.global_step} of {state.max_steps}. " + what_is_left(args)
        )
