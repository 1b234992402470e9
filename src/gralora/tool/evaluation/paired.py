"""Differences between two models on the same items, with 95 % confidence intervals."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Z = 1.959964  # of a normal distribution, two-sided 95 %
RESAMPLES = 1000
FEW_RESAMPLES = 100  # for aggregations that are slow, as lm-evaluation-harness does for BLEU, chrF and TER


class Estimate(NamedTuple):
    """A value and the ends of its 95 % confidence interval, which are None where it has none, as for one item."""

    value: float
    low: float | None
    high: float | None

    def named(self, name: str) -> dict[str, float | None]:
        """Return a dict of the value, under this name, and the ends."""
        return {name: self.value, "low": self.low, "high": self.high}

    @classmethod
    def read(cls, row: dict[str, Any], name: str) -> "Estimate":
        """Return the estimate that `named` wrote into a dict."""
        return cls(row[name], row["low"], row["high"])

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.low is None else f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def difference(
    scores: Sequence[Any],
    reference: Sequence[Any],
    aggregate: Callable[[Any], float] | None = None,
    slow: bool = False,
) -> Estimate:
    """Return how much higher a model scores than a reference on the same items.

    Where each score is 0 or 1, the interval is the adjusted Wald interval for paired proportions (Bonett and Price,
    2012), which also has a width where both models agree on all items. That of another mean is Student's, for as few
    items as there are. Else it is the percentile bootstrap's, whose resamples take the items of both models together,
    made wider for few items (Hesterberg, 2014, arXiv 1411.5279, section 4.5.1).

    Args:
        scores: the model's score of each item.
        reference: the reference's, in the same order.
        aggregate: makes one number of such scores; None is their mean.
        slow: resample less, since `aggregate` takes long.

    Raises:
        ValueError: if there are no items, or not as many of one model as of the other.
    """
    n = len(scores)
    if n == 0 or n != len(reference):
        raise ValueError(f"paired scores must be as many for both models, and at least one: {n} and {len(reference)}.")
    value = (aggregate or mean)(scores) - (aggregate or mean)(reference)
    if aggregate is None and {*scores, *reference} <= {0, 1}:
        return Estimate(value, *adjusted_wald(scores, reference))
    if aggregate is None:
        return estimate([float(a) - float(b) for a, b in zip(scores, reference, strict=True)])
    if n == 1:
        return Estimate(value, None, None)
    draws = np.random.default_rng(0).integers(0, n, (FEW_RESAMPLES if slow else RESAMPLES, n))  # [resamples, items]
    differences = np.array(
        [aggregate([scores[i] for i in draw]) - aggregate([reference[i] for i in draw]) for draw in draws]
    )
    return Estimate(value, *map(float, np.quantile(differences, levels(n))))


def levels(n: int) -> tuple[float, float]:
    """Return the quantiles of the resamples of `n` items that are the ends of the interval.

    They are 2.5% and 97.5% for many items. For few, resamples vary too little, and are taken to vary as Student's t.
    """
    low = float(stats.norm.cdf(stats.t.ppf(0.025, n - 1) * math.sqrt(n / (n - 1))))
    return low, 1 - low


def difference_of_groups(
    parts: Sequence[tuple[Sequence[float], Sequence[float]]], weights: Sequence[float]
) -> Estimate:
    """Return how much higher a model's weighted mean over several tasks is, with the percentile bootstrap's interval.

    Items are drawn within each task, so that each resample has as many of each as there are. The interval is as wide
    as if there were as few of all as of the task with the fewest, and has no ends where that is one.

    Args:
        parts: the model's and the reference's scores of each task's items.
        weights: of the tasks' means, 1 in all.
    """
    generator = np.random.default_rng(0)
    value, differences = 0.0, np.zeros(RESAMPLES)
    for (scores, reference), weight in zip(parts, weights, strict=True):
        changes = np.asarray(scores, float) - np.asarray(reference, float)
        value += weight * float(changes.mean())
        draws = generator.integers(0, len(changes), (RESAMPLES, len(changes)))
        differences += weight * changes[draws].mean(axis=1)
    fewest = min(len(scores) for scores, _ in parts)
    if fewest == 1:
        return Estimate(value, None, None)
    return Estimate(value, *map(float, np.quantile(differences, levels(fewest))))


def adjusted_wald(scores: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Return the ends of Bonett and Price's interval for a difference of paired proportions.

    It adds one item to each of the two ways in which the models can disagree (DOI 10.3102/1076998611411915).
    """
    n = len(scores)
    better = sum(a > b for a, b in zip(scores, reference, strict=True))
    worse = sum(a < b for a, b in zip(scores, reference, strict=True))
    p, q = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return max(p - q - half, -1.0), min(p - q + half, 1.0)


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of the items' values, with Student's interval, which has no ends for one item."""
    n = len(values)
    if n == 1:
        return Estimate(values[0], None, None)
    middle = mean(values)
    half = float(stats.t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(middle, middle - half, middle + half)
