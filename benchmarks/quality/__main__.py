"""Quality of GraLoRA against LoRA at equal trainable parameters, each method at its own best learning rate.

    python -m benchmarks.quality data --task python --model MODEL --out python.npz [--data FOLDER ...]
    python -m benchmarks.quality data --task source --model MODEL --packages FOLDER --out source.npz --train_rows 52000
    python -m benchmarks.quality run --model MODEL --tasks python.npz gsm8k.npz --results results.jsonl --budget_s 500
    python -m benchmarks.quality report benchmarks/results/quality-*.jsonl --out docs/quality.md
    python -m benchmarks.quality --tiny            # all of it on the CPU, in less than a minute

`run` adds one JSON line for every finished run and skips those that are there, so that it can be stopped and called
again; it stops by itself when the budget is used up. All methods see the same rows in the same order for one seed.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from . import corpus, plan, report
from . import data as tasks
from .data import Task
from .plan import Results
from .runs import LAUNCHES, read, run
from .train import Cell, Job, Trainer


def data(args: argparse.Namespace) -> None:
    """Write one task as an .npz file."""
    if args.task == "fewer":
        _save(tasks.fewer_rows(Task.load(args.train[0]), args.train_rows), args.out)
        return
    if args.model is None:
        raise ValueError(f"--task {args.task} needs --model, the folder of the tokenizer.")
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)

    end, length = tokenizer.eos_token_id, args.length + 1
    rows = args.train_rows, args.test_rows, args.per_package
    if args.task == "python":
        task = tasks.text_task("python", args.data or tasks.default_folders(), encode, end, length, *rows)
    elif args.task in corpus.DOMAINS:
        if args.packages is None:
            raise ValueError(f"--task {args.task} needs --packages, a folder for what it downloads.")
        folder, suffixes = corpus.fetch(args.task, args.packages), corpus.DOMAINS[args.task]
        task = tasks.text_task(args.task, [folder], encode, end, length, *rows, suffixes, longest=100_000)
    elif args.task == "gsm8k":
        task = tasks.gsm8k_task(args.train[0], args.test, encode, end, length)
    else:
        task = tasks.choice_task(args.train, args.test, encode, end, length)
    _save(task, args.out)


def _save(task: Task, out: Path) -> None:
    task.save(out)
    print(f"{out}: {task.describe()}; {out.stat().st_size / 2**20:.1f} MiB")


def tiny(folder: Path, workers: int) -> Results:
    """Data, training of a base model from scratch, and the whole plan, on a model of bytes; writes to `folder`."""

    def encode(text: str) -> list[int]:
        return list(text.encode())

    task = tasks.text_task("python", [tasks.default_folders()[0]], encode, 0, 65, 256, 32, 8)
    task.save(folder / "python.npz")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"vocab_size": 256, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **options))
    trainer = Trainer(model, Cell("python", "full"), task, 100, 512, "eager")
    trainer.run(Job(Cell("python", "full"), 4e-3, seed=9, steps=100, tokens_per_step=512))
    model.save_pretrained(folder / "model")
    args = parser().parse_args(
        ["run", "--model", str(folder / "model"), "--tasks", str(folder / "python.npz"), "--workers", str(workers)]
        + ["--results", str(folder / "results.jsonl"), "--steps", "20", "--tokens_per_step", "512"]
    )
    return run(args, plan.tiny_stages("python"))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tiny", action="store_true", help="run everything in the small on the CPU, print the report")
    commands = p.add_subparsers(dest="command")
    d = commands.add_parser("data", help="make a task's tokens")
    d.add_argument("--task", choices=["python", "gsm8k", "choice", "fewer", *corpus.DOMAINS], required=True)
    d.add_argument("--model", type=Path, help="folder with the tokenizer; not for fewer")
    d.add_argument("--out", type=Path, required=True)
    d.add_argument(
        "--data", type=Path, nargs="+", help="python: folders of packages [standard library, site-packages]"
    )
    d.add_argument(
        "--train",
        type=Path,
        nargs="+",
        help="gsm8k: the .jsonl; choice: .json files in LLM-Adapters' layout; fewer: a task's .npz",
    )
    d.add_argument("--test", type=Path, help="as --train")
    d.add_argument("--packages", type=Path, help="source, docs: folder for the packages, about 0.5 GB")
    d.add_argument("--length", type=int, default=512, help="tokens a row [512]")
    d.add_argument("--train_rows", type=int, default=6400, help="not for questions: [6400]")
    d.add_argument("--test_rows", type=int, default=128, help="of text: [128]")
    d.add_argument("--per_package", type=int, default=200, help="of text: most rows of one package [200]")
    r = commands.add_parser("run", help="make the runs that are not there yet")
    r.add_argument("--model", type=Path, required=True, help="folder of a causal LM of the Llama family")
    r.add_argument("--tasks", type=Path, nargs="+", required=True, help=".npz files of `data`")
    r.add_argument("--results", type=Path, required=True, help=".jsonl, read and added to")
    r.add_argument("--steps", type=int, default=200, help="optimizer steps a run [200]")
    r.add_argument("--tokens_per_step", type=int, default=8192, help="[8192]")
    r.add_argument("--evals", type=int, default=1, help="held-out losses of a run, the last at its end [1]")
    r.add_argument("--workers", type=int, default=4, help="processes that share the device [4]")
    r.add_argument("--budget_s", type=float, default=float("inf"), help="seconds after which it ends")
    r.add_argument("--max_runs", type=int, default=10**9, help="runs after which it ends")
    r.add_argument(
        "--launch",
        choices=LAUNCHES,
        default=LAUNCHES[0],
        help="how a GPU runs a step, a slower way where that fails [compiled]",
    )
    r.add_argument("--exact_match", type=int, default=0, help="GSM8K: test problems to generate answers for [0: none]")
    t = commands.add_parser("report", help="tables, plots and summary")
    t.add_argument("results", type=Path, nargs="+", help=".jsonl files of `run`")
    t.add_argument("--out", type=Path, required=True, help="the Markdown file; plots are written beside it")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.tiny:
        with tempfile.TemporaryDirectory() as folder:
            print(report.write(tiny(Path(folder), workers=1), Path(folder) / "quality.md"))
    elif args.command == "data":
        data(args)
    elif args.command == "run":
        run(args)
    elif args.command == "report":
        print(report.write(Results(r for path in args.results for r in read(path)), args.out))
    else:
        parser().error("give a command, or --tiny")


if __name__ == "__main__":
    main()
