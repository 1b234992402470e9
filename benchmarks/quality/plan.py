"""Which runs the quality benchmark makes, in order of importance, given the results that are there.

The plan is a function of the results: every cell (method, rank, ...) is tuned with one seed over one ladder of
learning rates, 1e-3 times powers of two, from its first guess outwards until the best is enclosed by two worse; then
it is run at its best learning rate with other seeds. The seed that chose the learning rate is not among them, so that
what the tables show was not selected for.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .train import Cell, Job

LR = 1e-3  # of exponent 0
TUNING_SEED = 0
STEEPEST, FLATTEST = 6, -8  # the ladder's ends


@dataclass(frozen=True)
class Stage:
    """Cells of equal importance; `exponents` of the learning rates that each tries first, by method.

    Attributes:
        seeds: how many seeds a cell is run with at its best learning rate; 0: tuned only.
        seeds_at_loras: with how many of them a grid is also run at the best learning rate of LoRA of its rank.
        enclose: whether learning rates are added until the best lies between two worse.
    """

    name: str
    cells: tuple[Cell, ...]
    seeds: int
    seeds_at_loras: int = 0
    exponents: tuple[int, ...] = (0, 1)
    enclose: bool = True


def first_exponents(cell: Cell, stage: Stage) -> list[int]:
    """The stage's, moved to where a method's update has about LoRA's size."""
    shift = {"rslora": -round(math.log2(max(cell.r, 1)) / 4), "full": -3}.get(cell.method, 0)
    return [exponent + shift for exponent in stage.exponents]


class Results:
    """Finished runs by what identifies them. Later ones replace earlier ones."""

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        self._records: dict[tuple, dict[str, Any]] = {}
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        record = {
            "start": 1.0,
            "init": "",
            "ratio": 1.0,
            "optimizer": "",
        } | record  # earlier runs were made before there were these
        self._records[_identity(record)] = record

    def get(self, job: Job) -> dict[str, Any] | None:
        return self._records.get(_identity(job.key))

    def loss(self, job: Job) -> float | None:
        """Held-out loss, infinite for a run that diverged, None for one that was not made."""
        record = self.get(job)
        if record is None:
            return None
        return math.inf if record["test_loss"] is None else record["test_loss"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)


KEY = (
    *("task", "method", "r", "k", "hybrid_r", "scale", "start", "init", "ratio", "optimizer"),
    *("lr", "seed", "steps", "tokens_per_step"),
)


def _identity(record: dict[str, Any]) -> tuple:
    return tuple(
        float(f"{v:.6g}") if isinstance(v, float | int) else v for v in (record.get(name, 1.0) for name in KEY)
    )


def job(cell: Cell, exponent: int, seed: int, run: dict[str, int]) -> Job:
    return Job(cell, LR * 2.0**exponent, seed, run["steps"], run["tokens_per_step"])


def tuned(cell: Cell, run: dict[str, int], results: Results) -> dict[int, float]:
    """Exponent of the learning rate -> loss, of the runs with the seed that chooses."""
    losses = {e: results.loss(job(cell, e, TUNING_SEED, run)) for e in range(FLATTEST, STEEPEST + 1)}
    return {exponent: loss for exponent, loss in losses.items() if loss is not None}


def tuning(
    cell: Cell, first: list[int], run: dict[str, int], results: Results, enclose: bool = True
) -> tuple[list[Job], int | None]:
    """Runs still to be made to enclose the best learning rate, and its exponent once nothing is left to make."""
    losses = tuned(cell, run, results)
    missing = [e for e in first if e not in losses]
    if not missing and enclose:
        best = min(losses, key=losses.__getitem__)
        missing = [e for e in (best + 1, best - 1) if e not in losses and FLATTEST <= e <= STEEPEST]
        if not missing:
            return [], best
    return [job(cell, e, TUNING_SEED, run) for e in missing], None


def pending(stages: Iterable[Stage], run: dict[str, int], results: Results) -> Iterator[tuple[str, Job]]:
    """Runs that are not made and whose settings are known, most important first, each with the name of its stage."""
    for stage in stages:
        chosen = {}
        for cell in stage.cells:
            jobs, best = tuning(cell, first_exponents(cell, stage), run, results, stage.enclose)
            yield from ((f"{stage.name}, learning rates", j) for j in jobs)
            if best is not None:
                chosen[cell] = best
        at_loras = {cell: loras_best(cell, run, results) for cell in chosen if cell.method == "gralora"}
        for wanted, exponents in ((stage.seeds, chosen), (stage.seeds_at_loras, at_loras)):
            for number in range(1, wanted + 1):
                for cell, exponent in exponents.items():
                    if exponent is not None:
                        seeded = job(cell, exponent, TUNING_SEED + number, run)
                        if results.get(seeded) is None:
                            yield f"{stage.name}, seeds", seeded


def loras_best(cell: Cell, run: dict[str, int], results: Results) -> int | None:
    """Exponent of the best learning rate of LoRA of the cell's rank, once it is known."""
    if not tuned(lora(cell.task, cell.r), run, results):
        return None
    return tuning(lora(cell.task, cell.r), [], run, results)[1]


def lora(task: str, r: int) -> Cell:
    return Cell(task, "lora", r)


def grid(task: str, r: int, k: int, hybrid_r: int = 0, power: float = 0.0, smaller_start: bool = False) -> Cell:
    """GraLoRA whose scaling is lora_alpha / r times a power of r / (ranks that meet in one entry of dW).

    Args:
        smaller_start: A divided by what the scaling is multiplied by, so that the first updates stay as they are.
    """
    scale = (r / (hybrid_r + (r - hybrid_r) / k)) ** power
    return Cell(task, "gralora", r, k, hybrid_r, scale, 1 / scale if smaller_start else 1.0)


def much_data(task: str) -> list[Stage]:
    """What high rank is worth where there is much to learn, for text of this kind; what decides comes first."""

    def matched(r: int, k: int) -> Cell:
        return grid(task, r, k, power=0.5)

    wide = (-3, -2, -1, 0, 1, 2, 3, 4)  # to see how far from the best rate a method still works
    first, plain = (lora(task, 128), matched(128, 4)), grid(task, 128, 4)
    full, rslora = Cell(task, "full"), Cell(task, "rslora", 128)
    high, low = (lora(task, 256), matched(256, 4)), (lora(task, 16), matched(16, 2))
    loraplus, lora_ga = (tuple(replace(c, **other) for c in first) for other in ({"ratio": 4.0}, {"init": "lora_ga"}))
    muon = tuple(replace(c, optimizer="muon") for c in (lora(task, 16), matched(16, 2)))
    others = ("pissa", "olora", "orthogonal", "eva", "corda")
    return [
        Stage(f"{task}, r=128", first, seeds=0),
        Stage(f"{task}, lora_alpha / r", (plain,), seeds=0, exponents=(1, 2)),
        Stage(f"{task}, r=128, again", first, seeds=3),
        Stage(f"{task}, lora_alpha / r, again", (plain,), seeds=2),
        Stage(f"{task}, r=256, one rate", high, seeds=0, exponents=(0,), enclose=False),
        Stage(f"{task}, r=16, one rate", low, seeds=0, exponents=(2,), enclose=False),
        Stage(f"{task}, full fine-tuning", (full,), seeds=0),
        Stage(f"{task}, r=256 and 16", (*high, *low), seeds=0),
        Stage(f"{task}, rsLoRA", (rslora,), seeds=0),
        Stage(f"{task}, third seed and full fine-tuning", (plain, full), seeds=3),
        Stage(f"{task}, LoRA-GA", lora_ga, seeds=0, exponents=(-1, 0)),
        Stage(f"{task}, LoRA+", loraplus, seeds=0, exponents=(-1, 0)),
        Stage(f"{task}, more seeds", (*high, *low, rslora, *lora_ga, *loraplus), seeds=3),
        Stage(f"{task}, other k", (matched(128, 2), matched(128, 8), matched(256, 8)), seeds=3),
        Stage(f"{task}, r=64", (lora(task, 64), matched(64, 4)), seeds=3),
        Stage(f"{task}, LoRA-Muon", muon, seeds=3, exponents=(1, 2)),
        Stage(f"{task}, one rate for all", (first[1], plain), seeds=0, seeds_at_loras=1),
        Stage(f"{task}, width", (*first, plain), seeds=0, exponents=wide),
        Stage(f"{task}, r=256, lora_alpha / r", (grid(task, 256, 4),), seeds=3),
        Stage(f"{task}, rsLoRA, other ranks", tuple(Cell(task, "rslora", r) for r in (256, 64, 16)), seeds=3),
        Stage(f"{task}, initialisations", tuple(replace(c, init=init) for init in others for c in first), seeds=0),
    ]


def stages(tasks: Iterable[str]) -> list[Stage]:
    """What is asked, first to last; of the tasks that are there."""
    tasks = list(tasks)
    python, gsm8k, choice, fewer = "python", "gsm8k", "choice", "python-800"
    order = [
        Stage(
            "methods at r=64",
            (
                lora(python, 64),
                grid(python, 64, 4),
                grid(python, 64, 2),
                grid(python, 64, 4, hybrid_r=32),
                grid(python, 64, 8),
                Cell(python, "rslora", 64),
            ),
            seeds=4,
        ),
        Stage("scaling at r=64", tuple(grid(python, 64, k, power=0.5) for k in (4, 8, 2)), 0, seeds_at_loras=4),
        Stage("GSM8K at r=64", (lora(gsm8k, 64), grid(gsm8k, 64, 4, power=0.5)), seeds=4),
        Stage("methods at r=128", (lora(python, 128), grid(python, 128, 4, power=0.5)), seeds=4),
        Stage("same rank of dW, full fine-tuning", (lora(python, 256), Cell(python, "full")), seeds=4),
        Stage("methods at r=16", (lora(python, 16), grid(python, 16, 2, power=0.5)), seeds=4, exponents=(1, 2)),
        Stage(
            "lora_alpha / r at LoRA's rate",
            (grid(python, 64, 4, hybrid_r=32), grid(python, 64, 8), grid(python, 64, 4)),
            seeds=4,
            seeds_at_loras=4,
        ),
        Stage(
            "fewer rows",
            (lora(fewer, 16), grid(fewer, 16, 2, power=0.5), lora(fewer, 64), grid(fewer, 64, 4, power=0.5)),
            seeds=4,
        ),
        Stage(
            "GSM8K, more", (grid(gsm8k, 64, 4), Cell(gsm8k, "rslora", 64), lora(gsm8k, 256), Cell(gsm8k, "full")), 4
        ),
        Stage(
            "multiple choice at r=64", (lora(choice, 64), grid(choice, 64, 4, power=0.5)), seeds=4, exponents=(-1, 0)
        ),
        Stage(
            "scaling elsewhere",
            (
                grid(gsm8k, 64, 4, power=0.5),
                grid(python, 128, 4, power=0.5),
                grid(python, 16, 2, power=0.5),
                grid(choice, 64, 4, power=0.5),
            ),
            seeds=4,
            seeds_at_loras=4,
        ),
        Stage("methods at r=128, more", (grid(python, 128, 4), grid(python, 128, 8, power=0.5)), seeds=4),
        Stage("hybrid, scaling", (grid(python, 64, 4, hybrid_r=32, power=0.5),), seeds=4, seeds_at_loras=4),
        Stage("smaller start of A", (grid(python, 64, 4, power=0.5, smaller_start=True),), seeds=4),
        Stage("larger scaling", tuple(grid(python, 64, k, power=1.0) for k in (4, 2, 8)), seeds=0),
    ]
    much = {of: [s for t in tasks if t.partition("-")[0] == of for s in much_data(t)] for of in ("source", "docs")}
    order = much["source"] + order + much["docs"]
    kept = [replace(stage, cells=tuple(c for c in stage.cells if c.task in tasks)) for stage in order]
    return [stage for stage in kept if stage.cells]


def tiny_stages(task: str) -> list[Stage]:
    """The same questions in the small: two methods and the scaling, for a check of the whole pipeline."""
    cells = (lora(task, 8), grid(task, 8, 2), grid(task, 8, 4, power=0.5))
    return [Stage("tiny", cells, 2, 2, exponents=(2, 3)), Stage("tiny, full", (Cell(task, "full"),), 0, 0, (5,))]
