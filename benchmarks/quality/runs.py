"""Makes the runs of the plan, in worker processes that share the device, and keeps each result as a JSON line."""

import argparse
import copy
import gc
import json
import multiprocessing
import time
import traceback
from dataclasses import fields
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..speed.report import environment
from . import plan
from .data import Task
from .plan import Results, Stage
from .train import Cell, Job, Trainer

LAUNCHES = ("compiled", "graph", "eager")  # the fastest first


class Worker:
    """Trains jobs one after the other; builds the model anew only when the cell changes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        self.tasks = {task.name: task for task in map(Task.load, args.tasks)}
        self.tokenizer = AutoTokenizer.from_pretrained(args.model) if args.exact_match else None
        self.facts = environment()
        self.trainer: Trainer | None = None

    def __call__(self, job: Job) -> dict[str, Any]:
        start = time.perf_counter()
        if self.trainer is None or self.trainer.cell != job.cell:
            self.trainer = None
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self.trainer = self._build(job)
        build_s = time.perf_counter() - start
        # only for what the tables show, which is not the runs that choose the learning rate
        wanted = self.tokenizer is not None and job.seed != plan.TUNING_SEED
        results = self.trainer.run(job, (self.tokenizer, self.args.exact_match) if wanted else None, self.args.evals)
        return job.key | results | {"build_s": build_s, "launch": self.launch} | self.facts

    def _build(self, job: Job) -> Trainer:
        """The trainer of a job's cell; where a step cannot be compiled or captured, without, and a line says so."""
        eager = self.device != "cuda" or job.cell.optimizer == "muon"
        ways = LAUNCHES[-1 if eager else LAUNCHES.index(self.args.launch) :]
        for self.launch in ways:
            torch.manual_seed(0)
            model = copy.deepcopy(self.base).to(self.device)
            try:
                task = self.tasks[job.cell.task]
                return Trainer(model, job.cell, task, job.steps, job.tokens_per_step, self.launch)
            except Exception:
                if self.launch == ways[-1]:
                    raise
                print(f"{job.cell.name}, {job.cell.task} not {self.launch}:\n{traceback.format_exc()}", flush=True)
        raise AssertionError("there is always a way to try")


def _worker(pipe: Connection, args: argparse.Namespace, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        worker = Worker(args)
        pipe.send(None)
        while (job := pipe.recv()) is not None:
            pipe.send(worker(job))
    except Exception:
        pipe.send(traceback.format_exc())


def choose(todo: list[tuple[str, Job]], held: Cell | None, others: set[Cell]) -> Job | None:
    """The next job of a worker that has the model of the cell `held`, while `others` are trained by other workers.

    Of the most important stage that has one: a job of its own cell, else of a cell that nobody has. What others have
    is left to them while there is such a job in a later stage.
    """
    for stage in dict.fromkeys(stage for stage, _ in todo):
        jobs = [job for name, job in todo if name == stage]
        own = [job for job in jobs if job.cell == held]
        free = [job for job in jobs if job.cell not in others]
        if own or free:
            return [*own, *free][0]
    return todo[0][1] if todo else None


def run(args: argparse.Namespace, stages: list[Stage] | None = None) -> Results:
    """Make pending runs until there are none or the budget is used up; returns all results, old and new."""
    start = time.monotonic()
    results = Results()
    if args.results.exists():
        records = read(args.results)
        results = Results(records)
        if not args.results.read_text().endswith("\n"):  # else the next run would be added to half a line
            args.results.write_text("".join(json.dumps(record) + "\n" for record in records))
    names = [Task.load(path).name for path in args.tasks]
    stages = plan.stages(names) if stages is None else stages
    settings = {"steps": args.steps, "tokens_per_step": args.tokens_per_step}
    if not any(plan.pending(stages, settings, results)):
        print(f"{len(results)} runs there, nothing to do")
        return results
    pool = Pool(args)
    build_s, run_s, made = 0.0, 0.0, 0  # the longest so far
    failed: dict[Cell, str] = {}
    try:
        while pool.starting or pool.sent:
            left = args.budget_s - (time.monotonic() - start)
            ready = wait([*pool.starting, *pool.sent], timeout=min(max(left, 0), 1e6))
            if not ready:
                print(f"budget used up; {len(pool.sent)} runs given up", flush=True)
                break
            for pipe in ready:
                try:
                    answer = pipe.recv()
                except EOFError:
                    answer = "it ended without a word, for want of memory perhaps"
                if isinstance(answer, str):
                    print(f"a worker failed:\n{answer}", flush=True)
                    if pipe in pool.starting or not made:  # then it is not a matter of one cell
                        raise RuntimeError(f"a worker failed:\n{answer}")
                    failed[pool.sent[pipe][0].cell] = answer
                    pool.drop(pipe)
                    pool.add()
                    continue
                if answer is None:
                    pool.starting.discard(pipe)
                    continue
                took = time.monotonic() - pool.sent.pop(pipe)[1]
                build_s, run_s = max(build_s, answer["build_s"]), max(run_s, took - answer["build_s"])
                made += 1
                results.add(answer)
                with args.results.open("a") as file:
                    file.write(json.dumps(answer) + "\n")
                _show(answer, time.monotonic() - start)
            for pipe in pool.idle():
                left = args.budget_s - (time.monotonic() - start)
                running = [job for job, _ in pool.sent.values()]
                todo = [
                    (stage, job)
                    for stage, job in plan.pending(stages, settings, results)
                    if job not in running and job.cell not in failed
                ]
                job = choose(todo, pool.held[pipe], {cell for p, cell in pool.held.items() if p is not pipe and cell})
                needed = 1.1 * run_s + (build_s if job is not None and job.cell != pool.held[pipe] else 0)
                if job is not None and made + len(pool.sent) < args.max_runs and left >= needed:
                    pool.send(pipe, job)
    finally:
        pool.close()
    left_over = sum(1 for _ in plan.pending(stages, settings, results))
    print(f"{made} runs made in {time.monotonic() - start:.0f} s, {len(results)} there, {left_over} or more to do")
    if failed:
        raise RuntimeError(f"cells that failed: {', '.join(f'{cell.name}, {cell.task}' for cell in failed)}")
    return results


class Pool:
    """Workers in processes of their own, each at the end of a pipe.

    Attributes:
        starting: those that have not reported ready.
        held: the cell whose model each has.
        sent: those at work -> their job, and when it was sent.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.context = multiprocessing.get_context("spawn")
        self.processes: dict[Connection, Any] = {}
        self.starting: set[Connection] = set()
        self.held: dict[Connection, Cell | None] = {}
        self.sent: dict[Connection, tuple[Job, float]] = {}
        for _ in range(args.workers):
            self.add()

    def add(self) -> None:
        ours, theirs = self.context.Pipe()
        threads = max(torch.get_num_threads() // self.args.workers, 1)
        self.processes[ours] = self.context.Process(target=_worker, args=(theirs, self.args, threads))
        self.processes[ours].start()
        theirs.close()
        self.starting.add(ours)
        self.held[ours] = None

    def idle(self) -> list[Connection]:
        return [pipe for pipe in self.processes if pipe not in self.sent and pipe not in self.starting]

    def send(self, pipe: Connection, job: Job) -> None:
        pipe.send(job)
        self.held[pipe], self.sent[pipe] = job.cell, (job, time.monotonic())

    def drop(self, pipe: Connection) -> None:
        """Forget a worker that has ended."""
        self.processes.pop(pipe).join(timeout=5)
        self.held.pop(pipe)
        self.sent.pop(pipe, None)

    def close(self) -> None:
        for pipe in self.idle():
            pipe.send(None)
        for process in self.processes.values():
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()


def _show(record: dict[str, Any], elapsed: float) -> None:
    cell = Cell(**{field.name: record[field.name] for field in fields(Cell)})
    loss = "diverged" if record["test_loss"] is None else f"{record['test_loss']:.4f}"
    more = "".join(
        f", {name} {record[name]:.3f}" for name in ("accuracy", "exact_match") if record.get(name) is not None
    )
    print(
        f"{elapsed:6.0f} s  {cell.task}, {cell.name}, lr {record['lr']:.3g}, seed {record['seed']}: {loss}{more}"
        f"  [build {record['build_s']:.0f} s, train {record['train_s']:.1f} s, all {record['wall_s']:.1f} s]",
        flush=True,
    )


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a results file; a last line that was cut off is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
