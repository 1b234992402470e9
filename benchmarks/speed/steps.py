"""Sections that measure whole training steps: forward, backward and AdamW on the adapters of a Llama."""

import argparse
import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate.utils import compile_regions
from torch import Tensor, nn

import gralora

from . import exact, programs
from .methods import LINEARS, UNSLOTH, Method, methods_of
from .report import Row, report
from .timing import interleave, measure

BF16, FP32 = torch.bfloat16, torch.float32
LLAMA_1B = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
LLAMA_1B |= dict(num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True)
SMOLLM2_135M = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
SMOLLM2_135M |= dict(num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
TINY |= dict(num_key_value_heads=2, vocab_size=256, tie_word_embeddings=True)


# How models are compiled: modes of torch.compile, or each block alone, as accelerate's "regional compilation" does.
COMPILED: Mapping[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "default": torch.compile,
    "reduce-overhead": functools.partial(torch.compile, mode="reduce-overhead"),  # CUDA graphs
    "blocks": compile_regions,
}


def _words(compiled: str | None) -> str:
    """As in tables, of a key of COMPILED."""
    if compiled is None:
        return "eager"
    return "compiled" if compiled == "default" else f"compiled ({compiled})"


def llama(shape: Mapping[str, object], device: str, dtype: torch.dtype) -> nn.Module:
    """A Llama with random weights, the same at every call, in training mode."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape), dtype=dtype)
    return model.train()


@dataclass(frozen=True)
class Setting:
    """How a step is run.

    Attributes:
        words: as in tables.
        fp32_adapters: adapters in float32 and a forward under autocast, as PEFT's default is; else all in one dtype.
        compiled: one of COMPILED, or None for eager mode.
    """

    words: str
    fp32_adapters: bool
    checkpointing: bool
    compiled: str | None
    device: str


class TrainingStep:
    """A training step of a model; the frozen base takes gradients to its embeddings' output."""

    def __init__(self, model: nn.Module, tokens: Tensor, setting: Setting) -> None:
        self.model, self.tokens, self.setting = model, tokens, setting
        trainable = [p for p in model.parameters() if p.requires_grad]
        fused = setting.device == "cuda"
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=fused) if trainable else None
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        if setting.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.forward = COMPILED[setting.compiled](model) if setting.compiled else model

    def _dtypes(self) -> AbstractContextManager[object]:
        return torch.autocast(self.setting.device, BF16) if self.setting.fp32_adapters else nullcontext()

    def describe(self) -> str:
        """How many of the model's adapted layers run which way."""
        with self._dtypes():
            return gralora.describe(self.model)

    def backward(self) -> Tensor:
        """Forward and backward; returns the loss."""
        if self.setting.compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # whose results may overwrite those of the step before
        with self._dtypes():
            loss = self.forward(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        return loss.detach().clone()

    def __call__(self) -> None:
        self.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def outcome(self) -> exact.Outcome:
        """The loss and the gradients of the factors, before any update."""
        loss = self.backward()
        found = {"loss": [loss]} | exact.named_gradients(self.model)
        self.model.zero_grad()
        return found


def train(
    section: str, plain: nn.Module, base: nn.Module, tokens: Tensor, methods: list[Method], setting: Setting, args
) -> list[Row]:
    """Compare the steps of several methods: first with the float64 reference, then in time and memory.

    Args:
        plain: the base model before it was quantised or patched, for the reference.
        base: what the methods adapt.
        tokens: `[batch, length]`.
    """
    steps, found = {}, {}
    for method in methods:
        model = method.adapt(base, setting.fp32_adapters)
        steps[method.name] = TrainingStep(model, tokens, setting)
        own, wanted = steps[method.name].outcome(), exact.exact_loss(plain, model, tokens)
        found[method.name] = {"loss": float(own["loss"][0]), "exact_loss": float(wanted["loss"][0])}
        found[method.name]["layers"] = steps[method.name].describe()
        found[method.name]["errors"] = exact.errors_of(own, wanted)
        del own, wanted
        gc.collect()
    dtype = BF16 if setting.device == "cuda" else FP32
    exact.check({name: own["errors"] for name, own in found.items()}, dtype)
    timed = measure(steps, setting.device, args.rounds, args.repeats)
    for name, row in timed.items():
        errors = found[name].pop("errors")
        row |= found[name] | {"tokens_per_s": tokens.numel() / row["time_ms"] * 1e3}
        row |= {f"error_{kind}": error for kind, error in errors.items()}
        row["error"] = max((error for kind, error in errors.items() if kind != "loss"), default=errors["loss"])
    rows = report(section, setting.words, timed, methods[0].name, checkpointing=setting.checkpointing)
    del steps
    gc.collect()
    torch._dynamo.reset()
    return rows


def _sections(
    section: str,
    shape: Mapping[str, object],
    batch: tuple[int, int],
    r: int,
    args: argparse.Namespace,
    names: list[str] | None = None,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    checkpointing: tuple[bool, ...] = (False,),
) -> Iterator[Row]:
    """The rows of `train` in each of the settings that the arguments ask for, table by table."""
    batch = args.batch or batch
    if args.tiny:
        section, shape, batch, r = f"{section}, tiny", TINY, (2, 16), 8
    dtype = BF16 if args.device == "cuda" else FP32
    plain = llama(shape, args.device, dtype)
    base = prepare(plain) if prepare else plain
    tokens = torch.randint(0, shape["vocab_size"], batch, device=args.device)
    names = [name for name in args.methods if name in (names or args.methods)]
    patches = {UNSLOTH: programs.unsloth(args.unsloth)} if UNSLOTH in names else {}
    methods = methods_of(names, r, 4 if r >= 64 else 2, LINEARS, patches)
    settings = [("bf16 adapters", False), ("fp32 adapters + autocast", True)] if dtype is BF16 else [("fp32", False)]
    for words, fp32 in settings[:1] if args.compile else settings:
        for checkpoints in sorted({*checkpointing, *([True] if args.checkpointing else [])}):
            text = f"{batch[0]} x {batch[1]} tokens, r={r}, {words}, {_words(args.compile)}"
            text += ", gradient checkpointing" if checkpoints else ""
            setting = Setting(text, fp32, checkpoints, args.compile, args.device)
            chosen = [m for m in methods if not (m.name == UNSLOTH and args.compile)]
            yield from train(section, plain, base, tokens, chosen, setting, args)


def model(args: argparse.Namespace) -> Iterator[Row]:
    """A step of a 1.24B Llama in bf16, all seven linears adapted, 4 x 2048 tokens."""
    return _sections("model 1.24B", LLAMA_1B, (4, 2048), 64, args)


def short(args: argparse.Namespace) -> Iterator[Row]:
    """The same of 1 x 512 tokens, which waits for the host."""
    return _sections("model 1.24B", LLAMA_1B, (1, 512), 64, args)


def nf4(args: argparse.Namespace) -> Iterator[Row]:
    """The same over weights of 4 bits (bitsandbytes nf4, nested statistics), with and without checkpointing."""
    names = [name for name in args.methods if name != "PEFT GRALORA"]  # which takes no quantised layers
    return _sections(
        "model 1.24B, nf4", LLAMA_1B, (4, 2048), 64, args, names, programs.quantize_nf4, checkpointing=(False, True)
    )


def liger(args: argparse.Namespace) -> Iterator[Row]:
    """The same with Liger's kernels for the rest of the model, from a wheel given by --liger."""
    with programs.liger(args.liger) as prepare:
        yield from _sections(
            "model 1.24B, Liger", LLAMA_1B, (4, 2048), 64, args, None, prepare, checkpointing=(False, True)
        )


def small(args: argparse.Namespace) -> Iterator[Row]:
    """A step of SmolLM2-135M's shape, where launches cost more than arithmetic."""
    return _sections("SmolLM2-135M", SMOLLM2_135M, (4, 512) if args.device == "cuda" else (2, 128), 32, args)


def decode(args: argparse.Namespace) -> list[Row]:
    """Latency of one token through SmolLM2-135M's shape, adapter not merged; compared with the reference first."""
    shape, r = (TINY, 8) if args.tiny else (SMOLLM2_135M, 32)
    base = llama(shape, args.device, BF16 if args.device == "cuda" else FP32).eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=args.device)
    steps, errors = {}, {}
    for method in methods_of([name for name in args.methods if name != UNSLOTH], r, 2, LINEARS):
        adapted = method.adapt(base, False).eval()

        def step(adapted: nn.Module = adapted) -> Tensor:
            with torch.inference_mode():
                return adapted(input_ids=token, use_cache=False).logits

        steps[method.name] = step
        with torch.inference_mode():
            wanted = exact.exact_model(base, adapted).eval()(input_ids=token, use_cache=False).logits
        errors[method.name] = exact.errors_of({"y": [step()]}, {"y": [wanted]})
    exact.check(errors, next(base.parameters()).dtype)
    timed = interleave(steps, args.device, args.rounds, 5)
    return report("decode", f"1 token, SmolLM2-135M, r={r}", timed, next(iter(steps)))
