"""The plots of the quality page: held-out loss by learning rate."""

import math
from pathlib import Path

from .stats import Runs, order
from .train import Cell


def draw(task: str, runs: dict[Cell, Runs], path: Path) -> None:
    """Held-out loss of the tuning seed against learning rate: a panel for a rank and LoRA's scaling or others."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quality"  # the same file from the same results
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    import matplotlib.pyplot as plt

    own = sorted((r for c, r in runs.items() if c.task == task and c.method != "full"), key=order)
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
