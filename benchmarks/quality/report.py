"""Tables and a summary of the quality benchmark, from its results alone."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .figures import draw, forest, ranks
from .plan import TUNING_SEED, Results
from .stats import (
    SCORES,
    Difference,
    Runs,
    baseline,
    collect,
    difference,
    half_width,
    holds_together,
    matched,
    order,
    plus_minus,
)
from .train import Cell

TASKS = {
    "python": "Python source, held out by package",
    "python-800": "Python source, 800 training rows",
    "source": "Python source, much of it",
    "source-24000": "Python source, much of it",
    "docs": "Documentation of Python packages",
    "gsm8k": "GSM8K, loss on answers",
    "choice": "Multiple choice (OpenBookQA)",
}
NOTES = {
    "python": "6400 training rows of 512 tokens; a run reads 3200 of them, each once.",
    "python-800": "800 of the task's 6400 training rows, drawn at random, and the same test. A run reads each of them "
    "four times, where one on all rows reads 3200 once.",
    "source": "52000 training rows of 512 tokens, 26.6 million, of packages on PyPI; each is read once.",
    "source-24000": "24000 training rows of 512 tokens, 12.3 million, drawn from 52000 of packages on PyPI; a run "
    "reads 12800 of them, each once.",
    "docs": "6000 training rows of 512 tokens, of the documentation of packages on PyPI.",
    "gsm8k": "6309 training problems, in rows of 256 tokens, filled up; a run reads each once, 91 of them twice. "
    "Exact match: greedy answers of at most 192 tokens, adapters merged in bfloat16, on the 1098 of 1319 test "
    "problems that fit into such a row with their answer; right is one with the number after `####`.",
    "choice": "7208 training questions, in rows of 256 tokens, filled up; a run reads 6400 of them, each once. "
    "Accuracy: the likeliest of the four answers offered; chance is 0.25.",
}

METHOD = (
    "- **Training.** Adapters of all linear layers, in float32 (on a GPU under bf16 autocast), no dropout, "
    "lora_alpha = r, AdamW without weight decay, warm-up over 5% of the steps, then a cosine to zero. With one seed "
    "all methods see the same rows in the same order.",
    "- **Learning rates.** A method's is the best, with one seed, of 1e-3 times powers of two, tried until it lies "
    "between two worse ones (`edge`: not tried that far yet). The other seeds are run at that learning rate, and "
    "grids at LoRA's best too. Only they are in the means and intervals.",
    "- **Differences** are to LoRA of the same rank (for full fine-tuning, and for a LoRA whose rank no grid has: to "
    "LoRA r=64), paired by seed, with a 95% interval over seeds by Student's distribution. A tie is an interval that "
    "contains 0. The intervals hold one by one, not all at once, and for these test rows; the summary says what holds "
    "all at once.",
    "- **Between** says how far below the best of its learning rates a parabola through it and its neighbours goes, "
    "for the tuning seed. That is too far where one neighbour is much worse. A difference that is no larger may come "
    "from the steps between learning rates.",
)


def write(results: Results, out: Path) -> str:
    """The Markdown report, which is also written to `out`, with plots beside it."""
    runs = collect(results)
    tasks = [task for task in TASKS if any(cell.task == task for cell in runs)]
    if unknown := {cell.task for cell in runs}.difference(TASKS):
        raise ValueError(f"no heading for the task {unknown.pop()!r} in TASKS; there are {', '.join(TASKS)}.")
    lines = [
        "# Quality at equal parameters",
        "",
        "Made by `python -m benchmarks.quality report` from the results in `benchmarks/results/`; do not edit.",
        "",
        "What to do is in [choosing k, hybrid_r and the learning rate](choosing.md); here is what was measured.",
        "",
        *what_was_run(runs),
        "",
        *METHOD,
        "",
        "## Summary",
        "",
        *summary(runs, tasks, out.with_name(f"{out.stem}.svg")),
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
        by_rank = out.with_name(f"{out.stem}-{task}-rank.svg")
        if ranks(task, runs, by_rank):
            caption = (
                "*Each at its own best learning rate, with the seed that chooses it; hollow where no worse rate was "
                "tried on one side. GraLoRA has k = 2 at r = 16, else 4.*"
            )
            lines += ["", f"![Held-out loss by rank]({by_rank.name})", "", caption]
        lines += on_the_way([own for own in runs.values() if own.cell.task == task])
        plot = out.with_name(f"{out.stem}-{task}.svg")
        draw(task, runs, plot)
        caption = "*With the seed that chooses the learning rate; what is far above the best loss is cut off.*"
        lines += ["", f"![Held-out loss by learning rate]({plot.name})", "", caption]
    lines += ["", "## Amount of data", "", *fewer_rows(runs)]
    lines += ["", "## k and rank", "", *one_apart(runs)]
    lines += ["", "## Keeping LoRA's learning rate", "", *transfer(runs)]
    lines += ["", "## How wide the good learning rates are", "", *widths(runs)]
    lines += ["", "## Size of the update", "", *sizes(runs)]
    text = "\n".join(lines) + "\n"
    out.write_text(text)
    return text


def what_was_run(runs: dict[Cell, Runs]) -> list[str]:
    """A sentence for each number of steps: how many runs, of what, on which machines and with which versions."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for own in runs.values():
        for record in own.records:
            groups[own.steps, record["tokens_per_step"]].append(record)
    sentences = []
    for (steps, tokens), records in sorted(groups.items(), key=lambda item: -math.prod(item[0])):
        tasks = sorted({TASKS[record["task"]] for record in records}, key=list(TASKS.values()).index)
        facts = {
            name: ", ".join(dict.fromkeys(str(record[name]) for record in records))
            for name in ("card", "torch", "peft", "transformers")
        }
        sentences.append(
            f"- {len(records)} runs of {steps} steps of {tokens} tokens ({steps * tokens / 1e6:.2f} million): "
            f"{'; '.join(tasks)}. On {facts['card']}, torch {facts['torch']}, peft {facts['peft']}, transformers "
            f"{facts['transformers']}."
        )
    return sentences


def summary(runs: dict[Cell, Runs], tasks: Iterable[str], plot: Path) -> list[str]:
    """Where GraLoRA is better, ties and is worse: against LoRA of the same rank as a list, against others a table."""
    texts: dict[str, list[str]] = defaultdict(list)
    equal: list[tuple[str, Difference]] = []
    others: list[tuple[str, Difference]] = []
    rows = [["task", "GraLoRA", "against", "its parameters", "loss", "verdict", "score"]]
    for task in tasks:
        own = [r for cell, r in runs.items() if cell.task == task]
        for grid in sorted((r for r in own if r.cell.method == "gralora"), key=order):
            for other in sorted((r for r in own if r.cell.method != "gralora"), key=order):
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
    drawn = [(name, d) for name, d in equal if d.half is not None]
    picture = []
    if drawn:
        forest(drawn, plot)
        caption = "*Left of the line GraLoRA's loss is lower. An interval that contains 0 is a tie.*"
        picture = ["", f"![Differences in held-out loss with their intervals]({plot.name})", "", caption]
    lines = [
        total,
        *picture,
        "",
        *(f"- {text}" for verdict in ("better", "tie", "worse", "open") for text in texts[verdict]),
    ]
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
    for o in sorted(own, key=order):
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
    return f"{statistics.mean(known):.4f}{plus_minus(half_width(known))} ({len(known)})"


def on_the_way(own: list[Runs]) -> list[str]:
    """Held-out losses during training, at the best learning rate, of the seed that chooses it."""
    rows = []
    for runs in sorted(own, key=order):
        record = next(r for r in runs.records if r["lr"] == runs.lr and r["seed"] == TUNING_SEED)
        if curve := record.get("test_curve"):
            steps = sorted(curve, key=int)
            rows.append([runs.name, *("" if curve[s] is None else f"{curve[s]:.4f}" for s in steps)])
            rows[-1].append(f"{runs.tuning[runs.lr]:.4f}")
    if not rows:
        return []
    head = ["method", *(f"after {step} steps" for step in steps), "at the end"]
    return ["", "Learning curves, held out, of the seed that chooses the learning rate:", "", *_table([head, *rows])]


def fewer_rows(runs: dict[Cell, Runs]) -> list[str]:
    """What fewer training rows do to the best learning rate, and what keeping it costs."""
    rows = [["task", "method", "best lr, all rows", "best lr", "loss", "loss at all rows' best lr"]]
    for cell, own in sorted(runs.items(), key=lambda item: (item[0].task, *order(item[1]))):
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
    known = [own for own in sorted(runs.values(), key=order) if matched(own.cell) is not None]
    for own in known:
        for other in known:
            a, b = own.cell, other.cell
            rest = [(c.task, c.method, c.hybrid_r, c.init, c.ratio, c.optimizer, matched(c)) for c in (a, b)]
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


def transfer(runs: dict[Cell, Runs]) -> list[str]:
    """What the learning rate that is best for LoRA costs a grid, beside its own best, LoRA, and lora_alpha / r."""
    rows = [
        ["task", "method", "LoRA's best lr", "own", "loss with its own", "at LoRA's lr, to LoRA", "verdict"]
        + ["to lora_alpha / r", "verdict", "each at its own, to lora_alpha / r", "verdict"]
    ]
    for cell, own in sorted(runs.items(), key=lambda item: (item[0].task, *order(item[1]))):
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


def widths(runs: dict[Cell, Runs]) -> list[str]:
    """The range of learning rates whose loss is within 1% of a method's best, for the seed that chooses."""
    rows = [["task", "method", "best lr", "from", "to", "factor"]]
    for _, own in sorted(runs.items(), key=lambda item: (item[0].task, *order(item[1]))):
        low, high = own.good_rates()
        factor = "" if low is None or high is None else f"{high / low:.1f}"
        ends = [
            f"{end:.3g}" if end is not None else f"{tried:.3g} or {word}"
            for end, tried, word in ((low, min(own.tuning), "less"), (high, max(own.tuning), "more"))
        ]
        rows.append([own.cell.task, own.name, f"{own.lr:.3g}", *ends, factor])
    words = (
        "Learning rates whose held-out loss is at most 1% above the method's best, between those tried by "
        "interpolation in the logarithm of the rate; `or less` and `or more` where all that were tried are."
    )
    return [words, "", *_table(rows)]


def sizes(runs: dict[Cell, Runs]) -> list[str]:
    """Root mean square of dW's entries, against LoRA's of the same rank, learning rate, seed and step."""
    steps = sorted({int(step) for own in runs.values() for r in own.records for step in r["update_rms"]})
    rows = [["task", "method", "pairs of runs", *(f"after {step}" for step in steps)]]
    for cell, own in sorted(runs.items(), key=lambda item: (item[0].task, *order(item[1]))):
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
        "What to expect is derived in [the scaling](gralora.md#scaling)."
    )
    return [words, "", *_table(rows)]
