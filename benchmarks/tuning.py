"""What `gralora tune` costs, and how often it finds what a full sweep finds.

    python -m benchmarks.tuning data --model MODEL --gsm8k gsm8k_train.jsonl --choice openbookqa.train.json --out DATA
    python -m benchmarks.tuning run --model MODEL --data DATA --out build/tuning --budget_s 280
    python -m benchmarks.tuning report build/tuning --out build/tuning.json

Without a GPU, `base` makes a small MODEL first, for `run --no-bf16 --length 256 --rows 8 --r 16 --workers 1`.

`run` first makes one search alone, as users do, then full sweeps, several at once, until the time is up. Candidates do
not know of each other, so what a rule would have stopped can be read from the losses of a full sweep.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .quality.data import default_folders, files_by_package, text_task
from .quality.plan import TUNING_SEED

# of full sweeps: more than a search has, to compare rules. Each twice the one before, since a measurement averages
# over the later half of the steps so far, but not over those before an earlier rung
RUNGS = "0.05,0.1,0.2,0.4"
# shares of the steps, and what part goes on; the first is the default of `gralora tune`
RULES = [
    ((0.1, 0.2), 4),
    ((0.05, 0.2), 4),
    ((0.1,), 4),
    ((0.2,), 4),
    ((0.2, 0.4), 4),
    ((0.1, 0.2), 3),
    ((0.1, 0.2), 2),
    ((0.05, 0.1, 0.2), 2),
]
METHODS = {
    "gralora": ["--use_gralora", "--gralora_k", "4", "--gralora_scaling", "matched"],
    "lora": [],
}
ROWS = {"python": 8, "python-few": 8, "gsm8k": 16, "choice": 32}  # of a batch: about 4096 tokens
FEW = 300  # rows of python-few: each is read four times in 150 steps


def data(args: argparse.Namespace) -> None:
    """Write the tasks of the quality benchmark as files that `gralora finetune` reads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    folders = default_folders()
    task = text_task(
        "python",
        folders,
        lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False),
        tokenizer.eos_token_id,
        args.length + 1,
        1600,
        128,
        100,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("python", task.train_tokens), ("python-few", task.train_tokens[::5][:FEW])):
        write_texts(args.out / f"{name}.jsonl", tokenizer.batch_decode(rows))
    write_texts(args.out / "python-test.jsonl", tokenizer.batch_decode(task.test_tokens))
    for name, path in (("gsm8k.jsonl", args.gsm8k), ("choice.json", args.choice)):
        if path:
            (args.out / name).write_bytes(path.read_bytes())


def base(args: argparse.Namespace) -> None:
    """Train a base model so small that a sweep takes a minute on one CPU core, on Python's standard library."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    library = default_folders()[:1]
    packages = sorted(files_by_package(library).items())
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(files[0]) for _, files in packages], vocab_size=2048, special_tokens=["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(args.out)
    # none of the packages that `data` holds out
    task = text_task("python", library, lambda text: bpe.encode(text).ids, 0, 129, 6400, 64, 400)
    rows = torch.from_numpy(task.train_tokens.astype("int64"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=2048, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=0, **sizes)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.steps)
    for step in range(args.steps):
        batch = rows[torch.randint(len(rows), (16,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{args.steps}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(args.out)


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def command(args: argparse.Namespace, task: str, method: str, seed: int, folder: Path, *more: str) -> list[str]:
    path = next(args.data.glob(f"{task}.json*"), args.data / f"{task}.jsonl")
    held_out = ["--val_set_size", str(args.held_out)]
    if task.startswith("python"):
        held_out += ["--eval_data_path", str(args.data / "python-test.jsonl")]
    rows = str(args.rows or ROWS[task])
    flags = ["--base_model", args.model, "--data_path", str(path), *held_out]
    flags += ["--lora_r", str(args.r), "--lora_alpha", str(args.r), "--lora_target_modules", "all-linear"]
    flags += METHODS[method]
    flags += ["--max_steps", str(args.steps), "--batch_size", rows, "--micro_batch_size", rows]
    flags += ["--max_seq_length", str(args.length), "--lr_scheduler_type", "cosine", "--seed", str(seed)]
    flags += ["--bf16"] if args.bf16 else []
    flags += ["--disable_tqdm", "true", "--save_steps", "100000"]
    # one rank, given as a config's: a flag would make it part of the search
    config = folder.with_suffix(".yaml")
    config.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in pairs(flags)), encoding="utf-8")
    words = [sys.executable, "-m", "gralora_command", "tune", str(config), "--study_dir", str(folder), *more]
    return [*words, "--learning_rate", args.learning_rate] if args.learning_rate else words


def pairs(flags: list[str]) -> list[tuple[str, Any]]:
    """Return the flags as names and values; a flag without a value is true."""
    found: list[tuple[str, Any]] = []
    for word in flags:
        if word.startswith("--"):
            found.append((word[2:], True))
        else:
            found[-1] = (found[-1][0], {"true": True, "false": False}.get(word, word))
    return found


def run(args: argparse.Namespace) -> None:
    """Search once alone, then sweep until the budget is used up; what is not finished then is ended."""
    end = time.monotonic() + args.budget_s
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(task, method, seed) for seed in args.seeds for task in args.tasks for method in args.methods]
    task, method, seed = jobs[0]
    started = time.monotonic()
    try:
        words = command(args, task, method, seed, args.out / "alone")
        done = subprocess.run(words, timeout=args.budget_s)
        print(f"alone: status {done.returncode}, {time.monotonic() - started:.1f} s", flush=True)
    except subprocess.TimeoutExpired:
        print("alone: not finished", flush=True)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    waiting = [(f"{task}-{method}-{seed}", (task, method, seed)) for task, method, seed in jobs]
    while (waiting or running) and time.monotonic() < end:
        while waiting and len(running) < args.workers:
            name, job = waiting.pop(0)
            log = (args.out / f"{name}.log").open("wb")
            how = ["--full_sweep", "--rungs", RUNGS, "--together", args.together]
            words = command(args, *job, args.out / name, *how)
            running[name] = subprocess.Popen(words, stdout=log, stderr=log), time.monotonic()
        for name, (process, began) in list(running.items()):
            if process.poll() is not None:
                print(f"{name}: status {process.returncode}, {time.monotonic() - began:.1f} s", flush=True)
                del running[name]
        time.sleep(0.5)
    for name, (process, _) in running.items():
        process.kill()
        process.wait()
        print(f"{name}: not finished", flush=True)


def recorded(path: Path) -> dict[str, dict[str, Any]]:
    """Return the tuning runs of `benchmarks.quality run --evals`, which have losses on the way, as full sweeps.

    Their losses are of the parameters as they were, not of means, and no answer has a loss of its own: no ties.
    """
    sweeps: dict[str, dict[str, Any]] = {}
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if record.get("test_curve") and record["seed"] == TUNING_SEED:
            name = f"{record['task']}-{record['method']}-r{record['r']}-x{record['scale']:.3g}"
            sweep = sweeps.setdefault(name, {"candidates": [], "tied": []})
            losses = record["test_curve"] | {str(record["steps"]): record["test_loss"]}
            row = {"name": f"{record['lr']:g}", "learning_rate": record["lr"], "held_out_loss": record["test_loss"]}
            sweep["candidates"].append(row | {"losses": losses})
            sweep["rungs"] = [int(step) for step in losses]
    for sweep in sweeps.values():
        sweep["candidates"].sort(key=lambda row: row["learning_rate"])
        sweep["best"] = min(sweep["candidates"], key=lambda row: loss_at(row, sweep["rungs"][-1]))
    return sweeps


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Say what each rule would have found in each sweep, and write it as JSON."""
    import peft
    import torch
    import transformers

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    found: dict[str, Any] = {"card": card, "date": time.strftime("%Y-%m-%d")}
    found |= {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    alone = args.results / "alone" / "tune.json"
    found |= {"alone": json.loads(alone.read_text()) if alone.is_file() else None, "sweeps": {}}
    if args.results.suffix == ".jsonl":
        found["sweeps"] = recorded(args.results)
    for path in sorted(args.results.glob("*/tune.json")):
        sweep = json.loads(path.read_text())
        if sweep["share_of_full_sweep"] == 1:
            found["sweeps"][path.parent.name] = sweep
    sweeps = list(found["sweeps"].values())
    rules = [
        rule for rule in RULES if all(is_measured(share, sweep["rungs"]) for share in rule[0] for sweep in sweeps)
    ]
    found["rules"] = [judged(sweeps, *rule) for rule in rules]
    for name, sweep in found["sweeps"].items():
        losses = "  ".join(
            f"{row['learning_rate']:.2g}: {row['held_out_loss'] or math.nan:.4f}" for row in sweep["candidates"]
        )
        print(f"{name}: best {sweep['best']['learning_rate']:.3g}, ties {len(sweep['tied'])}  |  {losses}")
    for rule in found["rules"]:
        print(
            f"rungs {rule['rungs']} reduction {rule['reduction']}: {rule['cost']:.2f} of the steps; best found in "
            f"{rule['best']} of {rule['sweeps']}, best or a tie in {rule['best_or_tie']}; loss above the best's: "
            f"mean {rule['mean_regret']:.4f}, most {rule['most_regret']:.4f}"
        )
    if alone := found["alone"]:
        names = ("train_s", "measure_s", "together", "step_seconds", "peak_memory_gib", "share_of_full_sweep")
        print("alone: " + ", ".join(f"{name} {alone[name]}" for name in names))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def judged(sweeps: list[dict[str, Any]], shares: tuple[float, ...], reduction: float) -> dict[str, Any]:
    """Return the cost and the hits of a rule over full sweeps."""
    costs, regrets, best, tie = [], [], 0, 0
    for sweep in sweeps:
        pick, cost = picked(sweep, shares, reduction)
        regrets.append(pick["held_out_loss"] - sweep["best"]["held_out_loss"])
        costs.append(cost)
        best += pick["name"] == sweep["best"]["name"]
        tie += pick["name"] in (sweep["best"]["name"], *sweep["tied"])
    count = max(len(sweeps), 1)
    return {
        "rungs": shares,
        "reduction": reduction,
        "sweeps": len(sweeps),
        "cost": sum(costs) / count,
        "best": best,
        "best_or_tie": tie,
        "mean_regret": sum(regrets) / count,
        "most_regret": max(regrets, default=0.0),
    }


def picked(sweep: dict[str, Any], shares: tuple[float, ...], reduction: float) -> tuple[dict[str, Any], float]:
    """Return the candidate that a rule takes to the end and finds best, and its share of the full sweep's steps."""
    total = sweep["rungs"][-1]
    live, before, trained = sweep["candidates"], 0, 0
    for share in shares:
        step = min(sweep["rungs"], key=lambda rung: abs(rung - share * total))
        trained += len(live) * (step - before)
        before = step
        ranked = sorted(live, key=lambda row: loss_at(row, step))
        live = ranked[: math.ceil(len(ranked) / reduction)]
    trained += len(live) * (total - before)
    return min(live, key=lambda row: loss_at(row, total)), trained / (len(sweep["candidates"]) * total)


def is_measured(share: float, rungs: list[int]) -> bool:
    """Whether losses are known near this share of the steps, to a fiftieth of them all."""
    return min(abs(rung / rungs[-1] - share) for rung in rungs) <= 0.02


def loss_at(row: dict[str, Any], step: int) -> float:
    loss = row["losses"][str(step)]
    return math.inf if loss is None else loss


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.tuning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    b = commands.add_parser("base", help="make a base model for a CPU, in minutes")
    b.add_argument("--out", type=Path, required=True)
    b.add_argument("--steps", type=int, default=600, help="[600]")
    b.set_defaults(call=base)
    d = commands.add_parser("data", help="make the tasks' files")
    d.add_argument("--model", required=True, help="folder of the tokenizer")
    d.add_argument("--gsm8k", type=Path, help="GSM8K's train.jsonl")
    d.add_argument("--choice", type=Path, help="multiple choice in LLM-Adapters' layout")
    d.add_argument("--length", type=int, default=512, help="tokens of a row of text [512]")
    d.add_argument("--out", type=Path, required=True)
    d.set_defaults(call=data)
    r = commands.add_parser("run", help="search and sweep")
    r.add_argument("--model", required=True)
    r.add_argument("--data", type=Path, required=True, help="folder of `data`")
    r.add_argument("--out", type=Path, required=True)
    r.add_argument("--steps", type=int, default=150)
    r.add_argument("--length", type=int, default=512, help="most tokens of a row [512]")
    r.add_argument("--rows", type=int, help="rows of a batch [about 4096 tokens]")
    r.add_argument("--held_out", type=int, default=128, help="held-out rows [128]")
    r.add_argument("--r", type=int, default=64, help="rank, and lora_alpha [64]")
    r.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="[yes]")
    r.add_argument("--learning_rate", help="as of `gralora tune` [its default]")
    r.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    r.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    r.add_argument("--tasks", nargs="+", default=list(ROWS), choices=list(ROWS))
    r.add_argument("--workers", type=int, default=4, help="sweeps at once [4]")
    r.add_argument("--together", default="auto", help="candidates of a sweep in one pass, as of `gralora tune` [auto]")
    r.add_argument("--budget_s", type=float, default=float("inf"))
    r.set_defaults(call=run)
    t = commands.add_parser("report", help="what each rule would have found")
    t.add_argument("results", type=Path, help="folder of `run`; or a .jsonl of `benchmarks.quality run --evals 5`")
    t.add_argument("--out", type=Path)
    t.set_defaults(call=report)
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    main()
