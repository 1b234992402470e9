"""`gralora tune`: find the learning rate, and rank and k if asked, by training candidates side by side.

All candidates are adapters on one loaded base model, trained on the same batches; the worse ones are stopped early.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from gralora_command import Parser

RATES = "1e-4..8e-3"
SHARE = "GRALORA_TUNE_SHARE"  # "1/2" in the second of two processes
SEARCHED = {
    "learning_rate": f"such as 1e-4..8e-3, one for each doubling, or 1e-4,3e-4 (default: {RATES})",
    "lora_r": "total ranks, such as 16,64; lora_alpha / lora_r stays that of the config, or of the defaults",
    "gralora_k": "such as 2,4",
    "hybrid_r": "such as 0,8",
}
EXAMPLES = """examples:
  gralora tune config.yaml
  gralora tune config.yaml --learning_rate 1e-4..8e-3 --gralora_k 2,4 --lora_r 16,64
  gralora tune --use_gralora --data_path data.jsonl --max_steps 200 --devices 0,1 --study_dir outputs/search
  gralora tune config.yaml --resume
  gralora finetune outputs/search/best.yaml
All flags of `gralora finetune` may be given; they hold for all candidates."""


def make_parser() -> Parser:
    parser = Parser(
        prog="gralora tune",
        usage="gralora tune [CONFIG.yaml] [--learning_rate LOW..HIGH] [flags of gralora finetune]",
        description="Find the settings with the lowest held-out loss.\n"
        "Candidates are trained side by side on one base model and the same batches; at each rung the worse ones are\n"
        "stopped.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("what to search")
    for name, text in SEARCHED.items():
        group.add_argument(f"--{name}", help=text)
    group = parser.add_argument_group("how")
    add = group.add_argument
    add("--study_dir", type=Path, help="folder of the results (default: that of --output_dir, with -tune after it)")
    add("--rungs", default="0.1,0.2", help="shares of the steps after which worse ones are stopped (default: 0.1,0.2)")
    add("--reduction", type=float, default=4, help="at a rung the best 1/REDUCTION go on (default: 4)")
    add("--full_sweep", action="store_true", help="train every candidate to the end, to see the whole curve")
    add("--together", default="auto", help="candidates in one pass through the base model (default: what is fastest)")
    add("--devices", help="GPUs that share the candidates, such as 0,1 (default: one)")
    add("--resume", action="store_true", help="go on with the search in study_dir")
    return parser


def main(argv: list[str]) -> None:
    """The command `gralora tune`."""
    parser = make_parser()
    options, rest = parser.parse_known_args(argv)
    given = {name: getattr(options, name) for name in SEARCHED if getattr(options, name) is not None}
    given.setdefault("learning_rate", RATES)
    options.shares = shares(options.rungs)
    if not options.reduction > 1:
        raise ValueError(f"reduction={options.reduction:g} must be above 1.")
    if options.together != "auto" and not (options.together.isdigit() and int(options.together)):
        raise ValueError(f"together={options.together!r} must be a number from 1 on, or auto.")
    devices = options.devices.split(",") if options.devices else []
    if len(set(devices)) < len(devices):
        raise ValueError(f"devices={options.devices!r} names one twice.")
    if len(devices) > 1 and SHARE not in os.environ:
        return start(argv, devices)
    if len(devices) == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[0]

    from . import output
    from .finetune import read_arguments
    from .tuning.run import tune

    args, how = read_arguments(rest, parser)
    if how["print_config"] or how["dry_run"]:
        raise ValueError("--print_config and --dry_run are flags of `gralora finetune`.")
    options.study_dir = options.study_dir or Path(f"{Path(args.output_dir)}-tune")
    share, count = map(int, os.environ.get(SHARE, "0/1").split("/"))
    output.run(lambda: tune(args, given, options, share, count), how["quiet"] or share > 0, how["json"] and share == 0)


def shares(text: str) -> list[float]:
    """Return the rungs; ValueError unless they are shares of the steps in rising order."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or sorted(set(found)) != found or not (found[0] > 0 and found[-1] < 1):
        raise ValueError(f"rungs={text!r} must be rising shares between 0 and 1, such as 0.1,0.2.")
    return found


def start(argv: list[str], devices: list[str]) -> None:
    """Run a process for each device, which share the candidates; if one fails, the others are ended.

    Raises:
        ValueError: if one has failed, which has said why.
    """
    processes = []
    for number, device in enumerate(devices):
        variables = os.environ | {SHARE: f"{number}/{len(devices)}", "CUDA_VISIBLE_DEVICES": device}
        processes.append(subprocess.Popen([sys.executable, "-m", "gralora_command", "tune", *argv], env=variables))
    status: Any = 0
    try:
        waiting = list(processes)
        while waiting and not status:
            for process in list(waiting):
                try:
                    status = status or process.wait(timeout=0.5)
                    waiting.remove(process)
                except subprocess.TimeoutExpired:
                    continue
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
    if status:
        raise ValueError("a process of the search has failed, see above; go on with --resume.")
