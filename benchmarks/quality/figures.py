"""The plots of the quality page: differences, held-out loss by rank, and by learning rate."""

import math
from pathlib import Path
from typing import Any

from benchmarks.pictures import INK, pyplot, save

from .stats import Difference, Runs, matched, order
from .train import Cell


def forest(named: list[tuple[str, Difference]], path: Path) -> None:
    """Differences with their 95% intervals below each other: left of the line the loss is lower."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.5, 1 + 0.32 * len(named)), layout="constrained")
    colours = {"better": "#2a7f3f", "tie": "#8a9099", "worse": "#b3372f"}
    for place, (_, difference) in enumerate(named):
        axis.errorbar(difference.mean, place, xerr=difference.half, fmt="o", ms=5, color=colours[difference.verdict])
        axis.text(1.01, place, difference.verdict, transform=axis.get_yaxis_transform(), va="center", fontsize=10)
    axis.set_yticks(range(len(named)), [name for name, _ in named], fontsize=10)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("held-out loss: GraLoRA's minus LoRA's (95% interval over seeds)")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    save(figure, path)
    plt.close(figure)


def ranks(task: str, runs: dict[Cell, Runs], path: Path) -> bool:
    """Held-out loss of the tuning seed against rank, a line for each method at its own best learning rates.

    A grid is drawn with k = 2 below r = 64 and k = 4 from there on, full fine-tuning as a level. A point is hollow
    where the best learning rate does not lie between two worse ones yet.

    Returns:
        Whether there are two ranks of a method, so something to draw.
    """
    lines: dict[str, dict[int, Runs]] = {}
    for cell, own in runs.items():
        usual = not (cell.init or cell.hybrid_r or cell.optimizer) and cell.ratio == 1 and cell.method != "full"
        if cell.task != task or not usual or (cell.method == "gralora" and cell.k != (2 if cell.r < 64 else 4)):
            continue
        if cell.method == "gralora":
            name = {True: "GraLoRA, matched", False: "GraLoRA, lora_alpha / r"}.get(matched(cell))
        else:
            name = {"lora": "LoRA", "rslora": "rsLoRA"}[cell.method]
        if name:
            lines.setdefault(name, {})[cell.r] = own
    if not any(len(line) > 1 for line in lines.values()):
        return False
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, line in sorted(lines.items(), key=lambda item: item[0] != "LoRA"):
        style: dict[str, Any] = {"lw": 3, "color": INK, "zorder": 1} if name == "LoRA" else {"lw": 1.8}
        points = [(r, own.tuning[own.lr]) for r, own in sorted(line.items())]
        (drawn,) = axis.plot(*zip(*points, strict=True), "o-", label=name, **style)
        for point, (_, own) in zip(points, sorted(line.items()), strict=True):
            if not own.enclosed:
                axis.plot(*point, "o", markerfacecolor="white", markeredgecolor=drawn.get_color(), zorder=5)
    for own in runs.values():
        if own.cell.task == task and own.cell.method == "full":
            axis.axhline(own.tuning[own.lr], color="#8a9099", linestyle="--", label="full fine-tuning")
    every = sorted({r for line in lines.values() for r in line})
    axis.set(xscale="log", xlabel="rank r, so trainable parameters", ylabel="held-out loss")
    axis.set_xticks(every, [str(r) for r in every])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    save(figure, path)
    plt.close(figure)
    return True


def draw(task: str, runs: dict[Cell, Runs], path: Path) -> None:
    """Held-out loss of the tuning seed against learning rate: a panel for a rank and LoRA's scaling or others."""
    plt = pyplot()
    own = sorted((r for c, r in runs.items() if c.task == task and c.method != "full"), key=order)
    panels = [
        (rank, scaled)
        for rank in sorted({r.cell.r for r in own})
        for scaled in (False, True)
        if any(r.cell.r == rank and r.cell.method != "lora" and (r.cell.scale != 1) == scaled for r in own)
    ] or [(rank, False) for rank in sorted({r.cell.r for r in own})]
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (rank, scaled) in zip(axes.flat, panels, strict=False):
        here = [r for r in own if r.cell.r == rank]
        low = min(r.tuning[r.lr] for r in here)
        here = [r for r in here if r.cell.method == "lora" or (r.cell.scale != 1) == scaled]
        for r in here:
            points = [(lr, loss) for lr, loss in sorted(r.tuning.items()) if math.isfinite(loss)]
            style: dict[str, Any] = {"lw": 3, "color": INK, "zorder": 1} if r.cell.method == "lora" else {"lw": 1.3}
            label = r.name.replace(f" r={rank}", "")
            if len(points) == 1:
                label = f"{label} (one rate)"
                style |= {"marker": "D", "ms": 7, "zorder": 5}
            elif not any(loss < low + 0.045 for _, loss in points):
                label = f"{label} (above the picture)"
            axis.plot(*zip(*points, strict=True), label=label, **{"marker": "o", "ms": 4} | style)
        rates = sorted({lr for r in here for lr in r.tuning})
        unscaled = "lora_alpha / r" + (", and rsLoRA" if any(r.cell.method == "rslora" for r in here) else "")
        title = f"r = {rank}, {'other scalings, and LoRA' if scaled else unscaled}"
        axis.set(xscale="log", xlabel="learning rate", ylabel="held-out loss", title=title)
        highest = max(loss for r in here for loss in r.tuning.values() if math.isfinite(loss))
        axis.set(ylim=(low - 0.004, min(highest + 0.004, low + 0.045)))
        axis.set_xticks(rates, [f"{lr:.3g}" for lr in rates])
        axis.minorticks_off()
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
        axis.grid(alpha=0.3)
    save(figure, path)
    plt.close(figure)
