"""How rows are shown and kept: tables on the terminal, JSON, and the machine and versions that every row names."""

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import gralora

from .timing import host_us

Row = dict[str, object]
SHOWN = {"gpu_ms": "GPU {:.3f} ms", "step_mib": "step {:,.0f} MiB", "peak_mib": "peak {:,.0f} MiB"}
SHOWN |= {"tokens_per_s": "{:,.0f} tokens/s", "loss": "loss {:.5f}", "error": "error {:.1e}"}


def report(
    section: str, setting: str, timed: Mapping[str, Mapping[str, float]], base: str, **facts: object
) -> list[Row]:
    """Print one table, ratios to the method `base` first, and return its rows for the JSON."""
    print(f"\n{section}: {setting}")
    rows = []
    for method, row in timed.items():
        ratios = {f"ratio_to_{base}": row["time_ms"] / timed[base]["time_ms"]}
        if "gpu_ms" in row and timed[base]["gpu_ms"]:
            ratios[f"gpu_ratio_to_{base}"] = row["gpu_ms"] / timed[base]["gpu_ms"]
        gpu = "".join(f"  GPU {ratio:.3f}x" for name, ratio in ratios.items() if name.startswith("gpu"))
        spread = f"{row['time_ms']:9.3f} ms [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}]"
        more = "".join("  " + words.format(row[key]) for key, words in SHOWN.items() if key in row)
        print(f"  {ratios[f'ratio_to_{base}']:6.3f}x{gpu}  {method:22s} {spread}{more}", flush=True)
        rows.append({"section": section, "setting": setting, "method": method} | ratios | dict(row) | facts)
    return rows


def environment(commit: str | None = None) -> dict[str, object]:
    """The machine, the versions, and what of gralora runs on it.

    Args:
        commit: of the source that runs; asked of git where it is not given.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes")
    return {
        "card": card,
        "host_us": round(host_us(device), 1),
        "implementation": gralora.describe(),
        "kernels": os.environ.get("GRALORA_KERNELS", "auto"),
        "commit": commit or _commit(),
        "date": time.strftime("%Y-%m-%d"),
    } | {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with the CUDA it was built for
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of this source, with a + if files were changed since; "unknown" outside of a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=10"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
