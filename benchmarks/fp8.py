"""FP8 bases beside the bf16 base: held-out losses of the same training, and the time and memory of a step.

    python -m benchmarks.fp8 quality --seeds 4 --steps 400 --out fp8-quality.json
    python -m benchmarks.fp8 quality --task gsm8k.npz --out fp8-gsm8k.json    # of benchmarks.quality data
    python -m benchmarks.fp8 speed --out fp8-speed.json

`quality` trains SmolLM2-135M on Python source (the standard library's, or a task's rows) with the same adapter, rows
and order over each base. `speed` times a step of the 1.24B Llama, or of a quarter of the 8B one (layers and
vocabulary), over each in one run with the frozen bf16 base, and says how far loss and gradients of the factors are
from those over the dequantised weight in float64. Products of 8-bit floats run on GPUs that have them, and in
`quality` on CPUs, too.
"""

import argparse
import copy
import json
import random
import statistics
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor, nn

import gralora
from gralora.ops import fp8, plans
from gralora.tool.models import EMBEDDED, load_model, load_tokenizer

from .quality.data import Task
from .speed import exact
from .speed.methods import LINEARS, Method, methods_of
from .speed.report import environment
from .speed.steps import COMPILED, LLAMA_1B, TINY, Setting, TrainingStep, llama
from .speed.timing import measure

QUANTIZATION = {"bf16": "none", "fp8": "fp8", "fp8 products": "fp8", "nf4": "4bit"}


# a quarter of Llama 3 8B: of its layers, and of its vocabulary, so that parts have the whole model's shares
QUARTER_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=8, num_attention_heads=32)
QUARTER_8B |= dict(num_key_value_heads=8, head_dim=128, vocab_size=32064, tie_word_embeddings=False)
SHAPES = {"1b": LLAMA_1B, "8b/4": QUARTER_8B}


def choose(base: str) -> None:
    """Multiply 8-bit floats over the base that is called so, and dequantised weights over all others."""
    fp8.choice = "products" if base == "fp8 products" else "dequantised"


def rows_of_source(tokenizer: Any, count: int, length: int, draw: random.Random) -> Tensor:
    """`[count, length]` tokens from files of the standard library, at most two rows of a file."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    draw.shuffle(files)
    rows: list[Tensor] = []
    for file in files:
        ids = torch.tensor(tokenizer.encode(file.read_text(encoding="utf-8", errors="replace"), verbose=False))
        rows += ids[: min(len(ids) // length, 2) * length].view(-1, length)
        if len(rows) >= count:
            return torch.stack(rows[:count])
    raise ValueError(f"{len(files)} files have {len(rows)} rows of {length} tokens, and {count} are asked for.")


class Rows(NamedTuple):
    """Tokens `[rows, length]`, and the labels of the loss, -100 where a token does not count."""

    tokens: Tensor
    labels: Tensor

    def part(self, which: Any, device: str | torch.device) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[which].to(device), "labels": self.labels[which].to(device)}


def rows_of(args: argparse.Namespace) -> tuple[Rows, Rows]:
    """Return the rows to train on and the held-out ones."""
    count = min(args.steps * args.batch, args.rows)
    if args.task is None:
        tokens = rows_of_source(load_tokenizer(args.model), args.held_out + count, args.length, random.Random(0))
        held_out, train = tokens[: args.held_out], tokens[args.held_out :]
        return Rows(train, train), Rows(held_out, held_out)
    task = Task.load(args.task)
    parts = (task.train_tokens, task.train_mask, count), (task.test_tokens, task.test_mask, args.held_out)
    found = []
    for tokens, mask, most in parts:
        ids = torch.from_numpy(tokens[:most].astype("int64"))
        found.append(Rows(ids, ids.masked_fill(~torch.from_numpy(mask[:most]), -100)))
    return found[0], found[1]


def held_out_loss(model: nn.Module, rows: Rows, device: str) -> float:
    model.eval()
    with torch.no_grad():
        losses = [model(**rows.part(slice(n, n + 1), device)).loss.item() for n in range(len(rows.tokens))]
    model.train()
    return statistics.fmean(losses)


def train(args: argparse.Namespace, base: str, seed: int, rows: Rows, held_out: Rows) -> dict[str, Any]:
    choose(base)
    model = load_model(args.model, torch.bfloat16, QUANTIZATION[base]).to(args.device).requires_grad_(False)
    torch.manual_seed(seed)
    config = gralora.LoraConfig(use_gralora=True, r=args.r, lora_alpha=2 * args.r, target_modules="all-linear")
    model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    order = list(range(len(rows.tokens)))
    random.Random(seed).shuffle(order)
    with torch.autocast(args.device, torch.bfloat16):
        before = held_out_loss(model, held_out, args.device)
        for step in range(args.steps):
            batch = [order[(step * args.batch + n) % len(order)] for n in range(args.batch)]
            loss = model(**rows.part(batch, args.device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
            optimizer.step()
            optimizer.zero_grad()
        after = held_out_loss(model, held_out, args.device)
    task = args.task.stem if args.task else "python"
    return {"task": task, "base": base, "seed": seed, "before": before, "after": after, "steps": args.steps}


def quality(args: argparse.Namespace) -> list[dict[str, Any]]:
    plans.CPU = replace(plans.CPU, fp8_product="fp8")
    rows, held_out = rows_of(args)
    found: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for base in args.bases:
            found.append(train(args, base, seed, rows, held_out))
            print(f"seed {seed}  {base:12}  {found[-1]['before']:.4f} -> {found[-1]['after']:.4f}", flush=True)
            save(args, found)
    for base in args.bases[1:]:
        pairs = [[row["after"] for row in found if row["base"] == name] for name in (base, args.bases[0])]
        ratios = [own / reference - 1 for own, reference in zip(*pairs, strict=True)]
        spread = f" ± {statistics.stdev(ratios) / len(ratios) ** 0.5:.2%}" if len(ratios) > 1 else ""
        print(f"{base} against {args.bases[0]}: {statistics.fmean(ratios):+.2%}{spread} held-out loss")
    return found


def as_fp8(model: nn.Module) -> nn.Module:
    return gralora.quantize_fp8(copy.deepcopy(model))


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    shape, batch, r = (TINY, (2, 16), 8) if args.tiny else (SHAPES[args.shape], (4, 2048), 64)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    plain = llama(shape, args.device, dtype)
    quantized = as_fp8(plain)
    dense = gralora.dequantize_fp8(copy.deepcopy(quantized), torch.float32)
    tokens = torch.randint(0, shape["vocab_size"], batch, device=args.device)
    frozen, adapted = methods_of(["frozen", "gralora"], r, 4 if r >= 64 else 2, LINEARS)
    cases: dict[str, tuple[Method, nn.Module]] = {
        "frozen, bf16": (frozen, plain),
        "gralora, bf16": (adapted, plain),
        "gralora, fp8": (adapted, quantized),
    }
    product, _ = plans.fp8_module(0 if args.device == "cuda" else None)
    if product:
        cases["gralora, fp8 products"] = (adapted, quantized)
        # both might get the graph of the first: what is chosen is constant to the compiler
        if args.compile:
            del cases["gralora, fp8"]
    setting = Setting("fp8", False, False, args.compile, args.device)
    steps: dict[str, Callable[[], None]] = {}
    errors: dict[str, Any] = {}
    for name, (method, base) in cases.items():
        choose(name.removeprefix("gralora, "))
        model = method.adapt(base, False)
        step = TrainingStep(model, tokens, setting)
        wanted = exact.exact_loss(plain if base is plain else dense, model, tokens)
        errors[name] = exact.errors_of(step.outcome(), wanted)
        steps[name] = Chosen(name, step)
    timed = measure(steps, args.device, args.rounds, 2)
    limit = timed["frozen, bf16"]["time_ms"]
    rows = []
    for name, row in timed.items():
        rows.append({"method": name, "ratio": row["time_ms"] / limit} | row | {"errors": errors[name]})
        print(f"{rows[-1]['ratio']:.3f}x  {name:24} {row['time_ms']:.3f} ms  {row}  {errors[name]}")
    for name, model in (("bf16", plain), ("fp8", quantized)):
        print(f"{name}: {bytes_of(model) / 2**20:.0f} MiB of weights")
    if product == "fp8_hopper":
        from gralora.ops import fp8_hopper

        print(f"fp8 products: {fp8_hopper.copied() / 2**20:.0f} MiB of transposed copies")
    save(args, rows)
    return rows


class Chosen:
    """A step that is timed with the products that its name says."""

    def __init__(self, name: str, step: Callable[[], None]) -> None:
        self.base, self.step = name.removeprefix("gralora, "), step

    def __call__(self) -> None:
        choose(self.base)
        self.step()


def bytes_of(model: nn.Module) -> int:
    """What a model's parameters take, those of FP8 with their scales."""
    total = 0
    for p in model.parameters():
        parts = [p.qdata, p.scale] if type(p).__name__ == "Float8Tensor" else [p]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def save(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if args.out:
        facts = environment(None)
        args.out.write_text(json.dumps([row | facts for row in rows], indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["quality", "speed"])
    p.add_argument(
        "--bases", nargs="+", choices=QUANTIZATION, default=list(QUANTIZATION), help="the first is compared"
    )
    p.add_argument("--shape", choices=SHAPES, default="1b", help="of the model that is timed")
    p.add_argument("--seeds", type=int, default=4)
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--batch", type=int, default=8, help="rows a step")
    p.add_argument("--length", type=int, default=512, help="tokens a row")
    p.add_argument("--task", type=Path, help=".npz of `benchmarks.quality data` to learn, in place of Python source")
    p.add_argument("--rows", type=int, default=300, help="to train on, at most")
    p.add_argument("--held_out", type=int, default=64, help="rows")
    p.add_argument("--r", type=int, default=32)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument(
        "--compile", nargs="?", const="default", choices=COMPILED, help="a mode of torch.compile, or blocks"
    )
    p.add_argument("--model", default=EMBEDDED, help="that learns: folder, hub id, or embedded")
    p.add_argument("--tiny", action="store_true", help="tiny sizes, to test the benchmark itself")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path)
    args = p.parse_args(argv)
    {"quality": quality, "speed": speed}[args.what](args)


if __name__ == "__main__":
    main()
