"""The candidates of a search, and the rule by which the worse ones are stopped early.

A candidate is a trial of an Optuna study, which keeps settings and losses in a file that several processes share.
"""

import copy
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from ..arguments import FinetuneArguments

STUDY, JOURNAL = "tune", "study.journal"
FIELDS = ("learning_rate", "lora_r", "gralora_k", "hybrid_r")  # what candidates may differ in
POLL_S = 0.5


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings to try, in place of those of the run's arguments.

    Attributes:
        name: of its adapter.
        settings: field -> value, the fields of `FIELDS` that are searched.
    """

    name: str
    settings: dict[str, Any]

    def arguments(self, args: FinetuneArguments) -> FinetuneArguments:
        """Return the run's arguments with the candidate's settings; alpha / r stays as it is.

        Raises:
            ValueError: if another rank would need a lora_alpha that is no whole number, or settings do not fit.
        """
        changes = dict(self.settings)
        if "lora_r" in changes:
            alpha = args.lora_alpha * changes["lora_r"] / args.lora_r
            if alpha != int(alpha):
                raise ValueError(
                    f"lora_r={changes['lora_r']}: lora_alpha would be {alpha:g}, to keep lora_alpha / lora_r at "
                    f"{args.lora_alpha} / {args.lora_r}; give a lora_alpha that is a multiple of lora_r."
                )
            changes["lora_alpha"] = int(alpha)
        return dataclasses.replace(args, trainer=args.trainer, **changes)

    def __str__(self) -> str:
        return ", ".join(
            f"{field} {value:.3g}" if field == "learning_rate" else f"{field} {value}"
            for field, value in self.settings.items()
        )


def values(field: str, text: str) -> list[Any]:
    """Return the values of a flag: `2,4` lists them; `1e-4..8e-3` has as many, evenly spaced, as there are doublings.

    Raises:
        ValueError: for anything else.
    """
    kind = float if field == "learning_rate" else int
    try:
        if ".." not in text:
            found = [word if word == "auto" else kind(word) for word in text.split(",")]
        elif kind is int:
            raise ValueError
        else:
            low, high = map(float, text.split(".."))
            if not 0 < low < high < math.inf:
                raise ValueError
            steps = max(1, round(math.log2(high / low)))
            found = [float(f"{low * (high / low) ** (i / steps):.3g}") for i in range(steps + 1)]
    except ValueError:
        form = "1e-4..8e-3, or 1e-4,2e-4" if kind is float else "2,4"
        raise ValueError(f"{field}={text!r} must have the form {form}.") from None
    if len(set(found)) < len(found) or any(isinstance(value, float) and not 0 < value < math.inf for value in found):
        raise ValueError(f"{field}={text!r} must be different values, and learning rates above 0.")
    return found


def candidates(args: FinetuneArguments, given: dict[str, str]) -> list[Candidate]:
    """Return all combinations of the values that are given for fields; ValueError for one that cannot be trained."""
    found: list[dict[str, Any]] = [{}]
    for field in FIELDS:
        if field in given:
            found = [one | {field: value} for one in found for value in values(field, given[field])]
    made = [Candidate(f"candidate_{number}", settings) for number, settings in enumerate(found)]
    if len(made) < 2:
        raise ValueError(f"{made[0]} is one candidate; a search needs two, such as --learning_rate 1e-4..8e-3.")
    for one in made:
        one.arguments(args).lora_config()
    return made


class Halving(optuna.pruners.BasePruner):
    """Successive halving in lockstep: at each rung the best 1 / `reduction` of the candidates that reached it go on.

    Optuna's own SuccessiveHalvingPruner is asynchronous: it decides on a trial by those that came before it, so the
    first one always goes on. Here all candidates are at the same step, and none is stopped before all are measured
    (Jamieson and Talwalkar, arXiv 1502.07943).
    """

    def __init__(self, reduction: float) -> None:
        self.reduction = reduction

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether a trial is not among the best at its last step; ties go to the earlier trial."""
        step = trial.last_step
        if step is None:
            return False
        reached = [one for one in study.get_trials(deepcopy=False) if step in one.intermediate_values]
        reached.sort(key=lambda one: (rank(one.intermediate_values[step]), one.number))
        return trial.number not in {one.number for one in reached[: math.ceil(len(reached) / self.reduction)]}


def rank(loss: float) -> float:
    """Return the loss to compare by: one that is not a number is worse than all others."""
    return math.inf if math.isnan(loss) else loss


def wait_for_study(folder: Path) -> None:
    """Wait until the first process of a search has made its study; one made here would be an earlier search to it."""
    while not (folder / JOURNAL).exists():
        time.sleep(POLL_S)


class Search:
    """A study on disk, and this process's trials in it."""

    def __init__(self, folder: Path, reduction: float, full: bool = False) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.full = full
        self.study = optuna.create_study(
            study_name=STUDY,
            storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
            pruner=optuna.pruners.NopPruner() if full else Halving(reduction),
            load_if_exists=True,
        )

    def begin(self, made: list[Candidate], about: dict[str, Any], wait: bool = False) -> None:
        """Enter the candidates, or check that those of an earlier call, or another process's, are the same.

        Args:
            made: the candidates.
            about: what else must be the same: arguments, data, rungs.
            wait: until another process has entered them.

        Raises:
            ValueError: if the study there is of other candidates, arguments or data.
        """
        about = json.loads(json.dumps(about, default=str)) | {"candidates": [one.settings for one in made]}
        while wait and "about" not in self.study.user_attrs:
            time.sleep(POLL_S)
        earlier = self.study.user_attrs.get("about")
        if earlier is None:
            for one in made:
                self.study.enqueue_trial(one.settings, user_attrs={"name": one.name})
            for one in made:
                trial = self.study.ask()
                for field in one.settings:
                    trial.suggest_categorical(field, sorted({c.settings[field] for c in made}, key=str))
            self.study.set_user_attr("about", about)
            return
        for name in sorted(set(about) | set(earlier)):
            if about.get(name) != earlier.get(name):
                raise ValueError(
                    f"the search to go on with had {name}={earlier.get(name)!r}, not {about.get(name)!r}; repeat the "
                    "command that began it, with --resume, or give another --study_dir."
                )

    def trials(self) -> dict[str, FrozenTrial]:
        """Return name -> trial, in the order of the candidates."""
        return {one.user_attrs["name"]: one for one in self.study.get_trials(deepcopy=False)}

    def report(self, name: str, step: int, items: list[float]) -> None:
        """Keep a candidate's held-out losses at a step, one of each answer."""
        trial = self.trial(name)
        if step in self.trials()[name].intermediate_values:
            return  # measured before the interruption after which this run goes on
        trial.set_user_attr(f"losses_{step}", items)
        trial.report(math.fsum(items) / len(items), step)

    def trial(self, name: str) -> Trial:
        return Trial(self.study, self.trials()[name]._trial_id)

    def wait(self, names: list[str], step: int) -> None:
        """Wait until the candidates of all processes are measured at a step."""
        while not all(step in one.intermediate_values for name, one in self.trials().items() if name in names):
            time.sleep(POLL_S)

    def stopped(self, rungs: list[int]) -> dict[str, int]:
        """Return the step at which each candidate was stopped, of those that were at one of these steps.

        It follows from the losses alone, so that it is the same in each process and after each interruption.
        """
        found: dict[str, int] = {}
        for step in rungs:
            live = [name for name in self.trials() if name not in found]
            if not all(step in self.trials()[name].intermediate_values for name in live):
                break
            for name in live:
                if self.study.pruner.prune(self.study, until(self.trials()[name], step)):
                    found[name] = step
        return found

    def finish(self, rungs: list[int]) -> None:
        """Mark the trials as what they have become, for Optuna's tables and plots."""
        stopped = self.stopped(rungs)
        for name, trial in self.trials().items():
            if not trial.state.is_finished():
                state = TrialState.PRUNED if name in stopped else TrialState.COMPLETE
                loss = trial.intermediate_values[max(trial.intermediate_values)]
                self.study.tell(trial.number, None if state == TrialState.PRUNED else rank(loss), state=state)


def until(trial: FrozenTrial, step: int) -> FrozenTrial:
    """Return a trial as it was at a step."""
    earlier = copy.copy(trial)
    earlier.intermediate_values = {s: loss for s, loss in trial.intermediate_values.items() if s <= step}
    return earlier
