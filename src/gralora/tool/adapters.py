"""The commands on saved adapters: convert, export, merge and inspect."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..checkpoints.convert import convert_adapter
from ..strings import printable
from . import output, parsers

DTYPES = {name: getattr(torch, name) for name in parsers.DTYPES}


def convert_command(argv: list[str]) -> None:
    """`gralora convert`: any GraLoRA checkpoint into ours or PEFT's."""
    args = parsers.convert().parse_args(argv)

    def convert() -> dict[str, Any]:
        read = convert_adapter(args.adapter, args.out, args.to, args.source)
        for notice in read.notices:
            print(printable(notice))
        print(f"{read.format} -> {args.to}: {len(read.layers)} layers, written to {args.out}")
        return {"from": read.format, "to": args.to, "layers": len(read.layers), "notices": list(read.notices)}

    output.run(convert, args.quiet, args.json)


def export_command(argv: list[str]) -> None:
    """`gralora export`: the plain LoRA that an adapter equals, for a serving program."""
    from ..checkpoints import export

    args = parsers.export().parse_args(argv)
    base_config: dict[str, Any] | None = None
    if args.arch or args.heads or args.kv_heads:
        base_config = {
            "model_type": args.arch,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.kv_heads,
        }

    def write() -> dict[str, Any]:
        report = export.to_lora(
            args.adapter,
            args.out,
            args.target,
            base=args.base,
            base_config=base_config,
            source=args.source,
            max_rank=args.max_rank,
            lossy=args.lossy,
            dtype=DTYPES.get(args.dtype),
        )
        print(export.summary(report))
        return report

    output.run(write, args.quiet, args.json)


def merge_command(argv: list[str]) -> None:
    """`gralora merge`: the base model with the adapter in its weights."""
    from ..checkpoints.merge import merge_adapter

    args = parsers.merge().parse_args(argv)

    def merge() -> dict[str, Any]:
        result = merge_adapter(
            args.adapter,
            args.out,
            args.base,
            dtype=DTYPES.get(args.dtype),
            device=args.device,
            source=args.source,
            progress=not args.quiet,
        )
        for notice in result["notices"]:
            print(printable(notice))
        if result["resumed"]:
            print(f"resumed: {len(result['resumed'])} files were there already")
        replaced = f", replaced {len(result['replaced'])} tensors" if result["replaced"] else ""
        if result["rounding"]:
            worst, error = max(result["rounding"].items(), key=lambda item: item[1]["of_update"])
            lost = f"{error['of_update']:.2g} of its update, {error['of_weight']:.2g} of the weight"
            print(
                f"lost by rounding, at most: {lost}, in {printable(worst)}" if error["of_update"] else "lost: nothing"
            )
        print(f"merged {result['layers']} layers{replaced}, checked {result['verified']}; written to {args.out}")
        return result

    output.run(merge, args.quiet, args.json)


def inspect_command(argv: list[str]) -> None:
    """`gralora inspect`: what is in an adapter."""
    from ..checkpoints.drawing import draw_block_norms, draw_norms
    from ..checkpoints.inspection import inspect_adapter

    parser = parsers.inspect()
    args = parser.parse_args(argv)
    if args.layers is not None and not args.png:
        parser.error("--layers selects what --png draws; give --png, too")
    description = inspect_adapter(args.adapter, args.source)
    if args.json:
        print(json.dumps(description, indent=2))
    else:
        print_tables(description)
    if args.png and args.layers is None:
        draw_norms(description, args.png)
        said = f"drew the norms of all {len(description['layers'])} layers into {args.png}"
    elif args.png:
        drawn, matching = draw_block_norms(args.adapter, args.png, args.layers, args.source)
        said = f"drew the blocks of {len(drawn)} layers into {args.png}"
        if len(drawn) < matching:
            said += f", of {matching} that {args.layers!r} matches: some of each kind and depth"
    if args.png and not args.json:
        print(said)


def print_tables(description: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def shown(text: object) -> Text:  # a plain string would be read as markup
        return Text(printable(text))

    # where no terminal limits the width, nothing is shortened
    console = Console() if sys.stdout.isatty() else Console(width=sys.maxsize >> 32)
    head = Table(show_header=False, box=None)
    plain = ("format", "base", "r", "gralora_k", "hybrid_r", "lora_alpha", "use_rslora", "target_modules", "dtype")
    for name in plain:
        value = description[name]
        head.add_row(name, shown(", ".join(map(str, value)) if isinstance(value, list) else value))
    head.add_row("parameters", f"{description['parameters']:,}")
    head.add_row("as plain LoRA", f"rank {description['lora_rank']}")
    head.add_row("norm of dW", f"{description['norm']:.4g}")
    for name, shape in description["others"].items():
        head.add_row("also saved", shown(f"{name} {shape}"))

    rows = {layer.removeprefix("model."): d for layer, d in description["layers"].items()}
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "in": lambda d: str(d["in_features"]),
        "out": lambda d: str(d["out_features"]),
        "r": lambda d: str(d["r"]),
        "k": lambda d: str(d["k"]),
        "scaling": lambda d: f"{d['scaling']:.3g}",
        "norm": lambda d: f"{d['norm']:.3g}",
        "2-norm": lambda d: f"{d['spectral_norm']:.3g}",
        "rank": lambda d: f"{d['rank']}/{d['lora_rank']}",
    }
    same = {}  # in all layers, so that it is said once
    for name in ("r", "k", "scaling"):
        if len(values := {columns[name](d) for d in rows.values()}) == 1:
            same[name] = values.pop()
            del columns[name]
    if same:
        head.add_row("all layers", ", ".join(f"{name} {value}" for name, value in same.items()))
    console.print(head)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for layer, d in rows.items():
        table.add_row(shown(layer), *(show(d) for show in columns.values()))
    console.print(table)
    for notice in description["notices"]:
        console.print(shown(f"notice: {notice}"), style="yellow")
    for anomaly in description["anomalies"]:
        console.print(shown(f"anomaly: {anomaly}"), style="bold red")
    if not description["anomalies"]:
        console.print("no anomalies", style="green")
