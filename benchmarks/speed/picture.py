"""Draws docs/speed.svg from benchmarks/results: `python -m benchmarks.speed.picture`."""

import json
from pathlib import Path

from benchmarks.pictures import pyplot, save

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SETTING = "4 x 2048 tokens, r=64, fp32 adapters + autocast, eager"  # PEFT's default dtypes
GROUPS = (  # label, file, whether with gradient checkpointing
    ("QLoRA: 4-bit base", "nf4-h200.json", False),
    ("the same,\ncheckpointing", "nf4-h200.json", True),
    ("bf16 base", "unsloth-h200.json", False),
    ("bf16 base,\nLiger's kernels", "liger-h200.json", False),
    ("the same,\ncheckpointing", "liger-h200.json", True),
)
COLOURS = {"PEFT LoRA": "#b9bec6", "Unsloth": "#f58512", "gralora": "#2a6fdb"}


def added(file: str, checkpointing: bool) -> dict[str, float]:
    """Method -> percent of the frozen base's time that it adds."""
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    wanted = SETTING + (", gradient checkpointing" if checkpointing else "")
    return {row["method"]: 100 * (row["ratio_to_frozen"] - 1) for row in rows if row["setting"] == wanted}


def draw(path: Path) -> None:
    plt = pyplot()
    plt.rcParams["font.size"] = 10.5
    figure, axes = plt.subplots(figsize=(7.5, 3.9), layout="constrained")
    height = 0.27
    for group, (_, file, checkpointing) in enumerate(GROUPS):
        percent = added(file, checkpointing)
        for n, (method, colour) in enumerate(COLOURS.items()):
            y = group + (n - 1) * height
            axes.barh(y, percent[method], height * 0.92, color=colour, label=method if group == 0 else None)
            bold = "bold" if method == "gralora" else "normal"
            axes.text(percent[method] + 0.8, y, f"+{percent[method]:.0f}%", va="center", weight=bold)
    axes.set_yticks(range(len(GROUPS)), [label for label, _, _ in GROUPS])
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title("Time that adapters add to a training step (less is better)", loc="left")
    axes.legend(frameon=False, loc="upper right")
    save(figure, path)


if __name__ == "__main__":
    draw(ROOT / "docs" / "speed.svg")
