"""Draws the figures that explain: `python -m docs.figures` writes docs/*.svg. Those of results: benchmarks/."""

from pathlib import Path

import torch
from benchmarks.pictures import INK, PALE, pyplot, save
from matplotlib.patches import Rectangle

from gralora import ops

plt = pyplot()
COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#b279a2"]
GREY, RED = "#6b7482", "#e5484d"


def box(ax, x, y, width, height, colour, text="", fontsize=9):
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1.5))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=fontsize, color="white")


def grid(k: int = 4) -> plt.Figure:
    """The factors, the exchange between them as a permutation, and the k x k grid of blocks that they make."""
    fig, ax = plt.subplots(figsize=(10, 3.6))
    step = 1.0
    for i in range(k):
        y = (k - 1 - i) * step
        box(ax, 0.0, y, 0.5, 0.85, COLOURS[i], f"$x_{i + 1}$")
        box(ax, 1.0, y + 0.1, 0.9, 0.65, COLOURS[i], f"$A_{i + 1}$")
        ax.annotate("", (1.0, y + 0.42), (0.5, y + 0.42), arrowprops={"arrowstyle": "->", "color": INK})
        for j in range(k):  # sub-rank j of h_i goes to place i of g_j
            part = 0.85 / k
            box(ax, 2.3, y + 0.85 - (j + 1) * part, 0.35, part, COLOURS[i])
            target = (k - 1 - j) * step + 0.85 - (i + 1) * part
            box(ax, 4.2, target, 0.35, part, COLOURS[i])
            ends = [y + 0.85 - (j + 0.5) * part, target + part / 2]
            ax.plot([2.67, 4.18], ends, color=COLOURS[i], linewidth=0.9, alpha=0.8)
        ax.annotate("", (2.3, y + 0.42), (1.9, y + 0.42), arrowprops={"arrowstyle": "->", "color": INK})
        ax.annotate("", (5.0, y + 0.42), (4.57, y + 0.42), arrowprops={"arrowstyle": "->", "color": INK})
        box(ax, 5.0, y + 0.1, 0.9, 0.65, GREY, f"$B_{i + 1}$")
        ax.annotate("", (6.3, y + 0.42), (5.9, y + 0.42), arrowprops={"arrowstyle": "->", "color": INK})
        box(ax, 6.3, y, 0.5, 0.85, GREY, f"$y_{i + 1}$")
    for j in range(k):
        for i in range(k):
            product = f"$B_{j + 1}[{i + 1}]A_{i + 1}[{j + 1}]$"
            box(ax, 8.2 + i * 0.95, (k - 1 - j) * step, 0.93, 0.96, COLOURS[i], product, fontsize=7)
    captions = {0.25: "input\nchunks", 1.45: "down", 3.4: "exchange of\nsub-ranks", 5.45: "up", 6.55: "output\nchunks"}
    captions[8.2 + k * 0.475] = f"the update dW: {k} x {k} blocks of rank r/{k}, all filled"
    for x, text in captions.items():
        ax.text(x, -0.25, text, ha="center", va="top", fontsize=9, color=INK)
    ax.set(xlim=(-0.1, 12.1), ylim=(-0.9, 4.05))
    ax.set_aspect("equal")
    ax.axis("off")
    fig.tight_layout(pad=0.2)
    return fig


def exchange(k: int = 4) -> plt.Figure:
    """The exchange as a transposition of a table of sub-ranks, and as a permutation matrix."""
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.4))
    titles = (
        "after A: row i is h of input chunk i",
        "exchanged: row j is g of output block j",
        "the same as a permutation of k x k parts",
    )
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=9, color=INK)
        ax.set_aspect("equal")
        ax.axis("off")
    for row in range(k):
        for column in range(k):
            y = k - 1 - row
            box(axes[0], column, y, 1, 1, COLOURS[row], f"$h_{row + 1}[{column + 1}]$")
            box(axes[1], column, y, 1, 1, COLOURS[column], f"$h_{column + 1}[{row + 1}]$")
    for ax in axes[:2]:
        ax.set(xlim=(-0.1, k + 0.1), ylim=(-0.1, k + 0.1))
    size = k * k
    axes[2].add_patch(Rectangle((0, 0), size, size, facecolor=PALE))
    for i in range(k):
        for j in range(k):  # part j of h_i, column i k + j, goes to place i of g_j, row j k + i
            axes[2].add_patch(Rectangle((i * k + j, size - 1 - (j * k + i)), 1, 1, facecolor=COLOURS[i]))
    for line in range(k + 1):
        axes[2].plot([line * k, line * k], [0, size], color="white", linewidth=1)
        axes[2].plot([0, size], [line * k, line * k], color="white", linewidth=1)
    axes[2].text(size / 2, -0.6, "parts of h, chunk by chunk", ha="center", va="top", fontsize=8, color=INK)
    axes[2].text(-0.6, size / 2, "parts of g", ha="right", va="center", rotation=90, fontsize=8, color=INK)
    axes[2].set(xlim=(-2, size + 0.5), ylim=(-2, size + 0.5))
    fig.subplots_adjust(left=0.02, right=0.98, top=0.92, bottom=0.02, wspace=0.08)
    return fig


def rank(size: int = 192, r: int = 16) -> plt.Figure:
    """Singular values of random updates of one parameter count, computed: the rank of dW is k * r."""
    fig, ax = plt.subplots(figsize=(7, 3.4))
    generator = torch.Generator().manual_seed(0)
    for k, colour in zip((1, 2, 4, 8), COLOURS, strict=True):
        A = torch.randn(k, size // k, r, generator=generator, dtype=torch.float64) / (size / k) ** 0.5
        B = torch.randn(k, r, size // k, generator=generator, dtype=torch.float64) / r**0.5
        values = torch.linalg.svdvals(ops.delta_weight(A, B, 1.0))
        number = int((values > values[0] * 1e-10).sum())
        ax.plot(range(1, number + 1), values[:number], color=colour, label=f"{_name(k)}: rank {number}")
        ax.plot([number, number], [0, values[number - 1]], color=colour, linestyle=":", linewidth=1)
    ax.set(xlabel="index of the singular value", ylabel="singular value of dW", ylim=(0, None), xlim=(0, size))
    ax.set_title(f"{size} x {size}, r = {r}, {2 * r * size} parameters each, random factors", fontsize=9, color=INK)
    ax.legend(frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout(pad=0.4)
    return fig


def _name(k: int) -> str:
    return "LoRA" if k == 1 else f"GraLoRA, k = {k}"


STAGES = [  # of a forward pass: what, where, what it does
    (
        "config",
        "config.py",
        "LoraConfig(use_gralora=True):\nfields and checks; from here on\nPEFT does its usual work",
    ),
    (
        "layer",
        "inject.py, layers.py, blocks.py",
        "PEFT's LoRA layer, promoted;\nlora_A, lora_B hold the grid's\nfactors; fused path or PEFT's?",
    ),
    (
        "op",
        "ops/__init__.py, fused.py",
        "gralora_linear, add_update:\ny = x W' + g B,\ng = exchange(x A); gradients alike",
    ),
    (
        "kernel",
        "ops/kernels.py, hopper.py",
        "Triton on a GPU, Hopper's own\nproduct where it is one; else\ntorch's batched products",
    ),
]


def forward() -> plt.Figure:
    """One forward pass through the four floors of the package."""
    fig, ax = plt.subplots(figsize=(10, 2.4))
    for place, (name, where, what) in enumerate(STAGES):
        x = place * 2.6
        ax.add_patch(Rectangle((x, 0), 2.25, 1.9, facecolor=PALE, edgecolor="none"))
        box(ax, x, 1.5, 2.25, 0.4, COLOURS[place], name, fontsize=10)
        ax.text(x + 1.125, 1.27, where, ha="center", va="center", fontsize=8, color=COLOURS[place])
        ax.text(x + 1.125, 0.58, what, ha="center", va="center", fontsize=8, color=INK, linespacing=1.4)
        if place:
            ax.annotate("", (x - 0.03, 0.95), (x - 0.32, 0.95), arrowprops={"arrowstyle": "->", "color": INK})
    ax.text(
        1 * 2.6 + 1.125,
        -0.12,
        "no (hooks, aLoRA, mixed dtypes): PEFT's forward computes\n"
        "base_layer(x) + lora_B(lora_A(dropout(x))) * scaling, with the same factors",
        ha="center",
        va="top",
        fontsize=8,
        color=INK,
    )
    ax.set(xlim=(-0.05, 10.1), ylim=(-0.6, 1.95))
    ax.axis("off")
    fig.tight_layout(pad=0.2)
    return fig


def update(k: int = 4) -> plt.Figure:
    """LoRA's update beside GraLoRA's, with the blocks that an outlier in one input channel reaches."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 2.75))
    thin, side = 0.55, 3.0  # of factors, of dW
    where = 1  # the outlier's chunk
    for ax, parts, method in zip(axes, (1, k), ("LoRA", "GraLoRA"), strict=True):
        size, colours = side / parts, [COLOURS[1]] * 1 if parts == 1 else COLOURS
        for i in range(parts):  # A above dW, chunk by chunk of the input; B beside it, of the output
            box(ax, i * size, side + 0.35, size - 0.04, thin, colours[i], f"$A_{i + 1}$" if parts > 1 else "$A$")
            up = (parts - 1 - i) * size
            box(ax, -0.35 - thin, up, thin, size - 0.04, GREY, f"$B_{i + 1}$" if parts > 1 else "$B$")
            for j in range(parts):
                box(ax, i * size, (parts - 1 - j) * size, size - 0.04, size - 0.04, colours[i])
        reached = (0, side) if parts == 1 else (where * size, size)
        frame = (reached[0] - 0.03, -0.05), reached[1] + 0.02, side + 0.06
        ax.add_patch(Rectangle(*frame, facecolor="none", edgecolor=RED, linewidth=2))
        channel = where * side / k + 0.3
        ax.annotate("", (channel, side + 0.93), (channel, side + 1.4), arrowprops={"arrowstyle": "->", "color": RED})
        ax.text(channel + 0.12, side + 1.2, "an outlier channel", fontsize=11, color=RED, va="center")
        facts = ["one product B A", "rank r", "r (in + out) parameters", "outlier: in all of dW"]
        if parts > 1:
            reach = f"outlier: in {k} of {k * k} blocks"
            facts = [f"{k} x {k} products", f"rank up to {k} r", "r (in + out) parameters", reach]
        ax.text(side + 0.35, side - 0.1, method, fontsize=13, weight="bold", color=INK, va="top")
        ax.text(side + 0.35, side - 0.75, "\n".join(facts), fontsize=11, color=INK, va="top", linespacing=1.7)
        ax.set(xlim=(-1.1, 7.0), ylim=(-0.2, side + 1.55))
        ax.set_aspect("equal")
        ax.axis("off")
    fig.subplots_adjust(left=0, right=1, top=1, bottom=0, wspace=0.02)
    return fig


FIGURES = {"update": update, "grid": grid, "exchange": exchange, "rank": rank, "forward": forward}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        save(draw(), Path(__file__).with_name(f"{name}.svg"))
