"""Tasks of lm-evaluation-harness on adapters that share one loaded base model.

The harness reads data, makes prompts, scores and aggregates; numbers are those of its own command `lm_eval`. Here the
models take turns on it, and their differences are computed from the samples that it returns.
"""

import argparse
import contextlib
import functools
import importlib
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api import metrics
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ... import seam
from ..side_by_side import SideBySide, is_adapter
from .paired import Estimate, difference, difference_of_groups, mean

TASKS = Path(__file__).parent / "tasks"  # prompts as `gralora finetune` makes them, for files that the user has
LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # of the package datasets
SLOW = ("bleu", "chrf", "ter")
SPLITS = ("test", "train")  # what is asked, and where solved examples come from
CODE = (
    "{names}: such a task runs programs that the model writes, on this machine and with your rights; the harness "
    "keeps them from nothing. Give --confirm_run_unsafe_code if you want that, best in a container without network: "
    "docker run --rm --network none --memory 8g --pids-limit 256 -v MODELS:/models:ro IMAGE gralora evaluate ..."
)

Results = dict[str, dict[str, Any]]  # label -> what `simple_evaluate` returned, `samples` included


class TaskSet:
    """The tasks of one call, read once for all models.

    Attributes:
        top: tasks and groups as they were asked for.
        leaves: name -> task, those of groups included.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Find the tasks and load their data.

        Raises:
            ValueError: for a task that is not known, needs consent, or cannot be given what the arguments say.
            OSError: if data cannot be loaded.
        """
        names = [name for given in args.tasks for name in given.split(",") if name]
        manager = find(names, args.include_path or [])
        files = split_files(args.data_path or [])
        matches = [m for name in names for m in ([name] if name.endswith(".yaml") else manager.match_tasks([name]))]
        if not args.confirm_run_unsafe_code:  # before their metrics are loaded, which may fail for other reasons
            ask_consent([name for match in matches for name in running_code(manager, match)])
        self.top: list[Task | Group] = [task for match in matches for task in build(manager, match, files)]
        self.leaves: dict[str, Task] = {}
        for one in self.top:
            self.leaves |= {t.task_name: t for t in (one.get_all_tasks() if isinstance(one, Group) else [one])}
        if files and len(self.leaves) > 1:
            raise ValueError(
                f"data_path is the data of one task, and these are {len(self.leaves)}; evaluate one each."
            )
        self.check(args, files)

    def check(self, args: argparse.Namespace, files: dict[str, str]) -> None:
        """Raise ValueError for what the harness would refuse late, or not do without saying so."""
        if not args.confirm_run_unsafe_code:
            ask_consent([name for name, task in self.leaves.items() if getattr(task, "UNSAFE_CODE", False)])
        for name, task in self.leaves.items():
            fixed = task.get_config("num_fewshot")
            if args.num_fewshot and fixed == 0:
                raise ValueError(
                    f"num_fewshot={args.num_fewshot}: task {name!r} is defined with none, and the harness keeps to "
                    "that; leave it out."
                )
            shots = fixed if args.num_fewshot is None else args.num_fewshot
            if files and shots and "train" not in files:
                raise ValueError(
                    f"task {name!r} puts {shots} solved examples before each question; give a file of them, "
                    "--data_path train=FILE, or --num_fewshot 0."
                )


def read(args: argparse.Namespace) -> TaskSet:
    return TaskSet(args)


def find(names: list[str], include_path: list[str]) -> TaskManager:
    """Return the index in which all of the names are; the harness's own takes seconds to read, so only if needed.

    Raises:
        ValueError: for a name, pattern or file that is not there.
    """
    for folder in include_path:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"include_path={folder!r} is no folder.")
    paths = [str(TASKS), *include_path]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(name in manager.all_subtasks for name in names):  # a group may be of tasks of the harness's
        manager = TaskManager(include_path=paths)
    for name in names:
        if name.endswith(".yaml"):
            if not Path(name).is_file():
                raise FileNotFoundError(f"tasks: there is no file {name!r}.")
        elif not manager.match_tasks([name]):
            raise ValueError(
                f"task {name!r} is not known; `lm_eval ls tasks` lists the harness's {len(manager.all_tasks)}."
            )
    return manager


def running_code(manager: TaskManager, task: Any) -> list[str]:
    """Return those of a task, group or tag that run what a model writes, as the index says, which loads nothing."""
    if isinstance(task, dict):  # a member of a group with fields of its own
        task = task.get("task", [])
    if not isinstance(task, str):
        return [name for one in task for name in running_code(manager, one)]
    entry = manager.task_index.get(task)
    if entry is None:  # a file
        return []
    if entry.cfg is None:  # a tag
        return running_code(manager, sorted(entry.tags))
    if "group" in entry.cfg:
        return running_code(manager, entry.cfg["task"])
    return [task] if entry.cfg.get("unsafe_code", False) is not False else []


def ask_consent(unsafe: list[str]) -> None:
    if unsafe:
        raise ValueError(CODE.format(names=", ".join(unsafe)))


def split_files(data_path: list[str]) -> dict[str, str]:
    """Return split -> file of `--data_path FILE` (the test split) and `--data_path train=FILE`."""
    files: dict[str, str] = {}
    for given in data_path:
        split, equals, file = given.partition("=")
        if split not in SPLITS or not equals:
            split, file = "test", given
        if split in files:
            raise ValueError(f"data_path={file!r}: the {split} split has {files[split]!r} already.")
        if not Path(file).is_file():
            raise FileNotFoundError(f"data_path={file!r} is no file.")
        if Path(file).suffix.lower() not in LOADERS:
            raise ValueError(f"data_path={file!r} must end in {', '.join(LOADERS)}.")
        files[split] = file
    if files and "test" not in files:
        raise ValueError("data_path has solved examples only; give the questions too: --data_path FILE.")
    if len({LOADERS[Path(file).suffix.lower()] for file in files.values()}) > 1:
        raise ValueError(f"data_path: {' and '.join(files.values())} must be files of one kind.")
    return files


def build(manager: TaskManager, name: str, files: dict[str, str]) -> list[Task | Group]:
    """Load a task, group or tag, its data from `files` if there are any."""
    if files:
        loader = LOADERS[Path(files["test"]).suffix.lower()]
        solved = "train" if "train" in files else None
        other = {"dataset_path": loader, "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        other |= {"test_split": "test", "validation_split": None, "training_split": solved, "fewshot_split": solved}
        # a member of a group can have fields of its own; a task by itself cannot
        group = manager.load([{"group": "of one", "task": [{"task": name} | other]}])
        return list(group["tasks"].values())
    if (TASKS / f"{name}.yaml").is_file():
        raise ValueError(f"task {name!r} is for a file of yours; give --data_path FILE.")
    loaded = manager.load([name])
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def run(args: argparse.Namespace, loaded: SideBySide, tasks: TaskSet, results: Results) -> None:
    """Add what the harness finds of each model to `results`, one model after the other."""
    seeds = {} if args.seed is None else dict.fromkeys(SEEDS, args.seed)
    for label, path in zip(loaded.adapters, args.models, strict=True):
        tracker = EvaluationTracker(output_path=args.output_path) if args.output_path else None
        with loaded.using(label) as model, git_only_in_a_repository():
            found = simple_evaluate(
                model=language_model(model, loaded.tokenizer, args.batch_size),
                model_args={"peft" if is_adapter(path) else "pretrained": path},
                tasks=list(tasks.top),
                task_manager=TaskManager(include_defaults=False),  # the tasks are built
                num_fewshot=args.num_fewshot,
                batch_size=args.batch_size,
                limit=args.limit,
                gen_kwargs=args.gen_kwargs,
                system_instruction=args.system_instruction,
                apply_chat_template=args.apply_chat_template or False,
                fewshot_as_multiturn=bool(args.apply_chat_template),
                evaluation_tracker=tracker,
                confirm_run_unsafe_code=args.confirm_run_unsafe_code,
                log_samples=True,
                **seeds,
            )
        if tracker is not None:
            write(tracker, found, args.log_samples)
        results[label] = found


@contextlib.contextmanager
def git_only_in_a_repository() -> Iterator[None]:
    """Let the harness ask git for the working directory's commit only where there is one: git prints "fatal" else.

    `simple_evaluate` asks at each call, and no argument or environment variable of the harness keeps it from that or
    git from printing. `lm_eval.evaluate` does not ask, but leaves all that `simple_evaluate` does to its caller.
    """
    (module, name), here = seam.ASKS_GIT, Path.cwd()
    asking = importlib.import_module(module)
    ask = getattr(asking, name)
    if not any((folder / ".git").exists() for folder in (here, *here.parents)):
        setattr(asking, name, lambda: None)
    try:
        yield
    finally:
        setattr(asking, name, ask)


SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def language_model(model: Any, tokenizer: Any, batch_size: str) -> HFLM:
    """Wrap a loaded model for the harness, without its warnings that a loaded model cannot be loaded differently."""
    with at_level("lm_eval.models.huggingface", logging.ERROR):
        made = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    if not sys.stderr.isatty():  # its bars say themselves whether they are drawn, so that TQDM_DISABLE does not
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(made, name, functools.partial(getattr(made, name), disable_tqdm=True))
    return made


@contextlib.contextmanager
def at_level(logger: str, level: int) -> Iterator[None]:
    before = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(level)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(before)


def write(tracker: EvaluationTracker, found: dict[str, Any], log_samples: bool) -> None:
    """Write a model's results, and its samples, in the harness's files.

    Raises:
        OSError: if a file could not be written, which the harness itself only logs.
    """
    rest, samples = {name: value for name, value in found.items() if name != "samples"}, found["samples"]
    tracker.save_results_aggregated(results=rest, samples=samples)
    folder = Path(tracker.output_path) / tracker.general_config_tracker.model_name_sanitized
    date = getattr(tracker, "date_id", None)
    wanted = [folder / f"results_{date}.json"]
    for name in samples if log_samples else ():
        tracker.save_results_samples(task_name=name, samples=[dict(sample) for sample in samples[name]])
        wanted.append(folder / f"samples_{name}_{date}.jsonl")
    if missing := [str(path) for path in wanted if not path.is_file()]:
        raise OSError(f"output_path={tracker.output_path!r}: the harness could not write {', '.join(missing)}.")


def differences(results: Results, tasks: TaskSet) -> list[dict[str, Any]]:
    """Return each later model's difference to the first one, by task, metric and filter, paired by item."""
    first, *others = results
    rows = []
    for name, task in tasks.leaves.items():
        before = scores(results[first]["samples"][name])
        for label in others:
            after = scores(results[label]["samples"][name])
            for (metric, chosen), reference in before.items():
                aggregate = task.aggregation().get(metric, metrics.mean)
                if f"{metric},{chosen}" not in results[first]["results"][name] or aggregate is metrics.bypass_agg:
                    continue
                items = [after[metric, chosen][item] for item in reference]
                change = difference(
                    items, list(reference.values()), None if aggregate is metrics.mean else aggregate, metric in SLOW
                )
                row = {"task": name, "metric": metric, "filter": chosen, "model": label, "reference": first}
                rows.append(row | {"items": len(items)} | change.named("difference"))
    return rows


def group_differences(results: Results) -> list[dict[str, Any]]:
    """Return each later model's difference to the first one by group, of metrics that are means over their tasks."""
    first, *others = results
    rows = []
    for name, values in results[first].get("groups", {}).items() if others else ():
        leaves = leaves_of(name, results[first]["group_subtasks"])
        for key in values:
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            parts = {  # label -> of each task, item -> score
                label: [scores(own["samples"][leaf]).get((metric, chosen), {}) for leaf in leaves]
                for label, own in results.items()
            }
            weights = weights_of(list(parts.values()), [own["groups"][name][key] for own in results.values()])
            if weights is None:
                continue
            for label in others:
                pairs = [
                    ([after[item] for item in before], list(before.values()))
                    for after, before in zip(parts[label], parts[first], strict=True)
                ]
                row = {"task": name, "metric": metric, "filter": chosen, "model": label, "reference": first}
                row["items"] = sum(len(before) for before in parts[first])
                rows.append(row | difference_of_groups(pairs, weights).named("difference"))
    return rows


def leaves_of(group: str, children: dict[str, list[str]]) -> list[str]:
    """Return the tasks of a group and of the groups in it."""
    return [
        leaf for child in children[group] for leaf in (leaves_of(child, children) if children.get(child) else [child])
    ]


def weights_of(models: list[list[dict[int, Any]]], values: list[float]) -> list[float] | None:
    """Return the weights, by items or equal, with which the tasks' means give each model's value of a group.

    Args:
        models: of each model, of each task, item -> score.
        values: of each model, what the harness says of the group.

    Returns:
        The weights, or None if the group's value is another function of the scores.
    """
    sizes = [len(own) for own in models[0]]
    if not all(isinstance(score, (int, float)) for tasks in models for own in tasks for score in own.values()):
        return None
    if not all(sizes):
        return None
    for weights in ([size / sum(sizes) for size in sizes], [1 / len(sizes)] * len(sizes)):
        found = [sum(w * mean(list(own.values())) for w, own in zip(weights, tasks, strict=True)) for tasks in models]
        if all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(found, values, strict=True)):
            return weights
    return None


def scores(samples: list[dict[str, Any]]) -> dict[tuple[str, str], dict[int, Any]]:
    """Return (metric, filter) -> item -> score, of a task's samples."""
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            found.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    return found


def report(results: Results, tasks: TaskSet) -> dict[str, Any]:
    """Return each model's results as the harness has them, without samples, and the paired differences."""
    left_out = ("samples", "pretty_env_info")
    models = {label: {k: v for k, v in own.items() if k not in left_out} for label, own in results.items()}
    return {"models": models, "differences": differences(results, tasks) + group_differences(results)}


def table(found: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Return a title, and a line per task, metric, filter and model."""
    models, first = found["models"], next(iter(found["models"]))
    changes = {(row["task"], row["metric"], row["filter"], row["model"]): row for row in found["differences"]}
    lines = [["task", "n-shot", "metric", "model", "value", "stderr"] + ([f"minus {first}'s"] if changes else [])]
    rows = models[first]["results"] | models[first].get("groups", {})
    for name, values in rows.items():
        for key in values:
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            shown = metric if chosen == "none" else f"{metric}, {chosen}"
            for label, own in models.items():
                mine = (own["results"] | own.get("groups", {}))[name]
                shots = str(own["n-shot"].get(name, ""))
                line = [name, shots, shown, label, number(mine[key]), number(mine.get(f"{metric}_stderr,{chosen}"))]
                if row := changes.get((name, metric, chosen, label)):
                    line.append(str(Estimate.read(row, "difference")))
                lines.append(line)
    items = ", ".join(f"{name} {count['effective']}" for name, count in models[first]["n-samples"].items())
    brackets = "; in brackets, 95 % confidence intervals of differences paired by item" if changes else ""
    return f"items: {items}{brackets}", lines


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "" if value in (None, "N/A") else str(value)
