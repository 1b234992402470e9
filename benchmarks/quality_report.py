"""Tables, plots and a summary of the quality benchmark, from its results alone."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mpmath
from quality_plan import TUNING_SEED, Results
from quality_train import Cell

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's, two-sided, 1 to 9 degrees
TASKS = {
    "python": "Python source, held out by package",
    "python-800": "Python source, 800 training rows",
    "gsm8k": "GSM8K, loss on answers",
    "choice": "Multiple choice (OpenBookQA)",
}
NOTES = {
    "python": "6400 training rows of 512 tokens; a run reads 3200 of them, each once.",
    "python-800": "800 of the task's 6400 training rows, drawn at random, and the same test. A run reads each of them "
    "four times, where one on all rows reads 3200 once.",
    "gsm8k": "6309 training problems, in rows of 256 tokens, filled up; a run reads each once, 91 of them twice. "
    "Exact match: greedy answers of at most 192 tokens, adapters merged in bfloat16, on the 1098 of 1319 test "
    "problems that fit into such a row with their answer; right is one with the number after `####`.",
    "choice": "7208 training questions, in rows of 256 tokens, filled up; a run reads 6400 of them, each once. "
    "Accuracy: the likeliest of the four answers offered; chance is 0.25.",
}
SCORES = ("exact_match", "accuracy")  # the higher, the better


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

    def measured(self, key: str = "test_loss", lr: float | None = None) -> dict[int, float]:
        """Other seed -> what was measured, at the best or another learning rate; a diverged loss is infinite."""
        found = {seed: r.get(key) for seed, r in self.seeds_at(self.lr if lr is None else lr).items()}
        if key == "test_loss":
            return {seed: math.inf if value is None else value for seed, value in found.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def between(self) -> float | None:
        """How far the parabola through the best learning rate and its neighbours goes below the best."""
        lower, best, higher = (self.tuning.get(self.lr * factor, math.inf) for factor in (0.5, 1, 2))
        if not math.isfinite(lower + higher):
            return None
        return ((higher - lower) / 2) ** 2 / (2 * (lower + higher - 2 * best))

    @property
    def name(self) -> str:
        cell = self.cell
        if cell.method != "gralora" or cell.scale == 1:
            return cell.name
        plain = Cell(cell.task, cell.method, cell.r, cell.k, cell.hybrid_r)
        words = "matched" if matched(cell) else f"scaling x{cell.scale:.3g}"
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
    """Of what two methods reach, by seed; `half` of the mean's 95% interval is None for fewer than two pairs."""

    values: tuple[float, ...]
    higher_is_better: bool = False

    @property
    def pairs(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def half(self) -> float | None:
        return half_width(self.values)

    @property
    def p(self) -> float:
        """Of a mean this far from 0 if there were no difference, two-sided, by Student's distribution."""
        spread = statistics.stdev(self.values)
        if not spread:
            return 0.0 if self.mean else 1.0
        degrees = self.pairs - 1
        t = self.mean / spread * math.sqrt(self.pairs)
        return float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True))

    @property
    def verdict(self) -> str:
        if self.half is None:
            return "open"
        if abs(self.mean) <= self.half:
            return "tie"
        return "better" if (self.mean > 0) == self.higher_is_better else "worse"

    def __str__(self) -> str:
        return f"{self.mean:+.4f}{_plus_minus(self.half)}"


def holds_together(differences: list[Difference], level: float = 0.05) -> list[Difference]:
    """Those that are not 0 by Holm's test, which names any wrongly with at most this probability."""
    ordered = sorted(differences, key=lambda d: d.p)
    for number, d in enumerate(ordered):
        if d.p > level / (len(ordered) - number):
            return ordered[:number]
    return ordered


def difference(
    own: Runs, other: Runs, key: str = "test_loss", at: tuple[float | None, float | None] = (None, None)
) -> Difference | None:
    """How much higher `own` is than `other`, over the seeds that both were run with; None if there is no such seed.

    Args:
        at: the learning rate of each, None for its best.
    """
    a, b = (runs.measured(key, lr) for runs, lr in zip((own, other), at, strict=True))
    pairs = tuple(a[seed] - b[seed] for seed in a if seed in b)
    return Difference(pairs, key != "test_loss") if pairs else None


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95% interval of their mean, by Student's distribution; None if there are too few, or one diverged."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    t = T95[len(values) - 2] if len(values) - 2 < len(T95) else 1.96
    return t * statistics.stdev(values) / math.sqrt(len(values))


def _plus_minus(half: float | None) -> str:
    return "" if half is None else f" ± {half:.4f}"


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
    if unknown := {cell.task for cell in runs}.difference(TASKS):
        raise ValueError(f"no heading for the task {unknown.pop()!r} in TASKS; there are {', '.join(TASKS)}.")
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
        "between two worse ones (`edge`: not tried that far yet); the other seeds are run at that learning rate, and "
        "grids at LoRA's best too, and only they are in the means and intervals. A difference is to LoRA of the same "
        "rank (full fine-tuning, and a LoRA whose rank no grid has: LoRA r=64), paired by seed, with its 95% interval "
        "over seeds; a tie is an interval that contains 0. The intervals hold one by one, not all at once, and for "
        "these test rows; the summary says what holds all at once. `between`: how far below the best of its learning "
        "rates a parabola through it and its neighbours goes, for the tuning seed, which is too far where one "
        "neighbour is much worse; a difference that is no larger may come from the steps between learning rates.",
        "",
        "## Summary",
        "",
        *summary(runs, tasks),
    ]
    for task in tasks:
        before = []
        for key, words in (("start_loss", "the loss is"), *((f"start_{n}", n.replace("_", " ")) for n in SCORES)):
            known = [r[key] for own in runs.values() if own.cell.task == task for r in own.records if key in r]
            before += [f"{words} {statistics.median(known):.4f}"] if known else []
        before = [f"Before training {', '.join(before)}. {NOTES.get(task, '')}".strip(), ""] if before else []
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
    lines += ["", "## Amount of data", "", *fewer_rows(runs)]
    lines += ["", "## k and rank", "", *one_apart(runs)]
    lines += ["", "## Keeping LoRA's learning rate", "", *transfer(runs)]
    lines += ["", "## Size of the update", "", *sizes(runs)]
    text = "\n".join(lines) + "\n"
    out.write_text(text)
    return text


def summary(runs: dict[Cell, Runs], tasks: Iterable[str]) -> list[str]:
    """Where GraLoRA is better, ties and is worse: against LoRA of the same rank as a list, against others a table."""
    texts: dict[str, list[str]] = defaultdict(list)
    equal: list[tuple[str, Difference]] = []
    others: list[tuple[str, Difference]] = []
    rows = [["task", "GraLoRA", "against", "its parameters", "loss", "verdict", "score"]]
    for task in tasks:
        own = [r for cell, r in runs.items() if cell.task == task]
        for grid in sorted((r for r in own if r.cell.method == "gralora"), key=_order):
            for other in sorted((r for r in own if r.cell.method != "gralora"), key=_order):
                d = difference(grid, other)
                if d is None or not comparable(grid.cell, other.cell):
                    continue
                scores = ((key.replace("_", " "), difference(grid, other, key)) for key in SCORES)
                scores = [f"{key} {score}, {score.verdict}" for key, score in scores if score is not None]
                if other.cell.method == "lora" and other.cell.r == grid.cell.r:
                    seeds = f"{d.pairs} seeds" + ("" if d.half is None else f", p = {d.p:.2g}")
                    text = f"{TASKS[task]}: {grid.name} against {other.name}: **{d.verdict}**, {d} ({seeds})"
                    texts[d.verdict].append("; ".join([text, *scores]))
                    equal.append((f"{grid.name}, {task}", d))
                else:
                    more = other.records[0]["parameters"] / grid.records[0]["parameters"]
                    row = [task, grid.name, other.name, f"x{more:.1f}", f"{d} ({d.pairs})", d.verdict]
                    rows.append([*row, "; ".join(scores)])
                    others.append((f"{grid.name} against {other.name}, {task}", d))
    if not texts:
        return ["No cell has been run with more than the seed that chose its learning rate, so nothing is decided."]
    counts = ", ".join(f"{len(texts[verdict])} {verdict}" for verdict in ("better", "tie", "worse"))
    total = (
        "Held-out loss of GraLoRA against LoRA at equal trainable parameters, each at its own best learning rate: "
        f"{counts}. {_together(equal)}"
    )
    lines = [total, "", *(f"- {text}" for verdict in ("better", "tie", "worse", "open") for text in texts[verdict])]
    if len(rows) > 1:
        words = "Against rsLoRA, LoRA of the rank that dW has after export (hybrid_r + k * r_g), and full fine-tuning:"
        lines += ["", words, "", *_table(rows), "", _together(others)]
    return lines


def _together(named: list[tuple[str, Difference]]) -> str:
    known = [d for _, d in named if d.half is not None]
    words = "; ".join(name for held in holds_together(known) for name, d in named if d is held) or "none"
    return f"Still not 0 with all {len(known)} taken together, at 5% (Holm): {words}."


def comparable(grid: Cell, other: Cell) -> bool:
    """Whether the other method has the grid's parameters or its rank of dW, or is full fine-tuning."""
    export_rank = grid.hybrid_r + grid.k * (grid.r - grid.hybrid_r)
    return other.method == "full" or other.r == grid.r or (other.method == "lora" and other.r == export_rank)


def _order(own: Runs) -> tuple:
    cell = own.cell
    return cell.method == "full", cell.r, cell.method, cell.k, cell.hybrid_r, cell.scale, cell.start


def _table(rows: list[list[str]]) -> list[str]:
    """Markdown; the first row is the header."""
    return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def table(own: list[Runs], runs: dict[Cell, Runs]) -> list[str]:
    scores = [name for name in SCORES if any(o.measured(name) for o in own)]
    header = [
        "method",
        "trainable",
        "best lr",
        "loss, tuning seed",
        "between",
        "loss, other seeds",
        "to LoRA",
        "verdict",
    ]
    rows = [header + [word for name in scores for word in (name.replace("_", " "), "to LoRA")]]
    for o in sorted(own, key=_order):
        base = baseline(o.cell, runs)
        base = None if base is o else base
        d = base and difference(o, base)
        row = [
            o.name,
            f"{o.records[0]['parameters'] / 1e6:.1f} M",
            f"{o.lr:.3g}{'' if o.enclosed else ' (edge)'}",
            f"{o.tuning[o.lr]:.4f}",
            "" if o.between is None else f"-{o.between:.4f}",
            _mean(o.measured()),
            str(d or ""),
            d.verdict if d else "",
        ]
        for name in scores:
            score = base and difference(o, base, name)
            row += [_mean(o.measured(name)), f"{score}, {score.verdict}" if score else ""]
        rows.append(row)
    return _table(rows)


def _mean(values: dict[int, float]) -> str:
    if not values:
        return ""
    known = list(values.values())
    return f"{statistics.mean(known):.4f}{_plus_minus(half_width(known))} ({len(known)})"


def fewer_rows(runs: dict[Cell, Runs]) -> list[str]:
    """What fewer training rows do to the best learning rate, and what keeping it costs."""
    rows = [["task", "method", "best lr, all rows", "best lr", "loss", "loss at all rows' best lr"]]
    for cell, own in sorted(runs.items(), key=lambda item: (item[0].task, *_order(item[1]))):
        whole = runs.get(replace(cell, task=cell.task.rpartition("-")[0]))
        if whole is not None:
            near = min(own.tuning, key=lambda lr: abs(math.log(lr / whole.lr)))
            kept = f"{own.tuning[near]:.4f}" + ("" if near == whole.lr else f" at {near:.3g}, the nearest tried")
            rows.append([cell.task, own.name, f"{whole.lr:.3g}", f"{own.lr:.3g}", f"{own.tuning[own.lr]:.4f}", kept])
    if len(rows) == 1:
        return ["No method was run with all rows of a task and with fewer."]
    return ["Losses are of the seed that chooses the learning rate.", "", *_table(rows)]


def one_apart(runs: dict[Cell, Runs]) -> list[str]:
    """Methods that differ in k alone, and in rank alone."""
    rows = [["task", "method", "against", "loss", "verdict"]]
    known = [own for own in sorted(runs.values(), key=_order) if matched(own.cell) is not None]
    for own in known:
        for other in known:
            a, b = own.cell, other.cell
            rest = [(c.task, c.method, c.hybrid_r, matched(c)) for c in (a, b)]
            differ = (a.k > b.k and a.r == b.r) or (a.r > b.r and a.k == b.k)
            if rest[0] == rest[1] and differ and (d := difference(own, other)) is not None:
                rows.append([a.task, *(_with_rule(o) for o in (own, other)), f"{d} ({d.pairs})", d.verdict])
    if len(rows) == 1:
        return ["No two that differ in k or rank alone were run with more than the seed that chose the learning rate."]
    return [
        "Each at its own best learning rate. In brackets r / k^2, which the paper wants at about 8.",
        "",
        *_table(rows),
    ]


def _with_rule(own: Runs) -> str:
    cell = own.cell
    return own.name + (f" ({cell.r / cell.k**2:.3g})" if cell.method == "gralora" else "")


def matched(cell: Cell) -> bool | None:
    """Whether the scaling is gralora_scaling="matched"; None for another than that and lora_alpha / r."""
    if cell.scale == 1:
        return False
    met = cell.hybrid_r + (cell.r - cell.hybrid_r) / cell.k
    return True if math.isclose(cell.scale, math.sqrt(cell.r / met)) and cell.start == 1 else None


def transfer(runs: dict[Cell, Runs]) -> list[str]:
    """What the learning rate that is best for LoRA costs a grid, beside its own best, LoRA, and lora_alpha / r."""
    rows = [
        ["task", "method", "LoRA's best lr", "own", "loss with its own", "at LoRA's lr, to LoRA", "verdict"]
        + ["to lora_alpha / r", "verdict", "each at its own, to lora_alpha / r", "verdict"]
    ]
    for cell, own in sorted(runs.items(), key=lambda item: (item[0].task, *_order(item[1]))):
        base = baseline(cell, runs)
        if base is None or cell.method != "gralora" or base.lr not in own.tuning:
            continue
        plain = runs.get(replace(cell, scale=1.0, start=1.0))
        d = difference(own, base, at=(base.lr, base.lr))
        gains = [
            difference(own, plain, at=at) if plain and plain is not own else None
            for at in ((base.lr, base.lr), (None, None))
        ]
        row = [cell.task, own.name, f"{base.lr:.3g}", f"{own.lr:.3g}{'' if own.enclosed else ' (edge)'}"]
        row.append(f"{own.tuning[own.lr] - own.tuning[base.lr]:+.4f}")
        for one in (d, *gains):
            row += ["", ""] if one is None else [f"{one} ({one.pairs})", one.verdict]
        rows.append(row)
    if len(rows) == 1:
        return ["No grid was run at LoRA's best learning rate."]
    words = [
        '`matched` is gralora_scaling="matched", `scaling x` another factor on lora_alpha / r. `loss with its own`:',
        "the change with the grid's own best learning rate instead of LoRA's, for the seed that chooses. `at LoRA's",
        "lr`: the grid at LoRA's best learning rate against LoRA, over the other seeds. `to lora_alpha / r`: there,",
        "against the same grid with LoRA's scaling; then each of the two at its own best learning rate.",
    ]
    return [" ".join(words), "", *_table(rows)]


def sizes(runs: dict[Cell, Runs]) -> list[str]:
    """Root mean square of dW's entries, against LoRA's of the same rank, learning rate, seed and step."""
    steps = sorted({int(step) for own in runs.values() for r in own.records for step in r["update_rms"]})
    rows = [["task", "method", "pairs of runs", *(f"after {step}" for step in steps)]]
    for cell, own in sorted(runs.items(), key=lambda item: (item[0].task, *_order(item[1]))):
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
            rows.append([cell.task, own.name, str(len(pairs)), *ratios])
    if len(rows) == 1:
        return ["No grid was run at a learning rate and with a seed that LoRA was run with."]
    words = (
        "Root mean square of dW's entries over LoRA's of the same rank, learning rate and seed; median over pairs. "
        "What to expect is derived in [scaling](scaling.md)."
    )
    return [words, "", *_table(rows)]


def draw(task: str, runs: dict[Cell, Runs], path: Path) -> None:
    """Held-out loss of the tuning seed against learning rate: a panel for a rank and LoRA's scaling or others."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quality"  # the same file from the same results
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    import matplotlib.pyplot as plt

    own = sorted((r for c, r in runs.items() if c.task == task and c.method != "full"), key=_order)
    panels = [
        (rank, scaled)
        for rank in sorted({r.cell.r for r in own})
        for scaled in (False, True)
        if any(r.cell.r == rank and r.cell.method != "lora" and (r.cell.scale != 1) == scaled for r in own)
    ] or [(rank, False) for rank in sorted({r.cell.r for r in own})]
    rows = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(rows, 2, figsize=(10, 3.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (rank, scaled) in zip(axes.flat, panels, strict=False):
        here = [r for r in own if r.cell.r == rank]
        low = min(r.tuning[r.lr] for r in here)
        here = [r for r in here if r.cell.method == "lora" or (r.cell.scale != 1) == scaled]
        for r in here:
            points = [(lr, loss) for lr, loss in sorted(r.tuning.items()) if math.isfinite(loss)]
            style = {"lw": 3, "color": "black"} if r.cell.method == "lora" else {"lw": 1.3}
            label = r.name.replace(f" r={rank}", "")
            axis.plot(*zip(*points, strict=True), marker="o", ms=4, label=label, **style)
        rates = sorted({lr for r in here for lr in r.tuning})
        unscaled = "lora_alpha / r" + (", and rsLoRA" if any(r.cell.method == "rslora" for r in here) else "")
        title = f"r = {rank}, {'other scalings, and LoRA' if scaled else unscaled}"
        axis.set(xscale="log", xlabel="learning rate", ylabel="held-out loss", title=title)
        axis.set(ylim=(low - 0.004, low + 0.045))
        axis.set_xticks(rates, [f"{lr:.3g}" for lr in rates])
        axis.minorticks_off()
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
