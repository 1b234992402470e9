"""Training steps on several GPUs, DDP and FSDP2, with the configs in configs/accelerate.

    python -m benchmarks.multi_gpu [--nproc 1 2 4] [--engines ddp fsdp2] [--out results.json]
    python -m benchmarks.multi_gpu --nproc 2 --engines fsdp2 --shape 30b --batch 1 --sequence 4096 --checkpointing
    python -m benchmarks.multi_gpu --nproc 2 --engines fsdp2 --nf4 --batch 1 --sequence 16384 --checkpointing

Llama-3-8B's shape (or the first Llama's of 30B, or Llama-3-70B's) with random weights, bf16 or nf4, r = 64, k = 4, all
seven linears, sequences of 2048 tokens: the frozen base, PEFT LoRA, PEFT GRALORA and gralora, interleaved step by step
as in benchmarks.speed. For each engine and number of GPUs there is a table: time of a step on the slowest GPU, tokens
per second over all GPUs and on each, their share of an H100's or H200's peak, most memory of a GPU that the method
alone would use, and scaling efficiency: tokens per second, over those of one GPU times the number of GPUs. The share
counts the products that training adapters needs, those of the forward pass and of the gradients of inputs: 4 FLOPs a
weight of a linear and token, none for the activations that checkpointing computes again, none of attention's own.
One GPU runs DDP only: there is nothing to shard. Before that, `STEPS` steps on the same sequences for any number of
GPUs, each of which takes its share: how far their losses are from those on one GPU, as a share. `--tiny` is a model of
a few thousand weights on CPU processes, to test this script.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

from .speed import programs
from .speed.methods import LINEARS, METHODS, methods_of
from .speed.report import environment, report
from .speed.steps import BF16, FP32, llama
from .speed.timing import interleave

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "accelerate"
ENGINES = ["ddp", "fsdp2"]
LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
LLAMA_8B |= dict(num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)
LLAMA_30B = dict(hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52)
LLAMA_30B |= dict(num_key_value_heads=52, vocab_size=32000, max_position_embeddings=2048)
LLAMA_70B = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
LLAMA_70B |= dict(num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)
SHAPES = {"8b": LLAMA_8B, "30b": LLAMA_30B, "70b": LLAMA_70B}
PEAK_FLOPS = 989e12  # of an H100 or H200 (SXM): dense bf16, by its data sheet
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TINY |= dict(num_key_value_heads=2, vocab_size=64)
STEPS = 4  # whose losses are compared


def take_cpu_for_gpus() -> None:
    """Let accelerate take processes on the CPU for GPUs, with gloo between them: else it shards on GPUs only."""
    import torch.distributed
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def measure(args: argparse.Namespace) -> None:
    """In one of the processes: a row for each method, which the first writes to `args.worker`."""
    if args.tiny and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        take_cpu_for_gpus()
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=args.tiny)
    device = accelerator.device.type
    shape, dtype = (TINY, FP32) if args.tiny else (SHAPES[args.shape], BF16)
    base = llama(shape, device, dtype)
    flops = 4 * sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear))  # of a token
    if args.nf4:
        base = programs.quantize_nf4(base, storage=dtype)
    base_mib = sum(p.numel() * p.element_size() for p in base.parameters()) / 2**20
    shares = (math.lcm(*args.nproc), args.batch, args.sequence)
    batches = torch.randint(0, shape["vocab_size"], shares, device=device)  # the same in all processes
    batches = batches[accelerator.process_index :: accelerator.num_processes]

    def allocated_mib() -> float:
        return torch.cuda.memory_allocated() / 2**20 if device == "cuda" else 0.0

    steps, memory, losses = {}, {}, {}
    for method in methods_of(args.methods, *((4, 2) if args.tiny else (64, 4)), LINEARS):
        name, before = method.name, allocated_mib()
        model = method.adapt(base, fp32_adapters=False)
        steps[name] = training_step(model, batches, accelerator, args.checkpointing)
        means = torch.stack([steps[name](len(batches)) for _ in range(STEPS)])  # over this process's batches
        losses[name] = accelerator.reduce(means, "mean").tolist()
        # without FSDP all methods share the base model's weights, and each alone would have them
        memory[name] = allocated_mib() - before + (0 if accelerator.is_fsdp2 else base_mib)
    del base
    if device == "cuda":
        for name, step in steps.items():
            before = allocated_mib()
            torch.cuda.reset_peak_memory_stats()
            step()
            memory[name] += torch.cuda.max_memory_allocated() / 2**20 - before
    rows = interleave(steps, device, args.rounds, repeats=1, warmup=1)
    for name, row in rows.items():
        worst = torch.tensor([*row.values(), memory[name]], device=device)  # of a step, a GPU waits for the slowest
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        row |= dict(zip([*row, "peak_mib"], worst.tolist(), strict=True))
        row["tokens_per_s_per_gpu"] = batches[0].numel() / row["time_ms"] * 1e3
        row["tokens_per_s"] = row["tokens_per_s_per_gpu"] * accelerator.num_processes
        row["peak_percent"] = 100 * flops * row["tokens_per_s_per_gpu"] / PEAK_FLOPS
    if accelerator.is_main_process:
        facts = environment(args.commit)
        args.worker.write_text(json.dumps({"rows": rows, "losses": losses, "facts": facts}))
    steps.clear()  # DDP's models, before what they communicate through
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def training_step(model, batches, accelerator, checkpointing: bool):
    """Forward, backward and AdamW on the adapter, as in benchmarks.speed, through accelerate.

    Returns:
        A function (number of batches, 1 unless given) -> their mean loss.
    """
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # accelerate's FSDP2 asks for an optimizer; one over a weight that never has a gradient does nothing
    optimizer = torch.optim.AdamW(trainable or [next(model.parameters())], lr=1e-3)
    # the frozen base too has gradients as far as the embeddings, as it would have with adapters in the first layer
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    if trainable or accelerator.is_fsdp2:  # DDP refuses a model without gradients to exchange
        model, optimizer = accelerator.prepare(model, optimizer)

    def step(count: int = 1) -> torch.Tensor:
        losses = []
        for tokens in batches[:count]:
            losses.append(model(input_ids=tokens, labels=tokens, use_cache=False).loss / count)
            accelerator.backward(losses[-1])
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).detach().sum()

    return step


def launch(engine: str, processes: int, args: argparse.Namespace) -> dict:
    """`measure` on so many processes, started by accelerate; the figures of all."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        command = ["--config_file", str(CONFIGS / f"{engine}.yaml"), "--num_processes", str(processes)]
        command += ["--main_process_port", "0", "--module", "benchmarks.multi_gpu", "--worker", str(out)]
        command += ["--methods", *args.methods, "--nproc", *map(str, args.nproc)]
        for name in ("batch", "sequence", "rounds", "shape", "commit"):
            command += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
        command += [f"--{name}" for name in ("tiny", "checkpointing", "nf4") if getattr(args, name)]
        launch_command(launch_command_parser().parse_args(command))
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, nargs="+", default=[1, 2], help="numbers of GPUs")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="which methods to compare")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="of the model")
    parser.add_argument("--nf4", action="store_true", help="weights of 4 bits (bitsandbytes), which FSDP2 shards too")
    parser.add_argument("--batch", type=int, default=2, help="sequences per GPU")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--rounds", type=int, default=7, help="rounds over all methods")
    parser.add_argument("--commit", help="recorded in each row; asked of git unless given")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on CPU processes")
    parser.add_argument("--out", type=Path, help="write all rows as JSON")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        measure(args)
        return
    rows, alone = [], None
    for processes in sorted(args.nproc):
        for engine in [engine for engine in args.engines if processes > 1 or engine == "ddp"]:
            found = launch(engine, processes, args)
            timed, facts = found["rows"], found["facts"] | {"engine": engine, "gpus": processes}
            if processes == 1:
                alone = found
            if alone:
                for name, row in timed.items():
                    linear = processes * alone["rows"][name]["tokens_per_s"]
                    row["efficiency_percent"] = 100 * row["tokens_per_s"] / linear
            setting = f"{args.shape}, " if args.shape != "8b" else ""
            setting += "nf4, " if args.nf4 else ""
            setting += f"{engine}, {processes} x {args.batch} x {args.sequence} tokens"
            setting += ", gradient checkpointing" if args.checkpointing else ""
            found_rows = report("multi_gpu", setting, timed, "frozen", **facts)
            for row in found_rows:
                row["losses"] = found["losses"][row["method"]]
                if alone:
                    pairs = zip(row["losses"], alone["losses"][row["method"]], strict=True)
                    row["loss_difference"] = max(abs(loss / expected - 1) for loss, expected in pairs)
                    print(f"  losses of {row['method']}, from those on one GPU: {row['loss_difference']:.1e}")
            rows += found_rows
            if args.out:  # after every launch: the next may fail
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
