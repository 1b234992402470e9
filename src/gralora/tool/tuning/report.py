"""What a search has found: the best setting, the curve of loss against learning rate, and how sure it is."""

import csv
import math
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from .. import configfile
from ..arguments import FinetuneArguments
from ..evaluation.paired import Estimate, difference
from .search import Candidate, Search, rank

BEST, TABLE, PLOT = "best.yaml", "candidates.csv", "learning_rate.png"
MOST_TICKS = 10


def summary(search: Search, made: list[Candidate], rungs: list[int], before: list[float]) -> dict[str, Any]:
    """Return the best candidate, each candidate's losses, and what speaks for the best.

    Args:
        search: one that has come to its end.
        made: the candidates.
        rungs: the steps at which they were measured.
        before: the base model's loss of each held-out answer.

    Raises:
        ValueError: if no candidate's loss is a number at the end.
    """
    trials, stopped = search.trials(), search.stopped(rungs)
    finished = [name for name in trials if name not in stopped]
    best = min(finished, key=lambda name: rank(last(trials[name])))
    if not math.isfinite(last(trials[best])):
        raise ValueError("no candidate has a held-out loss that is a number; try lower learning rates.")
    rows = []
    for one in made:
        trial = trials[one.name]
        steps = sorted(trial.intermediate_values)
        row = {"name": one.name} | one.settings | {"steps": steps[-1], "held_out_loss": last(trial)}
        row["losses"] = {str(step): trial.intermediate_values[step] for step in steps}
        if one.name != best:
            row["minus_best"] = compared(trial, trials[best]).named("difference") | {"at_step": steps[-1]}
        rows.append(row)
    trained = sum(max(trial.intermediate_values) for trial in trials.values())
    return {
        "best": next(row for row in rows if row["name"] == best),
        "base_model_loss": math.fsum(before) / len(before),
        "held_out_answers": len(before),
        "candidates": rows,
        "tied": [row["name"] for row in rows if row["name"] != best and not is_worse(row["minus_best"])],
        "rungs": rungs,
        "steps_trained": trained,
        "share_of_full_sweep": trained / (len(made) * rungs[-1]),
    }


def is_worse(difference: dict[str, Any]) -> bool:
    """Whether an interval is above 0; one without ends, of a single answer, decides nothing."""
    return difference["low"] is not None and difference["low"] > 0


def last(trial: FrozenTrial) -> float:
    return trial.intermediate_values[max(trial.intermediate_values)]


def compared(trial: FrozenTrial, best: FrozenTrial) -> Estimate:
    """Return how much higher a candidate's loss is than the best's, answer by answer, where it was measured last."""
    step = max(trial.intermediate_values)
    own = trial.user_attrs[f"losses_{step}"]
    if not all(math.isfinite(loss) for loss in own):
        return Estimate(math.inf, math.inf, math.inf)
    return difference(own, best.user_attrs[f"losses_{step}"])


def lines(found: dict[str, Any]) -> list[str]:
    """Return the table, and in words how sure the result is."""
    fields = [name for name in found["best"] if name in ("learning_rate", "lora_r", "gralora_k", "hybrid_r")]
    table = [[*fields, "steps", "held-out loss", "minus the best's, 95 %", ""]]
    for row in found["candidates"]:
        change = row.get("minus_best")
        shown = str(Estimate.read(change, "difference")) if change else "best"
        tie = "tie" if row["name"] in found["tied"] else ""
        table.append(
            [
                *(f"{row[field]:.3g}" if isinstance(row[field], float) else str(row[field]) for field in fields),
                str(row["steps"]),
                f"{row['held_out_loss']:.4f}",
                shown,
                tie,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return text + ["", *certainty(found, fields)]


def certainty(found: dict[str, Any], fields: list[str]) -> list[str]:
    """Return sentences: what is best, what ties with it, whether the range was wide enough, and what it took."""
    best = found["best"]
    settings = ", ".join(
        f"{field} {best[field]:.3g}" if isinstance(best[field], float) else f"{field} {best[field]}"
        for field in fields
    )
    said = [f"best: {settings}; held-out loss {best['held_out_loss']:.4f}, base model {found['base_model_loss']:.4f}"]
    answers = found["held_out_answers"]
    if answers == 1:
        said.append("not sure: there is one held-out answer, which compares nothing; give more (--val_set_size)")
    elif found["tied"]:
        count = len(found["tied"])
        tie = "1 candidate ties" if count == 1 else f"{count} candidates tie"
        said.append(
            f"not sure: {tie} with it, by what was measured last (marked tie); more held-out examples "
            "(--val_set_size) or another --seed would tell"
        )
    else:
        said.append(
            f"sure, for this seed and data: all others were worse on the same {answers} answers, by the 95 % intervals"
        )
    rates = sorted({row["learning_rate"] for row in found["candidates"] if "learning_rate" in row})
    if len(rates) > 1 and best["learning_rate"] in (rates[0], rates[-1]):
        low, high = (rates[0] / 10, rates[1]) if best["learning_rate"] == rates[0] else (rates[-2], rates[-1] * 10)
        said.append(f"the best is at the end of the range; try --learning_rate {low:.1e}..{high:.1e}, too")
    if best["held_out_loss"] >= found["base_model_loss"]:
        said.append("no candidate is better than the base model: this training does not pay with these settings")
    share = found["share_of_full_sweep"]
    return [*said, f"took {share:.0%} of the steps of training every candidate to the end"]


def write(found: dict[str, Any], best: FinetuneArguments, folder: Path) -> None:
    """Write the settings to train with, the table and the curve."""
    (folder / BEST).write_text(configfile.dump(best, best.trainer), encoding="utf-8")
    steps = [str(step) for step in found["rungs"]]
    names = [name for name in found["candidates"][0] if name not in ("losses", "minus_best")]
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *(f"loss_at_{step}" for step in steps), "minus_best", "low", "high"])
        for row in found["candidates"]:
            change = row.get("minus_best", {})
            ends = [change.get(name, "") for name in ("difference", "low", "high")]
            losses = [row["losses"].get(step, "") for step in steps]
            writer.writerow([*(row.get(name, "") for name in names), *losses, *ends])
    if "learning_rate" in found["best"]:
        plot(found, folder / PLOT)


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw held-out loss against learning rate: a line per rung, and per other setting if there are several."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    others = [name for name in ("lora_r", "gralora_k", "hybrid_r") if name in found["best"]]
    kinds = list(dict.fromkeys(tuple(row[name] for name in others) for row in found["candidates"]))
    for number, kind in enumerate(kinds):
        label = ", ".join(f"{name} {value}" for name, value in zip(others, kind, strict=True))
        for step, shade in zip(found["rungs"], shades(len(found["rungs"])), strict=True):
            points = sorted(
                (row["learning_rate"], row["losses"][str(step)])
                for row in found["candidates"]
                if tuple(row[name] for name in others) == kind and str(step) in row["losses"]
            )
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                name = f"{label}, step {step}" if label else f"step {step}"
                axes.plot(*zip(*points, strict=True), "o-", color=f"C{number}", alpha=shade, label=name)
    best = found["best"]
    axes.plot([best["learning_rate"]], [best["held_out_loss"]], "*", color="black", markersize=14, label="best")
    axes.axhline(found["base_model_loss"], color="gray", linestyle=":", label="base model")
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss (nats per token)")
    rates = sorted({row["learning_rate"] for row in found["candidates"]})
    shown = rates[:: math.ceil(len(rates) / MOST_TICKS)]
    axes.set_xticks(shown, [f"{rate:.3g}" for rate in shown])  # matplotlib's own overlap in less than a decade
    axes.minorticks_off()
    # a diverged candidate would leave nothing of the rest to see
    low = min(best["held_out_loss"], found["base_model_loss"])
    high = max(best["held_out_loss"], found["base_model_loss"])
    axes.set_ylim(low - 0.15 * (high - low), high + 0.5 * (high - low))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def shades(count: int) -> list[float]:
    return [0.3 + 0.7 * (i + 1) / count for i in range(count)]
