"""Speed and memory of GraLoRA beside the frozen base, PEFT's LoRA as it is and accelerated, PEFT's own GRALORA and
Unsloth's functions.

    python -m benchmarks.speed linear model short nf4 kinds decode merge --out results.json
    python -m benchmarks.speed liger --liger liger_kernel.whl --unsloth unsloth.whl
    GRALORA_KERNELS=portable python -m benchmarks.speed model --methods frozen "PEFT LoRA" gralora

Every section interleaves its methods round by round and prints, for each, the median time with its spread, ratios
first. The frozen base (gradients to the input only) is the limit: what a step costs without any adapter. Before that,
each method's results are compared with a float64 reference; if one is off, nothing of the section is printed, and the
command fails. Each row of the JSON names the card, the versions, the commit, and the implementation that ran.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from . import exact, kinds, layers, steps
from .methods import METHODS, UNSLOTH
from .report import environment

SECTIONS = {
    f.__name__: f
    for f in (
        *(layers.linear, steps.model, steps.short, steps.nf4, steps.liger, kinds.kinds),
        *(steps.small, steps.decode, layers.merge),
    )
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("sections", nargs="+", metavar="section", help=", ".join(SECTIONS))
    p.add_argument(
        "--compile", action="store_const", const="default", help="training steps under torch.compile instead of eager"
    )
    p.add_argument(
        "--compile_mode",
        choices=steps.COMPILED,
        dest="compile",
        help="the same in this mode of torch.compile, or its default mode for each of the blocks alone",
    )
    p.add_argument("--checkpointing", action="store_true", help="training steps also with gradient checkpointing")
    p.add_argument("--batch", type=_batch, help="sequences and tokens of training steps, as 1x2048")
    p.add_argument("--methods", nargs="+", choices=[*METHODS, UNSLOTH], help="which methods to compare [all]")
    p.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128], help="ranks of the section linear")
    p.add_argument(
        "--only", default="", metavar="WORDS", help="rows of the section kinds that have these in their name"
    )
    p.add_argument("--rounds", type=int, default=7, help="rounds over all methods")
    p.add_argument("--repeats", type=int, default=2, help="training steps in a row in one round")
    p.add_argument("--unsloth", type=Path, metavar="WHEEL", help="compare Unsloth's functions, of this wheel, too")
    p.add_argument("--liger", type=Path, metavar="WHEEL", help="of liger-kernel, for the section liger")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--tiny", action="store_true", help="tiny sizes, to test the benchmark itself")
    p.add_argument("--commit", help="recorded in each row; asked of git unless given")
    p.add_argument("--out", type=Path, help="write all rows as JSON, after each table")
    return p


def _batch(text: str) -> tuple[int, int]:
    sequences, tokens = text.split("x")
    return int(sequences), int(tokens)


def main(argv: list[str] | None = None) -> None:
    p = parser()
    args = p.parse_args(argv)
    if unknown := set(args.sections) - SECTIONS.keys():
        p.error(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    args.methods = args.methods or [*METHODS, *([UNSLOTH] if args.unsloth else [])]
    if UNSLOTH in args.methods and args.unsloth is None:
        p.error("--methods Unsloth needs --unsloth, the path of its wheel")
    if "liger" in args.sections and args.liger is None:
        p.error("the section liger needs --liger, the path of a wheel of liger-kernel")
    args.shrink = 64 if args.tiny else 8 if args.device == "cpu" else 1
    facts = environment(args.commit)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = []
    for section in args.sections:
        try:
            for row in SECTIONS[section](args):
                rows.append(row | facts)
                if args.out:  # at once: what follows may be stopped
                    args.out.write_text(json.dumps(rows, indent=1) + "\n")
        except exact.NotTheReference as error:
            sys.exit(f"{section}: {error}")


if __name__ == "__main__":
    main()
