"""Tables, plots and a summary of the quality benchmark, from its results alone."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from quality_plan import TUNING_SEED, Results
from quality_train import Cell

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's, two-sided, 1 to 9 degrees
TASKS = {
    "python": "Python source, held out by package",
    "gsm8k": "GSM8K, loss on answers",
    "choice": "Multiple choice (OpenBookQA)",
}


@dataclass
class Runs:
    """What was measured of one cell with one number of steps.

    Attributes:
        tuning: learning rate -> held-out loss of the seed that chooses; infinite where it diverged.
    """

    cell: Cell
    steps: int
    tuning: dict[float, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def lr(self) -> float:
        return min(self.tuning, key=self.tuning.__getitem__)

    @property
    def enclosed(self) -> bool:
        """Whether a lower and a higher learning rate than the best were tried."""
        return min(self.tuning) < self.lr < max(self.tuning)

    def seeds_at(self, lr: float) -> dict[int, dict[str, Any]]:
        """Other seed -> record, at a learning rate."""
        at_lr = [r for r in self.records if math.isclose(r["lr"], lr) and r["seed"] != TUNING_SEED]
        return {r["seed"]: r for r in sorted(at_lr, key=lambda r: r["seed"])}

    @property
    def seeds(self) -> dict[int, dict[str, Any]]:
        """Other seed -> record, at the best learning rate."""
        return self.seeds_at(self.lr)

    @property
    def losses(self) -> dict[int, float]:
        return {seed: _loss(record) for seed, record in self.seeds.items()}

    @property
    def name(self) -> str:
        cell = self.cell
        if cell.method != "gralora" or cell.scale == 1:
            return cell.name
        met = cell.hybrid_r + (cell.r - cell.hybrid_r) / cell.k
        words = f"scaling x{cell.scale:.3g}"
        if math.isclose(cell.scale, math.sqrt(cell.r / met)):
            words = "matched"
        plain = Cell(cell.task, cell.method, cell.r, cell.k, cell.hybrid_r)
        return f"{plain.name}, {words}" + (f", A x{cell.start:.3g}" if cell.start != 1 else "")


def _loss(record: dict[str, Any]) -> float:
    return math.inf if record["test_loss"] is None else record["test_loss"]


def collect(results: Results) -> dict[Cell, Runs]:
    """The runs by cell, of the number of steps that most were made with."""
    by_steps: dict[tuple[int, int], list] = defaultdict(list)
    for record in results:
        by_steps[record["steps"], record["tokens_per_step"]].append(record)
    (steps, _), records = max(by_steps.items(), key=lambda item: len(item[1]))
    runs: dict[Cell, Runs] = {}
    for record in records:
        cell = Cell(**{f.name: record[f.name] for f in fields(Cell)})
        own = runs.setdefault(cell, Runs(cell, steps))
        own.records.append(record)
        if record["seed"] == TUNING_SEED:
            own.tuning[record["lr"]] = _loss(record)
    return {cell: own for cell, own in runs.items() if own.tuning}


@dataclass(frozen=True)
class Difference:
    """Of held-out losses, paired by seed, with its 95% interval; `half` is None for fewer than two pairs."""

    mean: float
    half: float | None
    pairs: int

    @property
    def verdict(self) -> str:
        if self.half is None:
            return "open"
        if abs(self.mean) <= self.half:
            return "tie"
        return "better" if self.mean < 0 else "worse"

    def __str__(self) -> str:
        interval = "" if self.half is None else f" ± {self.half:.4f}"
        return f"{self.mean:+.4f}{interval}"


def difference(own: Runs, other: Runs, lr: float | None = None) -> Difference | None:
    """How much higher `own`'s loss is, at its best or another learning rate, over the seeds that both were run with.

    Returns None if there is no such seed.
    """
    losses = {seed: _loss(record) for seed, record in own.seeds_at(own.lr if lr is None else lr).items()}
    pairs = [losses[seed] - other.losses[seed] for seed in losses if seed in other.losses]
    if not pairs:
        return None
    return Difference(statistics.mean(pairs), half_width(pairs), len(pairs))


def half_width(values: list[float]) -> float | None:
    """Of the 95% interval of their mean, by Student's distribution; None if there are too few, or one diverged."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    t = T95[len(values) - 2] if len(values) - 2 < len(T95) else 1.96
    return t * statistics.stdev(values) / math.sqrt(len(values))


def baseline(cell: Cell, runs: dict[Cell, Runs]) -> Runs | None:
    """The LoRA that a cell is compared with: of the same rank; for other ranks than the grids', of the lowest."""
    loras = sorted((c for c in runs if c.task == cell.task and c.method == "lora"), key=lambda c: c.r)
    grids = {c.r for c in runs if c.task == cell.task and c.method == "gralora"}
    same = [c for c in loras if c.r == cell.r and c.r in grids]
    if same:
        return runs[same[0]]
    usual = [c for c in loras if c.r == 64] or loras
    return runs[usual[0]] if usual else None


def write(results: Results, out: Path) -> str:
    """The Markdown report, which is also written to `out`, with plots beside it."""
    runs = collect(results)
    some = next(iter(results))
    tasks = [task for task in TASKS if any(cell.task == task for cell in runs)]
    steps, tokens = next(iter(runs.values())).steps, some["tokens_per_step"]
    made = sum(len(own.records) for own in runs.values())
    lines = [
        "# Quality at equal parameters",
        "",
        "Made by `benchmarks/quality.py report` from the results in `benchmarks/results/`; do not edit.",
        "",
        f"{made} runs of {steps} steps of {tokens} tokens ({steps * tokens / 1e6:.2f} million), on {some['card']}, "
        f"torch {some['torch']}, peft {some['peft']}, transformers {some['transformers']}. Adapters of all linear "
        "layers, in float32 (on a GPU under bf16 autocast), no dropout, lora_alpha = r, AdamW without weight decay, "
        "warm-up over 5% of the steps, then a cosine to zero. For one seed all methods see the same rows in the same "
        "order. A method's learning rate is the best, for one seed, of 1e-3 times powers of two, tried until it lies "
        "between two worse ones; the other seeds are run at that learning rate alone, and only they are in the means "
        "and intervals. A difference is to LoRA of the same rank (full fine-tuning, and a LoRA whose rank no grid "
        "has: LoRA r=64), paired by seed, with its 95% interval; a tie is an interval that contains 0. The intervals "
        "hold one by one, not all at once.",
        "",
        "## Summary",
        "",
        *summary(runs, tasks),
    ]
    for task in tasks:
        starts = [
            r["start_loss"] for own in runs.values() if own.cell.task == task for r in own.records if "start_loss" in r
        ]
        before = [f"Before training the loss is {statistics.median(starts):.4f}.", ""] if starts else []
        lines += [
            "",
            f"## {TASKS[task]}",
            "",
            *before,
            *table([own for own in runs.values() if own.cell.task == task], runs),
        ]
        plot = out.with_name(f"{out.stem}-{task}.svg")
        draw(task, runs, plot)
        lines += ["", f"![Held-out loss by learning rate]({plot.name})"]
    lines += ["", "## Keeping LoRA's learning rate", "", *transfer(runs)]
    lines += ["", "## Size of the update", "", *sizes(runs)]
    text = "\n".join(lines) + "\n"
    out.write_text(text)
    return text


def summary(runs: dict[Cell, Runs], tasks: Iterable[str]) -> list[str]:
    """One line for every GraLoRA against each other method of its task and rank, by verdict."""
    lines = []
    for task in tasks:
        own = [r for cell, r in runs.items() if cell.task == task]
        grids = [r for r in own if r.cell.method == "gralora"]
        others = [r for r in own if r.cell.method != "gralora"]
        for grid in grids:
            for other in others:
                if other.cell.method in ("lora", "rslora") and other.cell.r < grid.cell.r:
                    continue
                if other.cell.r > grid.cell.r and any(c.r == other.cell.r for c in runs if c.method == "gralora"):
                    continue
                d = difference(grid, other)
                if d is not None:
                    lines.append(
                        (task, d, f"{grid.name} against {other.name}: **{d.verdict}**, {d} ({d.pairs} seeds)")
                    )
    if not lines:
        return ["No cell has been run with more than the seed that chose its learning rate, so nothing is decided."]
    decided = [d.verdict for _, d, _ in lines if d.half is not None]
    counts = ", ".join(f"{decided.count(verdict)} {verdict}" for verdict in ("better", "tie", "worse"))
    total = (
        f"Of {len(decided)} comparisons of a grid with another method, each at its own best learning rate: {counts}."
    )
    return [total, "", *(f"- {TASKS[task]}: {text}" for task, _, text in lines)]


def table(own: list[Runs], runs: dict[Cell, Runs]) -> list[str]:
    extras = [name for name in ("accuracy", "exact_match") if any(name in r for o in own for r in o.seeds.values())]
    header = [
        "method",
        "trainable",
        "best lr",
        "loss, tuning seed",
        "loss, other seeds",
        "to LoRA",
        "verdict",
        *extras,
    ]
    rows = [header, ["---"] * len(header)]
    for o in sorted(own, key=lambda o: (o.cell.method == "full", o.cell.r, o.cell.method, o.cell.k, o.cell.scale)):
        base = baseline(o.cell, runs)
        d = None if base is None or base is o else difference(o, base)
        losses = list(o.losses.values())
        half = half_width(losses)
        mean = f"{statistics.mean(losses):.4f}" if losses else ""
        mean += "" if half is None else f" ± {half:.4f}"
        rows.append(
            [
                o.name,
                f"{o.records[0]['parameters'] / 1e6:.1f} M",
                f"{o.lr:.3g}{'' if o.enclosed else ' (edge)'}",
                f"{o.tuning[o.lr]:.4f}",
                mean + (f" ({len(losses)})" if losses else ""),
                "" if d is None else str(d),
                "" if d is None else d.verdict,
                *[_mean([r.get(name) for r in o.seeds.values()]) for name in extras],
            ]
        )
    return [f"| {' | '.join(row)} |" for row in rows]


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3f}" if known else ""


def transfer(runs: dict[Cell, Runs]) -> list[str]:
    """What the learning rate that is best for LoRA costs a grid, beside its own best and beside LoRA."""
    header = ["method", "LoRA's best lr", "own", "loss with its own", "at LoRA's lr, to LoRA", "verdict"]
    rows = [header, ["---"] * len(header)]
    for cell, own in runs.items():
        base = baseline(cell, runs)
        if base is None or cell.method != "gralora" or base.lr not in own.tuning:
            continue
        d = difference(own, base, base.lr)
        rows.append(
            [
                f"{own.name}{'' if cell.task == 'python' else ', ' + cell.task}",
                f"{base.lr:.3g}",
                f"{own.lr:.3g}{'' if own.enclosed else ' (edge)'}",
                f"{own.tuning[own.lr] - own.tuning[base.lr]:+.4f}",
                "" if d is None else f"{d} ({d.pairs})",
                "" if d is None else d.verdict,
            ]
        )
    if len(rows) == 2:
        return ["No grid was run at LoRA's best learning rate."]
    words = (
        '`matched` is gralora_scaling="matched", `scaling x` another factor on lora_alpha / r. `loss with its own`: '
    )
    words += (
        "the change with the grid's own best learning rate instead of LoRA's, for the seed that chooses. `at LoRA's "
    )
    words += "lr`: the grid at LoRA's best learning rate against LoRA, over the other seeds."
    return [words, "", *(f"| {' | '.join(row)} |" for row in rows)]


def sizes(runs: dict[Cell, Runs]) -> list[str]:
    """Root mean square of dW's entries, against LoRA's of the same rank, learning rate, seed and step."""
    steps = sorted({int(step) for own in runs.values() for r in own.records for step in r["update_rms"]})
    rows = [["method", "pairs of runs", *(f"after {step}" for step in steps)], ["---"] * (len(steps) + 2)]
    for cell, own in runs.items():
        base = baseline(cell, runs)
        if base is None or cell.method not in ("gralora", "rslora"):
            continue
        theirs = {(r["lr"], r["seed"]): r["update_rms"] for r in base.records}
        pairs = [(r["update_rms"], theirs[r["lr"], r["seed"]]) for r in own.records if (r["lr"], r["seed"]) in theirs]
        ratios = []
        for step in map(str, steps):
            known = [a[step] / b[step] for a, b in pairs if a.get(step) and b.get(step)]
            ratios.append(f"{statistics.median(known):.3f}" if known else "")
        if pairs:
            rows.append([f"{own.name}, {cell.task}", str(len(pairs)), *ratios])
    if len(rows) == 2:
        return ["No grid was run at a learning rate and with a seed that LoRA was run with."]
    words = (
        "Root mean square of dW's entries over LoRA's of the same rank, learning rate and seed; median over pairs. "
    )
    return [words + "docs/scaling.md derives what to expect.", "", *(f"| {' | '.join(row)} |" for row in rows)]


def draw(task: str, runs: dict[Cell, Runs], path: Path) -> None:
    """Held-out loss against learning rate: a row of panels a rank, with LoRA's scaling on the left, others right."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quality"  # the same file from the same results
    import matplotlib.pyplot as plt

    own = sorted((r for c, r in runs.items() if c.task == task and c.method != "full"), key=lambda r: r.name)
    ranks = sorted({r.cell.r for r in own if r.cell.method == "gralora"}) or sorted({r.cell.r for r in own})
    figure, axes = plt.subplots(len(ranks), 2, figsize=(10, 3.8 * len(ranks)), squeeze=False, layout="constrained")
    for row, rank in zip(axes, ranks, strict=True):
        here = [r for r in own if r.cell.r == rank]
        low = min(r.tuning[r.lr] for r in here)
        rates = sorted({lr for r in here for lr in r.tuning})
        for axis, title, scaled in zip(
            row, ("lora_alpha / r", "other scalings, and LoRA"), (False, True), strict=True
        ):
            for r in here:
                if r.cell.method == "lora" or (r.cell.scale != 1) == scaled:
                    points = [(lr, loss) for lr, loss in sorted(r.tuning.items()) if math.isfinite(loss)]
                    style = {"lw": 3, "color": "black"} if r.cell.method == "lora" else {"lw": 1.3}
                    axis.plot(*zip(*points, strict=True), marker="o", ms=4, label=r.name, **style)
            axis.set(xscale="log", xlabel="learning rate", ylabel="held-out loss", title=f"r = {rank}, {title}")
            axis.set(ylim=(low - 0.004, low + 0.045))
            axis.set_xticks(rates, [f"{lr:.3g}" for lr in rates])
            axis.minorticks_off()
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
