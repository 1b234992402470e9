"""One run of the quality benchmark: a method, a learning rate and a seed on a task; held-out loss at the end.

On a GPU a whole training step, optimizer included, is one CUDA graph: a model this small otherwise waits for its
launches. The graph reads rows and learning rate by a step counter that it raises itself, so a run is a replay of it,
and runs of one method that differ in seed and learning rate share it.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

import gralora

from .data import Task, gsm8k_number
from .generate import Generator
from .starts import adapted

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEW_TOKENS = 192  # of a generated answer; 99% of GSM8K's have fewer
POINTS = 40  # of a learning curve
SIZES_AT = (1, 10, 50)  # steps after which the size of the update is noted, and after the last


@dataclass(frozen=True)
class Cell:
    """What is compared: a method with all its settings but the learning rate.

    Attributes:
        method: lora, rslora, gralora (with hybrid_r > 0 the hybrid) or full.
        r: total rank; 0 for full fine-tuning.
        scale: factor on lora_alpha / r, which is 1 (rsLoRA: on lora_alpha / sqrt(r), lora_alpha = r).
        start: factor on the initial entries of A.
        init: of PEFT's `init_lora_weights`; empty for its default. All seeds then start from the same factors.
        ratio: the learning rate of B over that of A, as in LoRA+ (arXiv 2402.12354).
        optimizer: "muon" is LoRA-Muon (arXiv 2606.12921); empty for AdamW.
    """

    task: str
    method: str
    r: int = 0
    k: int = 1
    hybrid_r: int = 0
    scale: float = 1.0
    start: float = 1.0
    init: str = ""
    ratio: float = 1.0
    optimizer: str = ""

    @property
    def name(self) -> str:
        if self.method == "full":
            return "full fine-tuning"
        words = {"lora": "LoRA", "rslora": "rsLoRA", "gralora": f"GraLoRA k={self.k}"}[self.method]
        words += f" hybrid_r={self.hybrid_r}" if self.hybrid_r else ""
        words += f" scaling x{self.scale:.3g}" if self.scale != 1 else ""
        words += f" A x{self.start:.3g}" if self.start != 1 else ""
        words += f" {self.init}" if self.init else ""
        words += f" LoRA+ x{self.ratio:.3g}" if self.ratio != 1 else ""
        words += f" {self.optimizer}" if self.optimizer else ""
        return f"{words} r={self.r}"

    def config(self) -> peft.LoraConfig:
        """All linears of the decoder layers, no dropout."""
        fields = {"r": self.r, "lora_alpha": self.r * self.scale, "target_modules": LINEARS}
        if self.method == "gralora":
            return gralora.LoraConfig(use_gralora=True, gralora_k=self.k, hybrid_r=self.hybrid_r, **fields)
        return peft.LoraConfig(use_rslora=self.method == "rslora", **fields)


@dataclass(frozen=True)
class Job:
    cell: Cell
    lr: float
    seed: int
    steps: int
    tokens_per_step: int

    @property
    def key(self) -> dict[str, Any]:
        """What identifies the run in the results."""
        return asdict(self.cell) | {name: value for name, value in asdict(self).items() if name != "cell"}


class Trainer:
    """The model of one cell, on one device, and its training step; `run` trains it anew for every job."""

    def __init__(self, model: nn.Module, cell: Cell, task: Task, steps: int, tokens_per_step: int, launch: str):
        """Adapt `model`, a causal LM of the Llama family in float32, which the trainer then owns.

        Args:
            launch: "eager", "graph" (a step is one CUDA graph) or "compiled" (that, of compiled layers).
        """
        self.cell, self.task, self.steps, self.launch = cell, task, steps, launch
        self.device = next(model.parameters()).device
        self.cuda = self.device.type == "cuda"
        if cell.method == "full":
            self.lm = model
            self.start = [p.detach().clone() for p in model.parameters()]
        else:
            self.lm = adapted(model.requires_grad_(False), cell, torch.from_numpy(task.train_tokens.astype(np.int64)))
            for p in self.lm.parameters():  # not the rotary frequencies, which are a buffer
                if not p.requires_grad:
                    p.data = p.data.to(torch.bfloat16 if self.cuda else torch.float32)
        self.decoder = self.lm.model.train()
        self.layers: list[Callable[..., Tensor]] = list(self.decoder.layers)
        self.row_loss: Callable[..., Tensor] = row_loss
        if launch == "compiled":
            torch._dynamo.reset()
            self.layers = [torch.compile(layer, dynamic=False) for layer in self.layers]
            self.row_loss = torch.compile(row_loss, dynamic=False)
        self.trainable = [p for p in self.lm.parameters() if p.requires_grad]
        for p in self.trainable:
            p.data = p.data.float()
        if cell.init:
            self.start = [p.detach().clone() for p in self.trainable]
        self.adapted = [m for m in self.lm.modules() if isinstance(m, LoraLayer)]

        length = task.train_tokens.shape[1] - 1
        self.batch = tokens_per_step // length
        self.tokens, self.mask = self._place(task.train_tokens), self._place(task.train_mask)
        self.test_tokens, self.test_mask = self._place(task.test_tokens), self._place(task.test_mask)
        # the operands of the captured steps; they change in place only
        self.order = torch.zeros(steps, self.batch, dtype=torch.long, device=self.device)
        self.lrs, self.losses = (torch.zeros(steps, device=self.device) for _ in range(2))
        self.count = torch.zeros(1, dtype=torch.long, device=self.device)
        self.test_rows = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        self.rates: list[tuple[Tensor, float]] = []
        self.optimizer = self._muon() if cell.optimizer == "muon" else self._adamw()
        self.before: dict[str, float | None] = {}
        self.generator: Generator | None = None
        self.train_step, self.test_step = self._train_step, self._test_step
        if launch != "eager":
            self._capture()

    def _muon(self) -> torch.optim.Optimizer:
        if self.launch != "eager":
            raise ValueError("LoRA-Muon's eigenvalue decompositions cannot be captured: --launch eager.")
        return gralora.create_muon_optimizer(self.lm, lr=0.0)

    def _adamw(self) -> torch.optim.Optimizer:
        ratio = self.cell.ratio
        of_B = {id(p) for layer in self.adapted for p in layer.lora_B.parameters()} if ratio != 1 else set()
        groups = [([p for p in self.trainable if id(p) not in of_B], 1.0)]
        groups += [([p for p in self.trainable if id(p) in of_B], ratio)] if of_B else []
        self.rates = [(torch.zeros((), device=self.device), factor) for _, factor in groups]
        return torch.optim.AdamW(
            [{"params": members, "lr": lr} for (members, _), (lr, _) in zip(groups, self.rates, strict=True)],
            weight_decay=0.0,
            fused=True,
            capturable=self.cuda,
        )

    def _place(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64 if array.dtype == np.uint16 else bool)).to(self.device)

    def _autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if self.cuda else nullcontext()

    def row_losses(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Sum of the tokens' losses, one number a row; every row begins a text and is causal, so nothing is masked."""
        with self._autocast():
            x = self.decoder.embed_tokens(tokens[:, :-1])
            positions = torch.arange(x.shape[1], device=self.device)[None]
            rotary = self.decoder.rotary_emb(x, positions)
            for layer in self.layers:
                x = layer(x, attention_mask=None, position_embeddings=rotary, use_cache=False)
            return self.row_loss(self.decoder.norm(x), self.lm.lm_head.weight, tokens[:, 1:], mask[:, 1:])

    def _train_step(self) -> None:
        rows = self.order.index_select(0, self.count)[0]
        mask = self.mask[rows]
        loss = self.row_losses(self.tokens[rows], mask).sum() / mask[:, 1:].sum()
        for p, gradient in zip(self.trainable, torch.autograd.grad(loss, self.trainable), strict=True):
            p.grad = gradient.contiguous()  # a fused AdamW reads memory in the parameter's order
        self.losses.index_copy_(0, self.count, loss.detach()[None])
        for lr, factor in self.rates:
            lr.copy_(self.lrs.index_select(0, self.count)[0] * factor)
        if not self.rates:  # LoRA-Muon's, which is never captured
            self.optimizer.param_groups[0]["lr"] = self.lrs[self.count].item()
        self.optimizer.step()
        self.count += 1

    def _test_step(self) -> Tensor:
        # with gradients recorded and dropped: what is compiled and captured for training serves here too
        return self.row_losses(self.test_tokens[self.test_rows], self.test_mask[self.test_rows]).detach()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, tunes and allocates before anything is captured
            for _ in range(2):
                self._train_step()
            self._test_step()
        torch.cuda.current_stream().wait_stream(stream)
        self.count.zero_()
        train, test = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(train):
            self._train_step()
        with torch.cuda.graph(test, pool=train.pool()):
            result = self._test_step()

        def test_step() -> Tensor:
            test.replay()
            return result.clone()

        self.train_step, self.test_step = train.replay, test_step

    @torch.no_grad()
    def reset(self, lr: float, seed: int) -> None:
        """Back to the start: adapters as PEFT initialises them, from this seed; rows in this seed's order."""
        generator = torch.Generator(self.device).manual_seed(seed)
        if self.cell.method == "full" or self.cell.init:
            for p, start in zip(self.trainable, self.start, strict=True):
                p.copy_(start)
        else:
            for layer in self.adapted:
                # PEFT's default, kaiming_uniform_ with a = sqrt(5); A is [r, in], or a grid's [k, in/k, r]
                for p in layer.lora_A.parameters():
                    fan_in = p.shape[1]
                    bound = self.cell.start / math.sqrt(fan_in)
                    p.uniform_(-bound, bound, generator=generator)
                for p in layer.lora_B.parameters():
                    p.zero_()
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.count.zero_()
        rng = np.random.default_rng(seed)  # the same on every device and for every method
        wanted = self.steps * self.batch
        epochs = math.ceil(wanted / len(self.tokens))
        order = np.concatenate([rng.permutation(len(self.tokens)) for _ in range(epochs)])[:wanted]
        self.order.copy_(torch.from_numpy(order).view(self.steps, self.batch))
        self.lrs.copy_(torch.tensor([lr * schedule(step, self.steps) for step in range(self.steps)]))

    def run(self, job: Job, exact_match: tuple[Any, int] | None = None, evals: int = 1) -> dict[str, Any]:
        """Train and test.

        Args:
            evals: how often to test, at equal distances; the last time is after the last step.
            exact_match: on GSM8K, the tokenizer and on how many test problems to generate answers.

        Returns:
            test_loss (held out, nats a token), for some tasks accuracy or exact_match, each also before training
            (start_loss, ...); test_curve (steps -> held-out loss on the way); train_loss (mean of the last tenth),
            curve (of each fortieth), update_rms (steps -> root mean square of dW's entries, mean over layers),
            parameters, seconds. Losses are None where the run diverged.
        """
        start = time.perf_counter()
        self.reset(job.lr, job.seed)
        wanted = exact_match if self.task.name == "gsm8k" else None
        if not self.before:
            self.before = self.test()
        if wanted and "exact_match" not in self.before:
            self.before["exact_match"] = self.exact_match(*wanted)
        sizes: dict[int, float] = {}
        on_the_way: dict[int, float | None] = {}
        test_after = {self.steps * number // evals for number in range(1, evals)}
        for step in range(1, self.steps + 1):
            self.train_step()
            if step in SIZES_AT or step == self.steps:
                sizes[step] = self.update_rms()
            if step in test_after:
                on_the_way[step] = self.test()["test_loss"]
        results = {
            "test_loss": None,
            "test_curve": {str(step): loss for step, loss in on_the_way.items()},
            "train_loss": _finite(self.losses[-max(self.steps // 10, 1) :].mean().item()),
            "curve": [_finite(part.mean().item()) for part in self.losses.tensor_split(min(POINTS, self.steps))],
            "update_rms": {str(step): _finite(size) for step, size in sizes.items()},
            "parameters": sum(p.numel() for p in self.trainable),
            "train_s": time.perf_counter() - start,
        }
        results |= {f"start_{name.removeprefix('test_')}": value for name, value in self.before.items()} | self.test()
        if wanted and results["test_loss"] is not None:
            results["exact_match"] = self.exact_match(*wanted)
        return results | {"wall_s": time.perf_counter() - start}

    @torch.no_grad()
    def update_rms(self) -> float:
        if self.cell.method == "full":
            changes = [
                p - start
                for (name, p), start in zip(self.lm.named_parameters(), self.start, strict=True)
                if name.split(".")[-2] in LINEARS
            ]
        else:
            changes = [layer.get_delta_weight("default") for layer in self.adapted]
        return torch.stack([change.float().square().mean().sqrt() for change in changes]).mean().item()

    def test(self) -> dict[str, float | None]:
        rows = len(self.test_tokens)
        losses = []
        for first in range(0, rows, self.batch):
            # the last batch is filled up with row 0, which is dropped again
            chosen = torch.arange(first, first + self.batch, device=self.device)
            self.test_rows.copy_(torch.where(chosen < rows, chosen, 0))
            losses.append(self.test_step())
        loss = torch.cat(losses)[:rows].double().cpu().numpy()
        counts = self.task.test_mask[:, 1:].sum(axis=1)
        right, question = self.task.test_right, self.task.test_question
        if right is None:
            return {"test_loss": _finite(loss.sum() / counts.sum())}
        results = {"test_loss": _finite(loss[right].sum() / counts[right].sum()), "accuracy": None}
        if results["test_loss"] is not None:  # the likeliest candidate of each question
            best = {q: int(np.argmin(np.where(question == q, loss, np.inf))) for q in set(question.tolist())}
            results["accuracy"] = float(np.mean([right[row] for row in best.values()]))
        return results

    def exact_match(self, tokenizer: Any, problems: int) -> float:
        """Share of test problems whose generated answer, greedy, ends in the right number."""
        if self.generator is None:  # for the first job of several
            first = self.task.test_mask[:problems].argmax(axis=1)
            prompts = [row[:n].tolist() for row, n in zip(self.task.test_tokens, first, strict=False)]
            end = int(self.task.test_tokens[0][self.task.test_mask[0]][-1])  # what training put after an answer
            self.generator = Generator(self.lm, prompts, NEW_TOKENS, end)
        replies = tokenizer.batch_decode(self.generator())
        truths = [tokenizer.decode(row[m]) for row, m in zip(self.task.test_tokens, self.task.test_mask, strict=True)]
        hits = [gsm8k_number(r) == gsm8k_number(t) for r, t in zip(replies, truths, strict=False)]
        return sum(hits) / len(hits)


def row_loss(x: Tensor, head: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy summed over the tokens of each row that count, `[rows]`, float32."""
    logits = F.linear(x, head).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return (losses * mask).sum(dim=1)


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up over a twentieth of the steps, then a cosine to zero."""
    warmup = max(steps // 20, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
