"""Which runs the quality benchmark makes, in order of importance, given the results that are there.

The plan is a function of the results: every cell (method, rank, ...) is tuned with one seed over one ladder of
learning rates, 1e-3 times powers of two, from its first guess outwards until the best is enclosed by two worse; then
it is run at its best learning rate with other seeds. The seed that chose the learning rate is not among them, so that what the
tables show was not selected for.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from quality_train import Cell, Job

LR = 1e-3  # of exponent 0
TUNING_SEED = 0
STEEPEST, FLATTEST = 6, -8  # the ladder's ends


@dataclass(frozen=True)
class Stage:
    """Cells of equal importance; `exponents` of the learning rates that each tries first, by method.

    Attributes:
        seeds: how many seeds a cell is run with at its best learning rate; 0: tuned only.
    """

    name: str
    cells: tuple[Cell, ...]
    seeds: int
    exponents: tuple[int, ...] = (0, 1, 2)


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


KEY = ("task", "method", "r", "k", "hybrid_r", "scale", "lr", "seed", "steps", "tokens_per_step")


def _identity(record: dict[str, Any]) -> tuple:
    return tuple(float(f"{v:.6g}") if isinstance(v, float | int) else v for v in (record[name] for name in KEY))


def job(cell: Cell, exponent: int, seed: int, run: dict[str, int]) -> Job:
    return Job(cell, LR * 2.0**exponent, seed, run["steps"], run["tokens_per_step"])


def tuning(cell: Cell, stage: Stage, run: dict[str, int], results: Results) -> tuple[list[Job], int | None]:
    """Runs still to be made to enclose the best learning rate, and its exponent once nothing is left to make."""
    first = first_exponents(cell, stage)
    losses = {}
    for exponent in range(FLATTEST, STEEPEST + 1):
        loss = results.loss(job(cell, exponent, TUNING_SEED, run))
        if loss is not None:
            losses[exponent] = loss
    missing = [e for e in first if e not in losses]
    if missing:
        return [job(cell, e, TUNING_SEED, run) for e in missing], None
    best = min(losses, key=losses.__getitem__)
    around = [e for e in (best + 1, best - 1) if e not in losses and FLATTEST <= e <= STEEPEST]
    return [job(cell, e, TUNING_SEED, run) for e in around], None if around else best


def seeded(cell: Cell, exponent: int, run: dict[str, int], seeds: int) -> list[Job]:
    return [job(cell, exponent, TUNING_SEED + 1 + number, run) for number in range(seeds)]


def pending(stages: Iterable[Stage], run: dict[str, int], results: Results) -> Iterator[tuple[str, Job]]:
    """Runs that are not made and whose settings are known, most important first, each with the name of its stage."""
    for stage in stages:
        chosen = {}
        for cell in stage.cells:
            jobs, best = tuning(cell, stage, run, results)
            yield from ((f"{stage.name}, learning rates", j) for j in jobs)
            if best is not None:
                chosen[cell] = best
        for number in range(1, stage.seeds + 1):
            for cell, best in chosen.items():
                last = seeded(cell, best, run, number)[-1]
                if results.get(last) is None:
                    yield f"{stage.name}, seeds", last


def lora(task: str, r: int) -> Cell:
    return Cell(task, "lora", r)


def grid(task: str, r: int, k: int, hybrid_r: int = 0, power: float = 0.0) -> Cell:
    """GraLoRA whose scaling is lora_alpha / r times a power of r / (ranks that meet in one entry of dW)."""
    met = hybrid_r + (r - hybrid_r) / k
    return Cell(task, "gralora", r, k, hybrid_r, (r / met) ** power)


def stages(tasks: Iterable[str]) -> list[Stage]:
    """What is asked, first to last; of the tasks that are there."""
    tasks = list(tasks)
    python, gsm8k, choice = "python", "gsm8k", "choice"
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
        Stage(
            "scaling at r=64",
            tuple(grid(python, 64, k, power=power) for power in (0.5, 1.0) for k in (4, 2, 8))
            + (grid(python, 64, 4, hybrid_r=32, power=0.5),),
            seeds=0,
        ),
        Stage("methods at r=128", (lora(python, 128), grid(python, 128, 4), grid(python, 128, 8)), seeds=4),
        Stage("same rank of dW, full fine-tuning", (lora(python, 256), Cell(python, "full")), seeds=4),
        Stage("scaling, seeds", (grid(python, 64, 4, power=0.5), grid(python, 64, 4, power=1.0)), seeds=4),
        Stage("GSM8K at r=64", (lora(gsm8k, 64), grid(gsm8k, 64, 4), grid(gsm8k, 64, 4, hybrid_r=32)), seeds=4),
        Stage("methods at r=16", (lora(python, 16), grid(python, 16, 2), grid(python, 16, 4)), seeds=4),
        Stage("multiple choice at r=64", (lora(choice, 64), grid(choice, 64, 4)), seeds=4),
        Stage("scaling at r=128", tuple(grid(python, 128, k, power=0.5) for k in (4, 8)), seeds=4),
        Stage("GSM8K, more", (grid(gsm8k, 64, 4, power=0.5), lora(gsm8k, 256), Cell(gsm8k, "full")), seeds=4),
    ]
    kept = [replace(stage, cells=tuple(c for c in stage.cells if c.task in tasks)) for stage in order]
    return [stage for stage in kept if stage.cells]


def tiny_stages(task: str) -> list[Stage]:
    """The same questions in the small: two methods and the scaling, for a check of the whole pipeline."""
    cells = (lora(task, 8), grid(task, 8, 2), grid(task, 8, 4, power=0.5))
    return [Stage("tiny", cells, seeds=2, exponents=(2, 3)), Stage("tiny, full", (Cell(task, "full"),), 0, (3,))]
