"""Draws the figures of the documentation: `python docs/figures.py` writes docs/*.svg."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#b279a2"]
INK, PALE = "#333333", "#f2f2f2"


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
        box(ax, 5.0, y + 0.1, 0.9, 0.65, INK, f"$B_{i + 1}$")
        ax.annotate("", (6.3, y + 0.42), (5.9, y + 0.42), arrowprops={"arrowstyle": "->", "color": INK})
        box(ax, 6.3, y, 0.5, 0.85, INK, f"$y_{i + 1}$")
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


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "gralora"  # the same file at every run
    grid().savefig(Path(__file__).with_name("grid.svg"), metadata={"Date": None})
