"""How all figures of the documentation are saved: SVG without a ground, in an ink that turns light in the dark."""

import io
import re
from pathlib import Path
from typing import Any

INK, PALE = "#333333", "#f2f2f2"
# What is drawn in INK, PALE or white turns over where the reader prefers a dark scheme
DARK = f"""<style>
@media (prefers-color-scheme: dark) {{
text[style*="fill: {INK}"] {{ fill: #d8dce2 !important; }}
[style*="stroke: {INK}"] {{ stroke: #d8dce2 !important; }}
use[style*="fill: {INK}"], g[style*="fill: {INK}"], tspan[style*="fill: {INK}"] {{ fill: #d8dce2 !important; }}
path[style*="fill: {PALE}"] {{ fill: #2b2f38 !important; }}
path[style*="stroke: #ffffff"] {{ stroke: #1e2129 !important; }}
}}
</style>"""
SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "gralora",  # the same file at every run
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color"), INK),
    **dict.fromkeys(("ytick.color", "legend.labelcolor"), INK),
}


def pyplot() -> Any:
    """matplotlib's pyplot without a display, and with SETTINGS."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(SETTINGS)
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None}, transparent=True)
    text = re.sub(r"(<svg [^>]*>)", lambda found: f"{found[1]}\n{DARK}", written.getvalue(), count=1)
    path.write_text(text, encoding="utf-8")
