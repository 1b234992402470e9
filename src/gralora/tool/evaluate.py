"""`gralora evaluate`: adapters, and the base model without them, measured on tasks and shown in one table."""

import argparse
import importlib.util
import json
import platform
import time
from pathlib import Path
from typing import Any

from gralora_command import Parser, install

LOSS = "loss"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# flags of one way of measuring only
OF_LOSS = ("max_seq_length", "val_set_size", "eval_split", "skip_bad_rows", "train_on_inputs", "truncation_mode")
OF_TASKS = ("include_path", "num_fewshot", "gen_kwargs", "system_instruction", "apply_chat_template")
OF_HARNESS = (*OF_TASKS, "output_path", "log_samples", "confirm_run_unsafe_code", "seed")
# what earlier releases called them -> what to type
FORMER_TASKS = {
    "gsm8k": "--tasks instruction_gsm8k --data_path FILE (the prompts of `gralora finetune`), or --tasks gsm8k (the "
    "harness's own prompts)",
    "multiple_choice": "--tasks instruction_choice --data_path FILE, or --tasks instruction_choice_generate for the "
    "option that a generated answer names first",
    "humaneval": "--tasks humaneval --confirm_run_unsafe_code",
}
FORMER = {
    "--max_new_tokens": "--gen_kwargs max_gen_toks=N",
    "--temperature": "--gen_kwargs do_sample=true,temperature=T",
    "--top_p": "--gen_kwargs do_sample=true,top_p=P",
    "--shots_path": "--data_path train=FILE",
    "--scoring": "--tasks instruction_choice for the likeliest option, or --tasks instruction_choice_generate",
    "--num_samples": "a task of the harness that has them, such as --tasks humaneval_64",
    "--timeout": "nothing: the harness gives a program 3 seconds",
    "--allow_code_execution": "--confirm_run_unsafe_code, and run it in a container, since programs are no longer "
    "kept from anything (docs/evaluation.md)",
}
EXAMPLES = """examples:
  gralora evaluate MODEL outputs/lora outputs/gralora --tasks gsm8k,arc_easy --batch_size auto
  gralora evaluate MODEL outputs/gralora --tasks my_task --include_path folder_of_yaml
  gralora evaluate embedded outputs/gralora --tasks instruction_gsm8k --data_path test.jsonl --limit 200
  gralora evaluate embedded outputs/gralora --tasks gsm8k --data_path test.jsonl --data_path train=train.jsonl
  gralora evaluate embedded outputs/finetune --task loss --data_path held_out.jsonl
tasks: `lm_eval ls tasks` lists those of lm-evaluation-harness; for your own files there are also instruction_gsm8k,
instruction_choice and instruction_choice_generate, with the prompts of `gralora finetune`"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gralora evaluate",
        description="Measure adapters, and the base model where it is listed too, side by side:\n"
        "on tasks of lm-evaluation-harness, or by the loss on your own data.\n"
        "Differences are to the first model listed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folder of an adapter; or the base model: hub id, folder, embedded")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", action="append", help="names of tasks, by commas; patterns and .yaml files too")
    what.add_argument("--task", metavar=LOSS, help="the loss on your own data, as `gralora finetune` measures it")
    add(
        "--data_path",
        "--dataset_name",
        action="append",
        metavar="[train=]DATA",
        help="of the loss: file, folder or data set (default: Python's library); of one task: a file in place of its "
        "data set, and train=FILE for the solved examples",
    )
    add("--base_model", "--model_name_or_path", help="in place of the base model that the adapters name")
    add("--limit", type=float, help="only the first so many items of each task, or a share of them where below 1")
    add("--batch_size", help="texts at once, or auto (default: 8)", default="8")
    add("--dtype", choices=DTYPES, default="auto", help="of the base model (default: as it is stored)")
    add("--device", help="e.g. cpu or cuda:1 (default: the accelerator if there is one)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--out", type=Path, help="also write that JSON, and the loss of each item, into this new file")

    add = parser.add_argument_group("tasks: the harness's flags").add_argument
    add("--include_path", action="append", help="folder with YAML files of further tasks")
    add("--num_fewshot", "--shots", type=int, help="solved examples before each question (default: the task's)")
    add("--gen_kwargs", help="of generation, e.g. max_gen_toks=256,do_sample=true,temperature=0.8")
    add("--apply_chat_template", nargs="?", const=True, metavar="NAME", help="ask as the user of a chat")
    add("--system_instruction", help="put before each prompt")
    add("--seed", type=int, help="of sampling and of the choice of examples (default: the harness's)")
    add("--output_path", help="folder for the harness's files of results")
    add("--log_samples", action="store_true", default=None, help="write each item there, too")
    add("--confirm_run_unsafe_code", action="store_true", default=None, help="run what the model writes, unconfined")

    add = parser.add_argument_group("loss: as in `gralora finetune`").add_argument
    add("--max_seq_length", "--cutoff_len", type=int, help="tokens (default: 2048, or what the model takes)")
    add("--val_set_size", type=int, help="only the rows that finetune holds out with it")
    add("--eval_split", help="split of a data set, or what the names of a folder's files begin with")
    add("--truncation_mode", choices=("keep_start", "keep_end"), help="what of a long text is kept")
    add("--train_on_inputs", action="store_true", default=None, help="count prompts too")
    add("--skip_bad_rows", action="store_true", default=None, help="leave out broken rows instead of stopping")
    for flag in FORMER:
        parser.add_argument(flag, nargs="?", const="", help=argparse.SUPPRESS)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Read and check the command line; ValueError for what it cannot mean."""
    args = make_parser().parse_args(argv)
    for flag, instead in FORMER.items():
        if vars(args).pop(flag[2:]) is not None:
            raise ValueError(f"{flag} is no longer known; give {instead}.")
    if args.task in FORMER_TASKS:
        raise ValueError(f"task {args.task!r} is now lm-evaluation-harness's; type {FORMER_TASKS[args.task]}.")
    if args.task not in (None, LOSS):
        raise ValueError(f"task={args.task!r} must be {LOSS}; give --tasks {args.task} for a task of the harness.")
    mode, others = ("task loss", OF_HARNESS) if args.task else ("tasks", OF_LOSS)
    for name in others:
        if getattr(args, name) is not None:
            raise ValueError(f"{name}={getattr(args, name)!r} has no meaning with --{mode}; leave it out.")
    least = {"limit": 0, "num_fewshot": 0, "max_seq_length": 2, "val_set_size": 0}
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name}={value:g} must be at least {minimum}.")
    if args.limit is not None and (args.limit == 0 or (args.limit > 1 and args.limit % 1)):
        raise ValueError(f"limit={args.limit:g} must be a number of items, or a share of them below 1.")
    if args.batch_size != "auto" and not (args.batch_size.isdigit() and int(args.batch_size)):
        raise ValueError(f"batch_size={args.batch_size!r} must be a number from 1 on, or auto.")
    if args.log_samples and not args.output_path:
        raise ValueError("log_samples needs --output_path, the folder to write them to.")
    check_outputs(args)
    return settle(args)


def check_outputs(args: argparse.Namespace) -> None:
    """Raise OSError or ValueError if results could not be written at the end."""
    from ..checkpoints.files import check_absent

    if args.output_path is not None and Path(args.output_path).suffix == ".json":
        raise ValueError(f"output_path={args.output_path!r} must be a folder: each model has files of its own in it.")
    if args.out is not None:
        check_absent(args.out)
        if not args.out.resolve().parent.is_dir():
            raise FileNotFoundError(f"out={str(args.out)!r} is in a folder that is not there.")


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what was left out, for the loss."""
    if args.task == LOSS:
        if args.batch_size == "auto":
            raise ValueError("batch_size='auto' is for --tasks; give a number with --task loss.")
        if args.limit is not None and args.limit < 1:
            raise ValueError(f"limit={args.limit:g}: --task loss takes a number of items.")
        if len(args.data_path or []) > 1:
            raise ValueError(f"data_path={args.data_path}: --task loss measures one at a time.")
        args.data_path = args.data_path[0] if args.data_path else None
        args.truncation_mode = args.truncation_mode or "keep_start"
        args.skip_bad_rows, args.train_on_inputs = bool(args.skip_bad_rows), bool(args.train_on_inputs)
    return args


def main(argv: list[str]) -> None:
    """The command `gralora evaluate`."""
    args = parse(argv)
    started = time.monotonic()
    from .side_by_side import common_base, load_side_by_side

    common_base(args.models, args.base_model)
    way = loss() if args.task == LOSS else harness()
    items = way.read(args)  # before the model is loaded, since most mistakes are found here
    results: dict[str, Any] = {}  # label -> what was found of the model
    loaded = load_side_by_side(args.models, args.base_model, args.dtype, args.device)
    try:
        way.run(args, loaded, items, results)
    finally:  # after Ctrl-C, what is known so far
        if results:
            found = way.report(results, items) | about(args, loaded, results, time.monotonic() - started)
            show(args, found, *way.table(found))


def loss() -> Any:
    from .evaluation import loss

    return loss


def harness() -> Any:
    """Return the module that calls the harness, whose import takes seconds; ImportError if it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(f"--tasks needs lm-evaluation-harness: {install('evaluate')}")
    from .evaluation import harness

    return harness


def about(args: argparse.Namespace, loaded: Any, results: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return what was asked, which models are not finished, and with which versions."""
    import peft
    import torch
    import transformers

    return {
        "not_finished": [label for label in loaded.adapters if label not in results],
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "time_s": round(seconds, 1),
        "versions": {package.__name__: package.__version__ for package in (torch, transformers, peft)}
        | {"python": platform.python_version()},
    }


def show(args: argparse.Namespace, found: dict[str, Any], title: str, lines: list[list[str]]) -> None:
    """Print the table or the JSON, and write the JSON where that is asked for."""
    found = json.loads(json.dumps(found, default=str))  # the harness's configs hold functions
    if args.json:
        print(json.dumps({name: value for name, value in found.items() if name != "records"}, indent=2))
    else:
        print(aligned(title, lines, found["not_finished"]))
    if args.out is not None:
        from ..checkpoints.files import write_json

        write_json(args.out, found)


def aligned(title: str, lines: list[list[str]], not_finished: list[str]) -> str:
    """Return the lines in columns below the title."""
    width = max(map(len, lines))
    lines = [line + [""] * (width - len(line)) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [title, ""]
    text += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if not_finished:
        text += ["", f"not finished: {', '.join(not_finished)}"]
    return "\n".join(text)
