"""Pictures of an adapter's updates, as PNG files: of all layers in one heat map, or block by block."""

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..factors import block_norms
from . import formats
from .files import new_file, read_adapter_folder
from .inspection import natural

PANELS = 16  # most layers of which the blocks are drawn in one picture


def place_of(layer: str) -> tuple[str, int]:
    """A layer's kind and depth: its name after the first number in it, with * for further ones, and that number.

    A layer without a number, as an output layer, is a kind of its own, of depth 0.
    """
    parts = layer.removeprefix("model.").split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if first is None:
        return ".".join(parts), 0
    kind = ["*" if part.isdigit() else part for part in parts[first + 1 :]]
    before = [part for part in parts[:first] if part not in ("layers", "h", "blocks")]
    return ".".join(before + kind), int(parts[first])


def draw_norms(description: dict[str, Any], png: str | os.PathLike[str]) -> None:
    """Draw the norms of all layers' dW into a PNG file, as one heat map: a row for each kind of layer, by depth.

    Where several layers have one place, as the experts of a block, their root mean square is drawn.

    Args:
        description: of the adapter, by `inspect_adapter`.
        png: the file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    squares: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for layer, found in description["layers"].items():
        kind, depth = place_of(layer)
        squares[kind][depth].append(found["norm"] ** 2)
    depths = range(1 + max(depth for row in squares.values() for depth in row))
    nothing = float("nan")
    norms = [[(sum(row[d]) / len(row[d])) ** 0.5 if d in row else nothing for d in depths] for row in squares.values()]
    size = (2.6 + min(14, 0.24 * len(depths)), 1.4 + 0.3 * len(norms))
    figure = Figure(figsize=(max(5, size[0]), size[1]), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(norms, vmin=0, cmap="viridis", aspect="auto", interpolation="nearest")
    panel.set_yticks(range(len(norms)), list(squares), fontsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set(xlabel="depth", title=f"norm of dW, all {len(description['layers'])} layers")
    figure.colorbar(image, ax=panel)
    with new_file(Path(png)) as file:
        figure.savefig(file, format="png", dpi=120)


def draw_block_norms(
    adapter: str | os.PathLike[str], png: str | os.PathLike[str], layers: str = ".*", source: str | None = None
) -> tuple[list[str], int]:
    """Draw the norms of the k x k blocks of the grids' updates into a PNG file, as one heat map per layer.

    Args:
        adapter: folder of the adapter.
        png: the file to write.
        layers: regular expression that selects layers by name. Of more than PANELS some are drawn, spread over kinds
            of layers and depths.
        source: format of the adapter, needed only if its config leaves that open.

    Returns:
        The names of the layers drawn, and how many match.

    Raises:
        ValueError: if no layer matches.
    """
    from matplotlib.figure import Figure

    read = formats.read(*read_adapter_folder(adapter), source=source, as_linear=True)
    names = [layer for layer in sorted(read.layers, key=natural) if re.search(layers, layer)]
    if not names:
        raise ValueError(f"--layers {layers!r} matches none of the adapter's layers, e.g. {read.layers[0]!r}.")
    matching = len(names)
    if matching > PANELS:
        # by kinds first: at a fixed distance in the model's own order all might be of one kind
        by_kind = sorted(names, key=place_of)
        drawn = {by_kind[i * (matching - 1) // (PANELS - 1)] for i in range(PANELS)}
        names = [name for name in names if name in drawn]
    norms = {}
    for name in names:
        f = read.factors(name)
        norms[name] = (read.scaling(name) * block_norms(f.A, f.B)).numpy()
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 3 * rows), layout="constrained")
    panels = iter(figure.subplots(rows, columns, squeeze=False).flat)
    top = max(n.max() for n in norms.values())
    image: Any = None
    for name, panel in zip(names, panels, strict=False):
        image = panel.imshow(norms[name], vmin=0, vmax=top, cmap="viridis")
        panel.set_title(name.removeprefix("model."), fontsize=7)
        panel.set_xticks(range(len(norms[name])))
        panel.set_yticks(range(len(norms[name])))
    for panel in panels:
        panel.set_axis_off()
    figure.colorbar(image, ax=figure.axes, label="norm of the block")
    figure.supxlabel("input block")
    figure.supylabel("output block")
    with new_file(Path(png)) as file:
        figure.savefig(file, format="png", dpi=120)
    return names, matching
