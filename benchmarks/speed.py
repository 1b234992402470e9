"""Speed and memory of GraLoRA side by side with the frozen base, PEFT's LoRA and PEFT's own GRALORA.

    python benchmarks/speed.py linear model small decode merge cpu [--compile] [--out results.json] [--plot plot.svg]
    python benchmarks/speed.py --rows benchmarks/results/linear-h200.json --plot plot.svg

Sections run in the order given; every section interleaves its methods round by round and prints, per method, the
median time over the rounds with its spread, and ratios first. The frozen base (gradients to the input only) is the
limit: what the layer costs without any adapter. Each row names card and versions in the JSON.
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import peft
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

import gralora
from gralora.ops import dispatch

BF16, FP32 = torch.bfloat16, torch.float32
LLAMA_8B_LINEARS = [(4096, 4096), (4096, 14336), (14336, 4096)]
LLAMA_1B = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
LLAMA_1B |= dict(num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True)
SMOLLM2_135M = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
SMOLLM2_135M |= dict(num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
SPREAD = ("p20_ms", "time_ms", "p80_ms")
METHODS = ["frozen", "PEFT LoRA", "PEFT GRALORA", "gralora"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def configs(r: int, k: int, targets: list[str]) -> dict[str, peft.PeftConfig | None]:
    """The methods that are compared, all with r * (in + out) trainable parameters a layer; None is the frozen base."""
    common = dict(r=r, target_modules=targets)
    methods = {
        "frozen": None,
        "PEFT LoRA": peft.LoraConfig(lora_alpha=r, **common),
        "PEFT GRALORA": peft.GraloraConfig(alpha=r, gralora_k=k, **common),
        "gralora": gralora.LoraConfig(lora_alpha=r, use_gralora=True, gralora_k=k, **common),
    }
    return {name: config for name, config in methods.items() if name in METHODS}


def adapt(model: nn.Module, config: peft.PeftConfig | None, fp32_adapters: bool) -> nn.Module:
    """A copy of `model` that shares its weights, with the adapter of `config`, random where PEFT starts at zero."""
    model = copy.deepcopy(model, memo={id(p): p for p in model.parameters()}).requires_grad_(False)
    if config is None:
        return model
    model = peft.get_peft_model(model, copy.deepcopy(config), autocast_adapter_dtype=fp32_adapters)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return model


def interleave(
    steps: dict[str, Callable[[], None]], device: str, rounds: int, repeats: int, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Time every step in turn, round by round; milliseconds per call: median, and the 20th and 80th percentile.

    A GPU is never left idle between them, as it is not in training: the host runs ahead, and a card at its power limit
    has the same clocks for all.
    """
    samples: dict[str, list[Callable[[], float]]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(warmup):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            samples[name].append(_run(step, device, repeats))
    if device == "cuda":
        torch.cuda.synchronize()
    times = {name: [sample() / repeats for sample in own] for name, own in samples.items()}
    return {
        name: dict(zip(("p20_ms", "p80_ms"), _spread(own), strict=True)) | {"time_ms": statistics.median(own)}
        for name, own in times.items()
    }


def _run(step: Callable[[], None], device: str, repeats: int) -> Callable[[], float]:
    """Run a step several times; how many milliseconds that took is known once the device is done."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        taken = (time.perf_counter() - start) * 1e3
        return lambda: taken
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        step()
    last.record()
    return lambda: first.elapsed_time(last)


def _spread(times: list[float]) -> tuple[float, float]:
    if len(times) < 5:
        return min(times), max(times)
    quintiles = statistics.quantiles(times, n=5)
    return quintiles[0], quintiles[-1]


def peak_mib(step: Callable[[], None]) -> float:
    """Most GPU memory in use during a step, in MiB, weights included."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def gpu_ms(step: Callable[[], None], repeats: int = 4) -> float:
    """What the GPU computes of a step, milliseconds: what it takes where the host keeps up."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.self_device_time_total for event in on_gpu) / repeats / 1e3


def report(section: str, setting: str, rows: dict[str, dict[str, float]], base: str, **facts: object) -> list[dict]:
    """Print one table, ratios to `base` first, and return its rows for the JSON."""
    print(f"\n{section}: {setting}")
    for name, row in rows.items():
        ratio = row["time_ms"] / rows[base]["time_ms"]
        extras = "".join(f"  {key} {value:,.0f}" for key, value in row.items() if key not in SPREAD)
        spread = f"{row['time_ms']:9.3f} ms  [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}]"
        print(f"  {ratio:6.3f}x  {name:28s} {spread}{extras}", flush=True)
    return [
        {
            "section": section,
            "setting": setting,
            "method": name,
            f"ratio_to_{base}": row["time_ms"] / rows[base]["time_ms"],
        }
        | row
        | facts
        for name, row in rows.items()
    ]


def linear(args: argparse.Namespace) -> list[dict]:
    """One adapted linear, forward and backward, 8192 tokens, against the frozen linear alone."""
    rows = []
    for in_features, out_features in LLAMA_8B_LINEARS:
        base = nn.Sequential(nn.Linear(in_features, out_features, bias=False)).to("cuda", BF16)
        x = torch.randn(8192, in_features, device="cuda", dtype=BF16, requires_grad=True)
        dy = torch.randn(8192, out_features, device="cuda", dtype=BF16)
        for r in args.ranks:
            for setting, fp32 in (("bf16 adapters", False), ("fp32 adapters + autocast", True)):
                steps = {
                    name: _forward_backward(adapt(base, config, fp32), x, dy, fp32)
                    for name, config in configs(r, 4, ["0"]).items()
                }
                timed = interleave(steps, "cuda", 3 * args.rounds, 10)
                for name, step in steps.items():
                    timed[name]["peak_mib"] = peak_mib(step)
                rows += report(
                    "linear", f"{in_features}->{out_features}, r={r}, k=4, {setting}", timed, "frozen", r=r, fp32=fp32
                )
    for fp32 in (False, True):
        ours = [row for row in rows if row["method"] == "gralora" and row["fp32"] == fp32]
        mean = statistics.mean(row["ratio_to_frozen"] for row in ours)
        print(f"\nlinear: gralora, {'fp32 adapters + autocast' if fp32 else 'bf16'}: {mean:.3f}x of frozen on average")
    return rows


def _forward_backward(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, autocast: bool) -> Callable[[], None]:
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]

    def step() -> None:
        with torch.autocast("cuda", BF16) if autocast else nullcontext():
            y = module(x)
        torch.autograd.grad(y, inputs, dy)

    return step


def _training_step(
    model: nn.Module, tokens: torch.Tensor, autocast: bool, device: str, compiled: bool = False
) -> Callable[[], None]:
    """Forward, backward and AdamW on the adapters; the frozen base takes gradients to its embeddings' output."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=device == "cuda") if trainable else None
    if not trainable:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    elif isinstance(model, peft.PeftModel):
        model.enable_input_require_grads()
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(device, BF16) if autocast else nullcontext():
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _llama(shape: dict, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(dtype)
    return model.train()


def _train(
    section: str, shape: dict, batch: tuple[int, int], r: int, args: argparse.Namespace, device: str
) -> list[dict]:
    base = _llama(shape, device, BF16 if device == "cuda" else FP32)
    tokens = torch.randint(0, shape["vocab_size"], batch, device=device)
    settings = (
        [("bf16 adapters", False), ("fp32 adapters + autocast", True)] if device == "cuda" else [("fp32", False)]
    )
    rows = []
    for compiled in [True] if args.compile else [False]:
        for setting, fp32 in settings[:1] if compiled else settings:
            for checkpointing in [True, False] if args.checkpointing else [False]:
                steps = {}
                for name, config in configs(r, 4 if r >= 64 else 2, LINEARS).items():
                    model = adapt(base, config, fp32)
                    if checkpointing:
                        model.gradient_checkpointing_enable()
                    steps[name] = _training_step(model, tokens, fp32, device, compiled)
                timed = interleave(steps, device, args.rounds, args.repeats)
                for name, step in steps.items():
                    timed[name]["tokens_per_s"] = tokens.numel() / timed[name]["time_ms"] * 1e3
                    if device == "cuda":
                        timed[name]["peak_mib"] = peak_mib(step)
                        timed[name]["gpu_ms"] = gpu_ms(step)
                words = f"{batch[0]} x {batch[1]} tokens, r={r}, {setting}, {'compiled' if compiled else 'eager'}"
                words += ", gradient checkpointing" if checkpointing else ""
                rows += report(section, words, timed, next(iter(steps)))
                del steps
                gc.collect()
                torch._dynamo.reset()
    return rows


def model(args: argparse.Namespace) -> list[dict]:
    """A training step of a 1.24B Llama, all seven linears adapted, 4 x 2048 tokens."""
    return _train("model 1.24B", LLAMA_1B, (4, 2048), 64, args, "cuda")


def small(args: argparse.Namespace) -> list[dict]:
    """A training step of SmolLM2-135M's shape, where launches cost more than arithmetic."""
    return _train("SmolLM2-135M", SMOLLM2_135M, (4, 512), 32, args, "cuda")


def cpu(args: argparse.Namespace) -> list[dict]:
    """A training step of SmolLM2-135M's shape on the CPU."""
    return _train("SmolLM2-135M on CPU", SMOLLM2_135M, (2, 128), 32, args, "cpu")


def decode(args: argparse.Namespace) -> list[dict]:
    """Latency of one token through SmolLM2-135M's shape, adapter not merged."""
    base = _llama(SMOLLM2_135M, "cuda", BF16).eval()
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")

    def step_of(model: nn.Module) -> Callable[[], None]:
        def step() -> None:
            with torch.inference_mode():
                model(input_ids=token, use_cache=False)

        return step

    steps = {name: step_of(adapt(base, config, False).eval()) for name, config in configs(32, 2, LINEARS).items()}
    return report("decode", "1 token, SmolLM2-135M, r=32, bf16", interleave(steps, "cuda", args.rounds, 5), "frozen")


def merge(args: argparse.Namespace) -> list[dict]:
    """The delta weight of one 4096 -> 14336 layer, r=64, k=4, in float32, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = nn.Sequential(nn.Linear(4096, 14336, bias=False, device=device))
    layers = {
        name: adapt(base, config, True).base_model.model[0]
        for name, config in configs(64, 4, ["0"]).items()
        if config is not None
    }
    steps = {name: (lambda layer=layer: layer.get_delta_weight("default")) for name, layer in layers.items()}
    with torch.no_grad():
        timed = interleave(steps, device, 5, 1 if device == "cpu" else 10, warmup=1)
        if device == "cuda":
            for name, step in steps.items():
                before = torch.cuda.memory_allocated() / 2**20
                timed[name]["extra_mib"] = peak_mib(step) - before
    return report("merge", f"get_delta_weight, 4096->14336, r=64, k=4, {device}", timed, "PEFT GRALORA")


def plot(rows: list[dict], path: Path) -> None:
    """Bars of every method's ratio to the frozen base, one group a setting."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        if "ratio_to_frozen" in row and row["method"] != "frozen":
            ratios.setdefault(f"{row['section']}: {row['setting']}", {})[row["method"]] = row["ratio_to_frozen"]
    methods = [name for name in METHODS if any(name in row for row in ratios.values())]
    figure = Figure(figsize=(9, 1 + 0.45 * len(ratios)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(methods):
        places = [place + (i - (len(methods) - 1) / 2) * 0.27 for place in range(len(ratios))]
        axes.barh(places, [row.get(name, 0) for row in ratios.values()], 0.25, label=name)
    axes.set_yticks(range(len(ratios)), list(ratios), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0.9)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time, frozen base = 1")
    axes.legend(loc="lower right", fontsize=8)
    axes.margins(y=0.01)
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(path)


SECTIONS = {f.__name__: f for f in (linear, model, small, decode, merge, cpu)}


def environment() -> dict[str, object]:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    date, implementation = time.strftime("%Y-%m-%d"), dispatch.describe()
    return {"card": card, "host_us": round(host_us(), 1), "implementation": implementation, "date": date, **versions}


def host_us() -> float:
    """What a product of torch takes the host, microseconds: steps of many small operations wait for hosts."""
    x = torch.ones(16, 16, device="cuda" if torch.cuda.is_available() else "cpu")
    times = []
    for _ in range(200):
        start = time.perf_counter()
        torch.nn.functional.linear(x, x)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--compile", action="store_true", help="training steps under torch.compile instead of eager")
    parser.add_argument("--checkpointing", action="store_true", help="training steps also with gradient checkpointing")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="which methods to compare")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128], help="ranks of the section linear")
    parser.add_argument("--rounds", type=int, default=7, help="rounds over all methods")
    parser.add_argument("--repeats", type=int, default=2, help="training steps in a row in one round")
    parser.add_argument("--out", type=Path, help="write all rows as JSON")
    parser.add_argument("--plot", type=Path, help="draw the ratios to the frozen base")
    parser.add_argument("--rows", type=Path, nargs="+", default=[], help="earlier --out files, to be drawn too")
    args = parser.parse_args()
    if unknown := set(args.sections) - SECTIONS.keys():
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    METHODS[:] = args.methods
    earlier = [row for file in args.rows for row in json.loads(file.read_text())]
    facts = environment()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = [row | facts for section in args.sections for row in SECTIONS[section](args)]
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        plot(earlier + rows, args.plot)


if __name__ == "__main__":
    main()
