"""One process of a search: its candidates on its device, from loading the base model to the report."""

import argparse
import dataclasses
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import set_seed

from ...acceleration import accelerate, is_default
from ...checkpoints.files import locked, write_json
from ...ops import plans
from ..arguments import FinetuneArguments
from ..finetune import Loaded, load
from ..training.progress import label_bars, peak_memory_gib
from ..training.report import finite
from .lockstep import LockstepTrainer, Rungs, can_mix, fastest_together
from .report import BEST, PLOT, TABLE, lines, summary, write
from .search import JOURNAL, Candidate, Search, candidates, wait_for_study

RESULTS = "tune.json"
ADAPTER = "adapter"  # the best candidate's
WHOLE = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")  # the last is written last
# of the Trainer: what `Rungs` and `Clip` do instead, and what would be written for one adapter
INSTEAD = {"eval_strategy": "no", "eval_on_start": False, "logging_strategy": "no", "logging_first_step": False}
INSTEAD |= {"push_to_hub": False}
WHOLE_MODEL = ("lomo", "adalomo", "galore", "apollo", "muon")  # optimizers that are not per parameter


def tune(
    args: FinetuneArguments, given: dict[str, str], options: argparse.Namespace, share: int, count: int
) -> dict[str, Any]:
    """Search, and return what `tune.json` holds, which the first of several processes writes.

    Args:
        args: of the training, but for what is searched.
        given: field -> the flag's text.
        options: the flags of `gralora tune`.
        share: number of this process.
        count: number of processes.

    Raises:
        ValueError: if the arguments do not fit a search, or the search in `study_dir` is another one.
        BlockingIOError: if another command searches in `study_dir`.
    """
    made = candidates(args, given)
    check(args)
    if len(made) < count:
        raise ValueError(f"devices: {count} are more than the {len(made)} candidates; give fewer.")
    folder = options.study_dir
    if share:
        return search_in(folder, args, made, options, share, count)
    place = folder.resolve()
    with locked(place.with_name(f".{place.name}.lock"), place):
        check_folder(folder, options.resume)
        return search_in(folder, args, made, options, share, count)


def search_in(
    folder: Path, args: FinetuneArguments, made: list[Candidate], options: argparse.Namespace, share: int, count: int
) -> dict[str, Any]:
    """As `tune`, in a folder that the first process has checked and locked."""
    started = time.monotonic()
    own = folder / f"device-{share}" if count > 1 else folder
    run_args = for_trainer(args, own)
    loaded = load(run_args, run_args.training_arguments())
    if loaded.trained is not None:
        raise ValueError(f"base_model={args.base_model!r} is an adapter, and a search trains new ones; give its base.")
    own.mkdir(parents=True, exist_ok=True)
    if share:
        wait_for_study(folder)
    search = Search(folder, options.reduction, options.full_sweep)
    about = dataclasses.asdict(args) | args.trainer | {"data": loaded.corpus.digest()}
    about |= {"rungs": options.rungs, "reduction": options.reduction, "full_sweep": options.full_sweep}
    del about["learning_rate"]
    search.begin(made, about, wait=share > 0)
    trainer, rungs = prepare(args, loaded, search, made[share::count], options)
    before = trainer.held_out(None, loaded.corpus.held_out, args.micro_batch_size)
    since, trained = train(trainer, search, rungs, own)
    steps = rungs.steps(trainer.state)
    stopped = search.stopped(steps)
    search.wait([one.name for one in made if one.name not in stopped], steps[-1])
    found = summary(search, made, steps, before)
    save_best(trainer, found["best"]["name"], loaded, folder)
    if share:
        return {}
    search.finish(steps)
    found |= {
        "together": trainer.together,
        "step_seconds": trainer.step_seconds,
        "since_step": since,  # after --resume, where this call began; the seconds are this call's
        "time_s": round(time.monotonic() - started, 1),
        "train_s": round(trained - rungs.seconds, 2),
        "measure_s": round(rungs.seconds, 2),
        "peak_memory_gib": round(peak_memory_gib(), 3),
    }
    winner = next(one for one in made if one.name == found["best"]["name"])
    write(found, winner.arguments(args), folder)
    write_json(folder / RESULTS, finite(found))
    print("\n".join(lines(found)))
    call = f" from step {since} on" if since else ""
    print(f"time{call}: {found['time_s']} s; curve: {folder / PLOT}, table: {folder / TABLE}")
    print(
        f"the best adapter, trained to the end: {folder / ADAPTER}; to train it anew: gralora finetune {folder / BEST}"
    )
    return finite(found)


def check(args: FinetuneArguments) -> None:
    """Raise ValueError for arguments that a search cannot have."""
    if not args.holds_out:
        raise ValueError("val_set_size=0: candidates are compared by their held-out loss; leave it out.")
    if args.fp16:
        raise ValueError("fp16=True: a loss scale would be common to all candidates; give --bf16 instead.")
    if args.resume_from_checkpoint is not None:
        raise ValueError("resume_from_checkpoint is for `gralora finetune`; a search goes on with --resume.")
    if args.early_stopping_patience is not None:
        raise ValueError("early_stopping_patience: the search stops candidates itself; leave it out.")
    if args.optim.startswith(WHOLE_MODEL):
        raise ValueError(f"optim={args.optim!r} does not treat parameters one by one; give adamw_torch_fused, say.")


def check_folder(folder: Path, resume: bool) -> None:
    """Raise ValueError if a search would mix with an earlier one."""
    there = (folder / JOURNAL).exists()
    if resume and not there:
        raise ValueError(f"--resume: there is no search in {str(folder)!r}; leave it out to begin one.")
    if there and not resume:
        raise ValueError(f"{str(folder)!r} holds a search; go on with --resume, or give another --study_dir.")


def for_trainer(args: FinetuneArguments, folder: Path) -> FinetuneArguments:
    """Return the arguments of the Trainer that trains all candidates of a process."""
    changes: dict[str, Any] = {
        "output_dir": str(folder),
        "max_grad_norm": 0.0,
        "save_total_limit": 1,
        "report_to": None,
    }
    return dataclasses.replace(args, trainer=args.trainer | INSTEAD, **changes)


def prepare(
    args: FinetuneArguments, loaded: Loaded, search: Search, mine: list[Candidate], options: argparse.Namespace
) -> tuple[LockstepTrainer, Rungs]:
    """Put the candidates on the base model, each as if it were alone, and make their trainer."""
    model: Any = loaded.model
    for one in mine:
        set_seed(args.seed)
        config = one.arguments(args).lora_config()
        config.target_modules = loaded.lora_config.target_modules
        config.exclude_modules = loaded.lora_config.exclude_modules
        if isinstance(model, PeftModel):
            model.add_adapter(one.name, config)
        else:
            model = get_peft_model(model, config, one.name)
    plans.choose(args.kernels)
    accelerate(model, enable=is_default())
    model.base_model.set_adapter([one.name for one in mine])  # so that the optimizer takes them all
    set_seed(args.seed)
    training = loaded.args.training_arguments()
    training.max_length = loaded.args.length if args.packing else None
    trainer = LockstepTrainer(
        rates={one.name: one.settings["learning_rate"] for one in mine},
        together=1,
        clip=args.max_grad_norm,
        model=model,
        args=training,
        train_dataset=loaded.corpus.train,
        processing_class=loaded.tokenizer,
    )
    rungs = Rungs(trainer, search, loaded.corpus.held_out, options.shares, args.micro_batch_size)
    label_bars(trainer)
    trainer.add_callback(rungs)
    if options.together != "auto":
        trainer.together = min(int(options.together), len(mine))
        if trainer.together > 1 and not can_mix(loaded.args, model):
            raise ValueError(
                f"together={options.together}: several candidates in one pass need a training without dropout, "
                "gradient checkpointing, NEFTune noise and packing; give --together 1."
            )
    elif trainer.args.device.type != "cpu":
        trainer.step_seconds = fastest_together(loaded.args, trainer)
    print(f"candidates: {len(mine)}, {trainer.together} in one pass through the base model")
    for one in mine:
        print(f"  {one.name}: {', '.join(f'{name} {value}' for name, value in one.settings.items())}")
    return trainer, rungs


def train(trainer: LockstepTrainer, search: Search, rungs: Rungs, folder: Path) -> tuple[int, float]:
    """Train, from the last checkpoint if there is one; returns its step, or 0, and the seconds.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the message says how to go on.
    """
    started = time.monotonic()
    checkpoint, since = last_checkpoint(folder), 0
    if checkpoint is not None:
        state = json.loads((checkpoint / WHOLE[-1]).read_text(encoding="utf-8"))
        trainer.state.max_steps, since = state["max_steps"], state["global_step"]
        steps = rungs.steps(trainer.state)
        stopped = search.stopped([step for step in steps if step <= since])
        trainer.leave_out([name for name in trainer.live if name in stopped])
        trainer.load_means(checkpoint)
        print(f"going on from {checkpoint}")
        if since >= state["max_steps"] or not trainer.live:
            return since, time.monotonic() - started
    log, no_base = logging.getLogger("transformers.trainer"), NoBase()
    log.addFilter(no_base)
    try:
        trainer.activate()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("stopped; to go on from the last checkpoint, give --resume, too") from stop
    finally:
        log.removeFilter(no_base)
    return since, time.monotonic() - started


class NoBase(logging.Filter):
    """Drops the Trainer's warning that lists the base model's weights as missing in a checkpoint: none has them."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "missing keys in the checkpoint" not in text or "lora_" in text


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint that is whole; a process that is killed while saving leaves others."""
    found = [path for path in folder.glob("checkpoint-*") if all((path / name).is_file() for name in WHOLE)]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def save_best(trainer: LockstepTrainer, best: str, loaded: Loaded, folder: Path) -> None:
    """Save the best candidate's adapter, in the process that has it."""
    if best not in trainer.live:
        return
    new = folder / f".{ADAPTER}"
    shutil.rmtree(new, ignore_errors=True)
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(new, selected_adapters=[best])
    loaded.tokenizer.save_pretrained(new / best)
    loaded.model.generation_config.save_pretrained(new / best)
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)
    (new / best).rename(folder / ADAPTER)
    shutil.rmtree(new)
