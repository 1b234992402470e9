"""What was measured of each method, and how methods compare: differences paired by seed, and Student's tests."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from scipy import stats

from .plan import TUNING_SEED, Results
from .train import Cell

SCORES = ("exact_match", "accuracy")  # the higher, the better


@dataclass
class Runs:
    """What was measured of one cell with one number of steps.

    Attributes:
        tuning: learning rate -> held-out loss of the seed that chooses; infinite where it diverged.
    """

    cell: Cell
    steps: int
    tuning: dict[float, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def lr(self) -> float:
        return min(self.tuning, key=self.tuning.__getitem__)

    @property
    def enclosed(self) -> bool:
        """Whether a lower and a higher learning rate than the best were tried."""
        return min(self.tuning) < self.lr < max(self.tuning)

    def seeds_at(self, lr: float) -> dict[int, dict[str, Any]]:
        """Other seed -> record, at a learning rate."""
        at_lr = [r for r in self.records if math.isclose(r["lr"], lr) and r["seed"] != TUNING_SEED]
        return {r["seed"]: r for r in sorted(at_lr, key=lambda r: r["seed"])}

    @property
    def seeds(self) -> dict[int, dict[str, Any]]:
        """Other seed -> record, at the best learning rate."""
        return self.seeds_at(self.lr)

    def measured(self, key: str = "test_loss", lr: float | None = None) -> dict[int, float]:
        """Other seed -> what was measured, at the best or another learning rate; a diverged loss is infinite."""
        found = {seed: r.get(key) for seed, r in self.seeds_at(self.lr if lr is None else lr).items()}
        if key == "test_loss":
            return {seed: math.inf if value is None else value for seed, value in found.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def between(self) -> float | None:
        """How far the parabola through the best learning rate and its neighbours goes below the best."""
        lower, best, higher = (self.tuning.get(self.lr * factor, math.inf) for factor in (0.5, 1, 2))
        if not math.isfinite(lower + higher):
            return None
        return ((higher - lower) / 2) ** 2 / (2 * (lower + higher - 2 * best))

    def good_rates(self, share: float = 0.01) -> tuple[float | None, float | None]:
        """The lowest and the highest learning rate whose loss is at most so much above the best, in parts of it.

        Between two that were tried, the loss is taken to be linear in the logarithm of the rate; a rate that diverged
        says nothing of those before it. None where the last that was tried is good: there may be better ones.
        """
        points = sorted(self.tuning.items())
        best = points.index((self.lr, self.tuning[self.lr]))
        limit = (1 + share) * self.tuning[self.lr]
        return _reach(points[best::-1], limit), _reach(points[best:], limit)

    @property
    def name(self) -> str:
        cell = self.cell
        if cell.method != "gralora" or cell.scale == 1:
            return cell.name
        plain = replace(cell, scale=1.0, start=1.0)
        words = "matched" if matched(cell) else f"scaling x{cell.scale:.3g}"
        return f"{plain.name}, {words}" + (f", A x{cell.start:.3g}" if cell.start != 1 else "")


def _reach(points: Iterable[tuple[float, float]], limit: float) -> float | None:
    for (near, low), (far, high) in pairwise(points):
        if high > limit:
            part = (limit - low) / (high - low) if math.isfinite(high) else 0.0
            return near * (far / near) ** part
    return None


def _loss(record: dict[str, Any]) -> float:
    return math.inf if record["test_loss"] is None else record["test_loss"]


def collect(results: Results) -> dict[Cell, Runs]:
    """The runs by cell; of each task, those of the number of steps and tokens that most were made with."""
    by_steps: dict[str, dict[tuple[int, int], list]] = defaultdict(lambda: defaultdict(list))
    for record in results:
        by_steps[record["task"]][record["steps"], record["tokens_per_step"]].append(record)
    runs: dict[Cell, Runs] = {}
    for settings in by_steps.values():
        (steps, _), records = max(settings.items(), key=lambda item: len(item[1]))
        for record in records:
            cell = Cell(**{f.name: record[f.name] for f in fields(Cell)})
            own = runs.setdefault(cell, Runs(cell, steps))
            own.records.append(record)
            if record["seed"] == TUNING_SEED:
                own.tuning[record["lr"]] = _loss(record)
    return {cell: own for cell, own in runs.items() if own.tuning}


@dataclass(frozen=True)
class Difference:
    """Of what two methods reach, by seed; `half` of the mean's 95% interval is None for fewer than two pairs."""

    values: tuple[float, ...]
    higher_is_better: bool = False

    @property
    def pairs(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def half(self) -> float | None:
        return half_width(self.values)

    @property
    def p(self) -> float:
        """Of a mean this far from 0 if there were no difference, two-sided, by Student's distribution."""
        spread = statistics.stdev(self.values)
        if not spread:
            return 0.0 if self.mean else 1.0
        return float(2 * stats.t.sf(abs(self.mean) / spread * math.sqrt(self.pairs), self.pairs - 1))

    @property
    def verdict(self) -> str:
        if self.half is None:
            return "open"
        if abs(self.mean) <= self.half:
            return "tie"
        return "better" if (self.mean > 0) == self.higher_is_better else "worse"

    def __str__(self) -> str:
        return f"{self.mean:+.4f}{plus_minus(self.half)}"


def holds_together(differences: list[Difference], level: float = 0.05) -> list[Difference]:
    """Those that are not 0 by Holm's test, which names any wrongly with at most this probability."""
    ordered = sorted(differences, key=lambda d: d.p)
    for number, d in enumerate(ordered):
        if d.p > level / (len(ordered) - number):
            return ordered[:number]
    return ordered


def difference(
    own: Runs, other: Runs, key: str = "test_loss", at: tuple[float | None, float | None] = (None, None)
) -> Difference | None:
    """How much higher `own` is than `other`, over the seeds that both were run with; None if there is no such seed.

    Args:
        at: the learning rate of each, None for its best.
    """
    a, b = (runs.measured(key, lr) for runs, lr in zip((own, other), at, strict=True))
    pairs = tuple(a[seed] - b[seed] for seed in a if seed in b)
    return Difference(pairs, key != "test_loss") if pairs else None


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95% interval of their mean, by Student's distribution; None if there are too few, or one diverged."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    t = float(stats.t.ppf(0.975, len(values) - 1))
    return t * statistics.stdev(values) / math.sqrt(len(values))


def plus_minus(half: float | None) -> str:
    return "" if half is None else f" ± {half:.4f}"


def baseline(cell: Cell, runs: dict[Cell, Runs]) -> Runs | None:
    """The LoRA that a cell is compared with: of the same rank, and if there is one of the same start and rates.

    For other ranks than the grids' it is one of the lowest rank.
    """
    loras = sorted((c for c in runs if c.task == cell.task and c.method == "lora"), key=lambda c: c.r)
    grids = {c.r for c in runs if c.task == cell.task and c.method == "gralora"}
    same = [c for c in loras if c.r == cell.r and c.r in grids]
    same.sort(key=lambda c: (_way(c) != _way(cell), _way(c) != ("", 1.0, "")))
    if same:
        return runs[same[0]]
    usual = [c for c in loras if c.r == 64] or loras
    return runs[usual[0]] if usual else None


def _way(cell: Cell) -> tuple[str, float, str]:
    return cell.init, cell.ratio, cell.optimizer


def order(own: Runs) -> tuple:
    cell = own.cell
    return (
        cell.method == "full",
        cell.r,
        cell.method,
        cell.k,
        cell.hybrid_r,
        cell.scale,
        cell.start,
        cell.init,
        cell.ratio,
        cell.optimizer,
    )


def matched(cell: Cell) -> bool | None:
    """Whether the scaling is gralora_scaling="matched"; None for another than that and lora_alpha / r."""
    if cell.scale == 1:
        return False
    met = cell.hybrid_r + (cell.r - cell.hybrid_r) / cell.k
    return True if math.isclose(cell.scale, math.sqrt(cell.r / met)) and cell.start == 1 else None
