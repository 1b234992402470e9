"""The quality benchmark: what it runs, that it goes on where it stopped, what it trains, and what it concludes."""

import io
import itertools
import json
import math
import multiprocessing
import re
import statistics
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.quality import __main__ as quality
from benchmarks.quality import corpus, runs, stats
from benchmarks.quality import data as quality_data
from benchmarks.quality import plan as quality_plan
from benchmarks.quality import report as quality_report
from benchmarks.quality.data import Task
from benchmarks.quality.generate import Generator
from benchmarks.quality.plan import Results, Stage
from benchmarks.quality.stats import Difference
from benchmarks.quality.train import Cell, Job, Trainer, schedule
from helpers import adapter_parameters, tiny_llama
from peft import GraloraConfig, PeftConfig, get_peft_model
from peft.tuners.gralora.layer import Linear as GraloraLinear

import gralora
from gralora.optimizers import lora_pairs

ROOT = Path(__file__).parents[1]
RUN = {"steps": 4, "tokens_per_step": 32}
LORA, GRID = Cell("python", "lora", 8), Cell("python", "gralora", 8, 2)


def record(job: Job, loss: float | None, **more: Any) -> dict[str, Any]:
    facts = {"card": "none", "torch": "0", "peft": "0", "transformers": "0", "parameters": 1}
    return job.key | {"test_loss": loss, "update_rms": {"1": 1.0}} | facts | more


def finish(stages: list[Stage], loss: Callable[[Job], float | None], results: Results) -> list[Job]:
    """Make what is pending, always the first, until nothing is; returns the jobs in order."""
    made = []
    while todo := next(quality_plan.pending(stages, RUN, results), None):
        made.append(todo[1])
        results.add(record(todo[1], loss(todo[1])))
        assert len(made) < 200
    return made


# The plan


@pytest.mark.parametrize("best", [-4, 0, 3])
def test_learning_rates_enclose_the_best(best: int) -> None:
    """From the first guess to the best and one further on either side, and the seeds at the best alone."""

    def loss(job: Job) -> float | None:
        exponent = math.log2(job.lr / 1e-3)
        return None if exponent > best + 1 else abs(exponent - best)  # what is much too high diverges

    made = finish([Stage("s", (LORA,), seeds=3)], loss, Results())
    tuned = {round(math.log2(job.lr / 1e-3)) for job in made if job.seed == quality_plan.TUNING_SEED}
    assert {best - 1, best, best + 1} <= tuned and tuned == set(range(min(tuned), max(tuned) + 1))
    seeds = [job for job in made if job.seed != quality_plan.TUNING_SEED]
    assert [job.seed for job in seeds] == [1, 2, 3] and all(job.lr == 1e-3 * 2.0**best for job in seeds)


def test_plan_goes_on_from_results_and_repeats_nothing() -> None:
    stages = [Stage("s", (LORA, GRID), seeds=2)]
    whole, half = Results(), Results()
    made = finish(stages, lambda job: abs(job.lr - 1e-3), whole)
    assert len(made) == len(set(made)) == len(whole)
    for job in made[: len(made) // 2]:
        half.add(json.loads(json.dumps(record(job, abs(job.lr - 1e-3)))))
    assert finish(stages, lambda job: abs(job.lr - 1e-3), half) == made[len(made) // 2 :]


def test_one_rate_is_not_enclosed() -> None:
    """Before a later stage encloses it."""
    stages = [Stage("one", (LORA,), 0, exponents=(2,), enclose=False), Stage("s", (GRID, LORA), 0)]
    made = finish(stages, lambda job: abs(math.log2(job.lr / 1e-3)), Results())
    assert [job.cell for job in made[:2]] == [LORA, GRID] and made[0].lr == 4e-3
    assert {round(math.log2(job.lr / 1e-3)) for job in made if job.cell == LORA} == {-1, 0, 1, 2}


def test_real_plan_ends_and_has_equal_parameters() -> None:
    """Every stage of the real plan is reached; adapters of one rank have equal trainable parameters."""
    stages = quality_plan.stages(quality_report.TASKS)
    made = finish_limited(stages)
    assert {job.cell for job in made} == {cell for stage in stages for cell in stage.cells}
    counts: dict[int, set[int]] = {}
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_attention_heads=8, num_key_value_heads=8)
    for cell in {job.cell for job in made if job.cell.method != "full"}:
        adapted = get_peft_model(model, cell.config())
        counts.setdefault(cell.r, set()).add(sum(p.numel() for p in adapter_parameters(adapted).values()))
        model = adapted.unload()
    assert {16, 64, 128, 256} == counts.keys() and all(len(count) == 1 for count in counts.values())


def finish_limited(stages: list[Stage]) -> list[Job]:
    results, made = Results(), []
    while todo := [job for _, job in quality_plan.pending(stages, RUN, results)]:
        made += todo
        for job in todo:
            results.add(record(job, abs(math.log2(job.lr / 2e-3))))
    return made


def test_worker_keeps_its_model() -> None:
    """A worker gets jobs of the cell that it has built, then of one that nobody has."""
    jobs = {(cell, e): quality_plan.job(cell, e, 0, RUN) for cell in (LORA, GRID) for e in (0, 1)}
    todo = [("s", job) for job in jobs.values()]
    assert runs.choose(todo, GRID, {LORA}) == jobs[GRID, 0]
    assert runs.choose(todo, None, {LORA}) == jobs[GRID, 0]
    assert runs.choose(todo, None, set()) == jobs[LORA, 0]
    assert runs.choose(todo[:1], None, {LORA}) == jobs[LORA, 0]  # rather than nothing
    later = [("s", jobs[LORA, 0]), ("t", jobs[GRID, 0]), ("u", quality_plan.job(Cell("python", "full"), 0, 0, RUN))]
    assert runs.choose(later, Cell("python", "full"), {LORA}) == jobs[GRID, 0]  # what matters more goes first
    assert runs.choose([], LORA, set()) is None


def test_a_step_that_cannot_be_compiled_is_captured(task: Task, capsys: Any, monkeypatch: Any) -> None:
    def build(model: Any, cell: Cell, task: Task, steps: int, tokens: int, launch: str) -> Trainer:
        if launch == "compiled":
            raise RuntimeError("no compiler")
        return Trainer(model, cell, task, steps, tokens, "eager")

    monkeypatch.setattr(runs, "Trainer", build)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)
    worker = object.__new__(runs.Worker)
    worker.args = quality.parser().parse_args(["run", "--model", "m", "--tasks", "t", "--results", "r"])
    worker.device, worker.base, worker.tasks = "cuda", tiny_llama(num_hidden_layers=1), {"python": task}
    worker.trainer, worker.tokenizer, worker.facts = None, None, {}
    result = worker(quality_plan.job(LORA, 0, 0, RUN))
    assert result["launch"] == "graph" and result["test_loss"] and result["build_s"] > 0
    assert "LoRA r=8, python not compiled" in capsys.readouterr().out


# Training


@pytest.fixture
def task() -> Task:
    tokens = np.random.default_rng(0).integers(1, 32, (24, 17)).astype(np.uint16)
    mask = np.ones(tokens.shape, bool)
    mask[:, :5] = False
    return Task("python", tokens[:16], mask[:16], tokens[16:], mask[16:])


def trainer(cell: Cell, task: Task, steps: int = 4) -> Trainer:
    return Trainer(tiny_llama(num_hidden_layers=1), cell, task, steps, RUN["tokens_per_step"], "eager")


@pytest.mark.parametrize("cell", [LORA, GRID, Cell("python", "gralora", 8, 4, 4), Cell("python", "full")], ids=str)
def test_loss_is_the_models_own(cell: Cell, task: Task) -> None:
    """Held-out loss and gradient agree with transformers' loss on labels that leave out what is masked."""
    own = trainer(cell, task)
    tokens = torch.from_numpy(task.test_tokens.astype(np.int64))
    labels = tokens.masked_fill(torch.from_numpy(~task.test_mask), -100)
    theirs = own.lm(input_ids=tokens, labels=labels, use_cache=False).loss
    assert own.test()["test_loss"] == pytest.approx(theirs.item(), abs=1e-5)
    rows = own.row_losses(tokens, torch.from_numpy(task.test_mask))
    ours = torch.autograd.grad(rows.sum() / task.test_mask[:, 1:].sum(), own.trainable)
    for a, e in zip(ours, torch.autograd.grad(theirs, own.trainable), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-5)


def test_runs_are_those_of_a_plain_loop(task: Task) -> None:
    """After an earlier run, a run is what a loop over torch's AdamW gives from the same start and rows."""
    cell = Cell("python", "gralora", 8, 2, 4)
    own = trainer(cell, task)
    own.run(Job(cell, 1e-1, 1, **RUN))
    result = own.run(Job(cell, 1e-2, 2, **RUN), evals=2)
    other = trainer(cell, task)
    other.reset(1e-2, 2)
    optimizer = torch.optim.AdamW(other.trainable, weight_decay=0.0)
    for step in range(4):
        if step == 2:
            assert result["test_curve"] == {"2": pytest.approx(other.test()["test_loss"], abs=1e-6)}
        optimizer.param_groups[0]["lr"] = 1e-2 * schedule(step, 4)
        rows = other.order[step]
        loss = other.row_losses(other.tokens[rows], other.mask[rows]).sum() / other.mask[rows][:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert result["test_loss"] == pytest.approx(other.test()["test_loss"], abs=1e-6)
    assert result["update_rms"]["4"] == pytest.approx(other.update_rms(), rel=1e-4)


def test_start_is_pefts(task: Task) -> None:
    """A has the spread of PEFT's initialisation, times the cell's factor, B is zero; seeds differ, the same repeat."""
    fresh = trainer(GRID, task)
    drawn = trainer(GRID, task)
    for layer, ours in zip(fresh.adapted, drawn.adapted, strict=True):
        ours.lora_A["default"].weight.data.zero_()
        assert not layer.lora_B["default"].weight.any()
    drawn.reset(1e-3, 0)
    for layer, ours in zip(fresh.adapted, drawn.adapted, strict=True):
        theirs, mine = layer.lora_A["default"].weight.detach(), ours.lora_A["default"].weight.detach()
        assert mine.abs().max() == pytest.approx(theirs.abs().max().item(), rel=0.1)
        assert mine.std() == pytest.approx(theirs.std().item(), rel=0.2)
    first = [p.clone() for p in drawn.trainable]
    drawn.reset(1e-3, 1)
    assert not torch.equal(first[0], drawn.trainable[0])
    drawn.reset(1e-3, 0)
    assert all(map(torch.equal, first, drawn.trainable))
    smaller = trainer(Cell("python", "gralora", 8, 2, 0, 1.0, 0.5), task)
    smaller.reset(1e-3, 0)
    torch.testing.assert_close(smaller.trainable[0], first[0] / 2)


def test_rows_are_the_same_for_all_methods(task: Task) -> None:
    orders = []
    for cell in (LORA, Cell("python", "full")):
        own = trainer(cell, task)
        own.reset(1e-3, 5)
        orders.append(own.order.clone())
        own.reset(1e-3, 6)
        assert not torch.equal(own.order, orders[-1])
    assert torch.equal(*orders)


def test_accuracy_is_of_the_likeliest_answer(task: Task) -> None:
    """Of three questions with candidates of known loss, two are answered right."""
    own = trainer(LORA, task)
    own.task = Task(
        "choice", task.train_tokens, task.train_mask, task.test_tokens[:6], task.test_mask[:6],
        np.array([0, 0, 1, 1, 2, 2]), np.array([True, False, False, True, True, False]),
    )  # fmt: skip
    own.test_tokens, own.test_mask = own.test_tokens[:6], own.test_mask[:6]
    losses = torch.tensor([1.0, 2.0, 5.0, 3.0, 9.0, 8.0, 0.0, 0.0])
    own.test_step = lambda: losses[own.test_rows]
    results = own.test()
    assert results["accuracy"] == pytest.approx(2 / 3)
    assert results["test_loss"] == pytest.approx((1 + 3 + 9) / (3 * 12))


class Numbers:
    """A tokenizer to which a reply is the number of its tokens before the end, in GSM8K's format."""

    def decode(self, tokens: np.ndarray) -> str:
        return f"thus #### 1,{len(tokens):03}"

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["#### 1012", "#### 12", "1009"][: len(rows)]


def test_exact_match_compares_the_final_numbers(task: Task) -> None:
    """Prompts are the tokens before the answer; right is the reply with the answer's number."""
    own = trainer(LORA, task)
    own.task.test_mask[1, :8] = False  # a longer prompt than the others'
    assert own.exact_match(Numbers(), 3) == pytest.approx(1 / 3)
    prompts = [task.test_tokens[row][:length].tolist() for row, length in enumerate([5, 8, 5])]
    assert [row[8 - n :].tolist() for row, n in zip(own.generator.prompts, (5, 8, 5), strict=True)] == prompts
    assert own.generator.end == task.test_tokens[0, -1] and own.generator.new_tokens == 192


@pytest.mark.parametrize("cell", [LORA, Cell("python", "gralora", 8, 4, 4), Cell("python", "full")], ids=str)
def test_generation_is_transformers_own(cell: Cell) -> None:
    """Of prompts of several lengths, twice, with weights that changed in between; a reply ends early."""
    torch.manual_seed(0)
    model = tiny_llama(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, initializer_range=0.3)
    lm = model if cell.method == "full" else get_peft_model(model, cell.config()).base_model.model
    lm.eval()
    prompts = [torch.randint(1, lm.config.vocab_size, (n,)).tolist() for n in (3, 9, 5, 12, 1, 7)]
    end = Generator(lm, prompts, new_tokens=24, end=0)()[0][4]  # ends a reply of the first round
    generator = Generator(lm, prompts, new_tokens=24, end=end)
    for number in range(2):
        ended = 0
        for prompt, reply in zip(prompts, generator(), strict=True):
            ids = torch.tensor([prompt])
            options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
            theirs = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
            ended += len(theirs) < 24
            assert reply == theirs.tolist() + [end] * (24 - len(theirs))
        assert ended or number
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.3)


def test_runs_made_are_kept_and_skipped(tmp_path: Path, task: Task, capsys: Any, monkeypatch: Any) -> None:
    """The pool of workers, stopped after some runs, goes on from the file, even if its last line was cut off."""
    forked = multiprocessing.get_context("fork")  # a new interpreter would import for ten seconds
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forked)
    task.save(tmp_path / "task.npz")
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    arguments = ["run", "--model", str(tmp_path / "model"), "--tasks", str(tmp_path / "task.npz"), "--workers", "1"]
    arguments += ["--results", str(tmp_path / "r.jsonl"), "--steps", "4", "--tokens_per_step", "32"]
    stages = [Stage("s", (LORA,), seeds=0, exponents=(0, 1))]
    done = [quality_plan.job(LORA, e, 0, RUN) for e in (0, 1)]
    lines = [json.dumps(record(job, loss)) + "\n" for job, loss in zip(done, (2.0, 3.0), strict=True)]
    (tmp_path / "r.jsonl").write_text("".join(lines) + lines[0][:40])
    results = runs.run(quality.parser().parse_args([*arguments, "--max_runs", "1"]), stages)
    assert len(results) == 3 and "1 runs made" in capsys.readouterr().out
    (new,) = [r for r in results if r["lr"] == 5e-4]
    assert (
        2 < new["test_loss"] < 5
        and new["start_loss"] > new["test_loss"]
        and set(new["update_rms"]) == {"1", "4"}
        and new["parameters"] > 0
    )
    assert [r["lr"] for r in runs.read(tmp_path / "r.jsonl")] == [1e-3, 2e-3, 5e-4]


def test_a_cell_that_fails_is_left_out_and_named(tmp_path: Path, task: Task, capsys: Any, monkeypatch: Any) -> None:
    """The other cells' runs are made, by a new worker if need be, and the call fails at its end."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method, get=multiprocessing.get_context: get("fork"))
    task.save(tmp_path / "task.npz")
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    arguments = ["run", "--model", str(tmp_path / "model"), "--tasks", str(tmp_path / "task.npz"), "--workers", "1"]
    arguments += ["--results", str(tmp_path / "r.jsonl"), "--steps", "2", "--tokens_per_step", "32"]
    bad = Cell("python", "gralora", 8, 7)  # 7 divides nothing here
    stages = [Stage(str(cell), (cell,), 0, exponents=(0,)) for cell in (LORA, bad, GRID)]
    with pytest.raises(RuntimeError, match=r"cells that failed: GraLoRA k=7 r=8, python"):
        runs.run(quality.parser().parse_args(arguments), stages)
    made = {(r["method"], r["k"]) for r in runs.read(tmp_path / "r.jsonl")}
    assert made == {("lora", 1), ("gralora", 2)} and "gralora_k=7" in capsys.readouterr().out


@pytest.mark.slow
def test_tiny_does_all_of_it(capsys: Any) -> None:
    """`quality.py --tiny`, with workers of their own interpreters: data, runs, report."""
    quality.main(["--tiny"])
    text = capsys.readouterr().out
    assert "0 or more to do" in text and "GraLoRA k=2 r=8 against LoRA r=8" in text and "diverged" not in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["lora_ga", "corda", "eva", "pissa", "orthogonal"])
def test_initialised_run_starts_at_the_model(init: str, task: Task) -> None:
    """LoRA and grid alike; the second run starts where the first did, though the seed is another."""
    for cell in (LORA, GRID):
        own = trainer(replace(cell, r=4, init=init), task)
        plain = trainer(replace(cell, r=4), task).test()["test_loss"]
        first = own.run(Job(own.cell, 1e-2, 1, **RUN))
        assert first["start_loss"] == pytest.approx(plain, abs=1e-4)
        assert len(first["curve"]) == 4 and init in own.cell.name
        own.reset(1e-2, 2)
        assert own.test()["test_loss"] == pytest.approx(plain, abs=1e-4)
        assert all(map(torch.equal, own.trainable, own.start))


def test_loraplus_gives_B_another_rate(task: Task) -> None:
    """A run with ratio 4 is one of torch's AdamW with two groups."""
    cell = replace(GRID, ratio=4.0)
    result = trainer(cell, task).run(Job(cell, 1e-2, 2, **RUN))
    other = trainer(cell, task)
    other.reset(1e-2, 2)
    parts = [[p for n, p in other.lm.named_parameters() if f".lora_{f}." in n] for f in "AB"]
    optimizer = torch.optim.AdamW([{"params": part} for part in parts], weight_decay=0.0)
    for step in range(4):
        for group, factor in zip(optimizer.param_groups, (1, 4), strict=True):
            group["lr"] = 1e-2 * factor * schedule(step, 4)
        rows = other.order[step]
        optimizer.zero_grad()
        (other.row_losses(other.tokens[rows], other.mask[rows]).sum() / other.mask[rows][:, 1:].sum()).backward()
        optimizer.step()
    assert result["test_loss"] == pytest.approx(other.test()["test_loss"], abs=1e-6)
    assert "LoRA+ x4" in cell.name


def test_muon_is_a_plain_loop(task: Task) -> None:
    """The second run of a trainer is a loop over a new LoRA-Muon, so its averages began anew."""
    cell = replace(GRID, optimizer="muon")
    own = trainer(cell, task)
    own.run(Job(cell, 1e-1, 1, **RUN))
    result = own.run(Job(cell, 1e-2, 2, **RUN))
    other = trainer(cell, task)
    other.reset(1e-2, 2)
    optimizer = gralora.create_muon_optimizer(other.lm, lr=1e-2)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 * schedule(step, 4)
        rows = other.order[step]
        optimizer.zero_grad()
        (other.row_losses(other.tokens[rows], other.mask[rows]).sum() / other.mask[rows][:, 1:].sum()).backward()
        optimizer.step()
    assert result["test_loss"] == pytest.approx(other.test()["test_loss"], abs=1e-5)
    assert result["update_rms"]["4"] == pytest.approx(other.update_rms(), rel=1e-3) and "muon" in cell.name
    with pytest.raises(ValueError, match="--launch eager"):
        Trainer(tiny_llama(num_hidden_layers=1), cell, task, 4, 32, "graph")


def test_range_of_good_learning_rates() -> None:
    """Up to where the loss crosses 1%, between two rates; open where the last is good; a diverged one ends it."""
    own = stats.Runs(LORA, 4, {1e-3: 2.0, 2e-3: 2.01, 4e-3: 2.03, 5e-4: 2.0, 2.5e-4: math.inf})
    low, high = own.good_rates()
    assert low == 5e-4 and high == pytest.approx(2e-3 * 2**0.5)
    assert stats.Runs(LORA, 4, {1e-3: 2.0, 2e-3: 2.01}).good_rates() == (None, None)
    text = "\n".join(quality_report.widths({LORA: own}))
    assert "| 0.0005 | 0.00283 | 5.7 |" in text


def test_a_start_is_compared_with_the_same_start_of_lora() -> None:
    cells = [LORA, replace(LORA, init="pissa"), replace(GRID, init="pissa"), GRID, replace(GRID, ratio=4.0)]
    every = {cell: stats.Runs(cell, 4, {1e-3: 2.0}) for cell in cells}
    found = [stats.baseline(cell, every) for cell in cells[2:]]
    assert [own.cell for own in found if own] == [cells[1], LORA, LORA]
    assert "pissa" in stats.Runs(replace(GRID, init="pissa", scale=2**0.5), 4).name


# Data


def archive(folder: Path, name: str, metadata: str, files: dict[str, str]) -> None:
    """A wheel, or by its name a source distribution."""
    folder.mkdir(exist_ok=True)
    if name.endswith(".whl"):
        with zipfile.ZipFile(folder / name, "w") as wheel:
            for path, text in files.items() | {"a.dist-info/METADATA": metadata}.items():
                wheel.writestr(path, text)
        return
    with tarfile.open(folder / name, "w:gz") as sdist:
        for path, text in files.items() | {"PKG-INFO": metadata}.items():
            member = tarfile.TarInfo(f"a-1/{path}")
            member.size = len(text)
            sdist.addfile(member, io.BytesIO(text.encode()))


def test_corpus_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not downloaded again, files of other kinds and outside of the archive are left out."""
    monkeypatch.setattr(corpus.subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was called"))
    monkeypatch.setattr(corpus, "requirements", lambda domain: ["some-name==1.0"])
    permissive = "Metadata-Version: 2.1\nClassifier: License :: OSI Approved :: MIT License\n"
    files = {"a/m.py": "x = 1", "a/data.bin": "1", "../../escaped.py": "y = 2", "doc/index.rst": "Words"}
    archive(tmp_path / "wheels", "some_name-1.0-py3-none-any.whl", permissive, files)
    archive(tmp_path / "sdists", "Some.Name-1.0.tar.gz", permissive, files)
    found = {domain: corpus.fetch(domain, tmp_path) for domain in corpus.DOMAINS}
    kept = {d: {str(p.relative_to(f / "some-name")) for p in f.rglob("*.*")} for d, f in found.items()}
    assert kept == {"source": {"a/m.py"}, "docs": {"doc/index.rst"}}
    assert (found["source"] / "some-name/a/m.py").read_text() == "x = 1"


@pytest.mark.parametrize(
    "metadata",
    [
        "License-Expression: GPL-3.0-only\n",
        "License: Mine\n",
        "Classifier: License :: OSI Approved :: BSD License\nClassifier: License :: OSI Approved :: LGPLv3+\n",
        "Name: a\n",
    ],
)
def test_only_permissive_licences_are_read(metadata: str, tmp_path: Path) -> None:
    archive(tmp_path / "wheels", "a-1-py3-none-any.whl", metadata, {"a/m.py": "x = 1"})
    with pytest.raises(ValueError, match="a-1-py3-none-any.whl: its metadata have the licence"):
        corpus.unpack(tmp_path / "wheels" / "a-1-py3-none-any.whl", tmp_path / "out", (".py",))
    assert not (tmp_path / "out").exists()


def test_lists_of_packages_have_both_parts() -> None:
    """Versions are fixed, and there are packages to train on and to hold out."""
    for domain in corpus.DOMAINS:
        names = [requirement.partition("==") for requirement in corpus.requirements(domain)]
        assert all(version for _, _, version in names) and len(set(names)) == len(names)
        assert {quality_data.held_out(name) for name, _, _ in names} == {True, False}


def test_python_is_held_out_by_package(tmp_path: Path) -> None:
    """No text of a held-out package is trained on; vendored copies and tests are left out."""
    for number in range(40):
        folder = tmp_path / f"package{number}"
        for name in ("", "tests/", "_vendor/"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            letter = chr(ord("A") + number) if not name else "x"
            (folder / name / "m.py").write_text(letter * 50)
    made = quality_data.text_task("python", [tmp_path], lambda text: list(text.encode()), 0, 10, 50, 3, per_package=25)
    train, test = (set(np.unique(t)) - {0} for t in (made.train_tokens, made.test_tokens))
    assert not train & test and ord("x") not in train | test
    assert all(quality_data.held_out(f"package{letter - ord('A')}") for letter in test)
    with pytest.raises(ValueError, match="fewer than 5000"):
        quality_data.text_task("python", [tmp_path], lambda text: list(text.encode()), 0, 10, 5000, 3, per_package=25)


def test_fewer_rows_are_a_part_with_the_same_test(task: Task) -> None:
    part = quality_data.fewer_rows(task, 5)
    rows = {row.tobytes() for row in task.train_tokens}
    assert part.name == f"{task.name}-5" and len(part.train_tokens) == len(part.train_mask) == 5
    assert all(row.tobytes() in rows for row in part.train_tokens)
    assert np.array_equal(part.test_tokens, task.test_tokens)
    with pytest.raises(ValueError, match="--train_rows 10000"):
        quality_data.fewer_rows(task, 10000)


def test_questions_count_answers_only(tmp_path: Path) -> None:
    line = json.dumps({"question": "2+2?", "answer": "2+2=4\n#### 4"})
    (tmp_path / "t.jsonl").write_text(line + "\n" + json.dumps({"question": "q" * 200, "answer": "#### 1"}) + "\n")
    with pytest.warns(UserWarning, match="left out 1 of 2 rows over 60 tokens"):
        made = quality_data.gsm8k_task(*[tmp_path / "t.jsonl"] * 2, lambda text: list(text.encode()), 0, 60)
    counted = bytes(made.test_tokens[0][made.test_mask[0]].tolist())
    assert counted == b" 2+2=4\n#### 4\0" and len(made.test_tokens) == 1
    assert quality_data.gsm8k_number("so #### 1,234") == "1234" and quality_data.gsm8k_number("no") is None


def test_choice_has_a_row_for_every_answer(tmp_path: Path) -> None:
    fields = {"instruction": "Which?\n\nAnswer format: answer1/answer2/answer3", "output": "it is answer2"}
    (tmp_path / "c.json").write_text(json.dumps([fields | {"answer": "answer2"}]))
    encode = lambda text: list(text.encode())  # noqa: E731
    made = quality_data.choice_task([tmp_path / "c.json"], tmp_path / "c.json", encode, 0, 80)
    rows = [bytes(row[mask].tolist()) for row, mask in zip(made.test_tokens, made.test_mask, strict=True)]
    assert rows == [b"it is answer1\0", b"it is answer2\0", b"it is answer3\0"]
    assert made.test_right.tolist() == [False, True, False] and made.test_question.tolist() == [0, 0, 0]
    (tmp_path / "c.json").write_text(json.dumps([fields | {"answer": "answer9"}]))
    with pytest.raises(ValueError, match="answer9"):
        quality_data.choice_task([tmp_path / "c.json"], tmp_path / "c.json", encode, 0, 80)


# Conclusions


def results_with(grid: list[float], lora: list[float]) -> Results:
    """A grid and a LoRA, tuned to 1e-3, with these losses for the other seeds."""
    results = Results()
    for cell, losses in ((GRID, grid), (LORA, lora)):
        for exponent, loss in ((-1, 2.0), (0, 0.5), (1, None)):
            results.add(record(quality_plan.job(cell, exponent, 0, RUN), loss))
        for seed, loss in enumerate(losses, start=1):
            results.add(record(quality_plan.job(cell, 0, seed, RUN), loss))
    return results


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [([-0.1, -0.11, -0.09], "better"), ([0.1, 0.11, 0.09], "worse"), ([0.1, -0.11, 0.09], "tie"), ([-0.1], "open")],
)
def test_verdicts_are_paired_by_seed(tmp_path: Path, shift: list[float], verdict: str) -> None:
    """Seeds that differ more than methods hide nothing; a single seed decides nothing."""
    lora = [1.0, 3.0, 2.0][: len(shift)]
    results = results_with([a + b for a, b in zip(lora, shift, strict=True)], lora)
    runs = stats.collect(results)
    assert stats.difference(runs[GRID], runs[LORA]).verdict == verdict
    text = quality_report.write(results, tmp_path / "q.md")
    assert f"GraLoRA k=2 r=8 against LoRA r=8: **{verdict}**" in text == (tmp_path / "q.md").read_text()
    holds = "GraLoRA k=2 r=8, python" if verdict in ("better", "worse") else "none"
    assert f"all {int(verdict != 'open')} taken together, at 5% (Holm): {holds}." in text
    assert (tmp_path / "q-python.svg").stat().st_size > 1000


def test_scores_are_better_when_higher(tmp_path: Path) -> None:
    """A lower loss and a higher exact match, each with its own verdict and interval."""
    results = results_with([0.9, 1.9, 2.8], [1.0, 2.0, 3.0])
    for each in list(results):
        if each["seed"]:
            score = 0.5 + each["seed"] / 100 + (0.1 + each["seed"] / 1000) * (each["method"] == "gralora")
            results.add(each | {"exact_match": score, "start_exact_match": 0.25})
    text = quality_report.write(results, tmp_path / "q.md")
    assert "**better**, -0.1333 ± 0.1434" not in text and "**tie**, -0.1333 ± 0.1434 (3 seeds, p = 0.057)" in text
    assert "exact match +0.1020 ± 0.0025, better" in text and "exact match 0.2500" in text


def test_others_are_those_of_equal_parameters_or_equal_rank() -> None:
    grid, hybrid = Cell("python", "gralora", 64, 4), Cell("python", "gralora", 64, 4, 32)
    lora = {r: Cell("python", "lora", r) for r in (16, 64, 128, 160, 256)}
    assert [r for r, other in lora.items() if quality_report.comparable(grid, other)] == [64, 256]
    assert [r for r, other in lora.items() if quality_report.comparable(hybrid, other)] == [64, 160]
    assert quality_report.comparable(grid, Cell("python", "rslora", 64))
    assert not quality_report.comparable(grid, Cell("python", "rslora", 256))
    assert quality_report.comparable(grid, Cell("python", "full"))


def test_between_is_what_a_parabola_goes_below() -> None:
    """Of loss (log2 lr - 0.2)^2, tried at -1, 0 and 1: 0.04 below the best. None at an edge."""
    runs = stats.Runs(LORA, 4, {1e-3 * 2.0**e: (e - 0.2) ** 2 for e in (-1, 0, 1)})
    assert runs.between == pytest.approx(0.04)
    del runs.tuning[2e-3]
    assert runs.between is None


def test_matched_is_compared_with_loras_scaling_at_loras_rate(tmp_path: Path) -> None:
    """LoRA's best is 1e-3, the plain grid's 2e-3: the table has the matched grid against it at both."""
    results = results_with([], [1.0, 2.0, 3.0])
    scaled = quality_plan.grid("python", 8, 2, power=0.5)
    for cell, best, gain in ((GRID, 1, 0.0), (scaled, 0, 0.2)):
        for exponent in (-1, 0, 1, 2):
            results.add(record(quality_plan.job(cell, exponent, 0, RUN), 0.5 + abs(exponent - best)))
        for exponent in {0, best}:
            for seed in (1, 2, 3):
                loss = seed - gain + 0.1 * abs(exponent - best)
                results.add(record(quality_plan.job(cell, exponent, seed, RUN), loss))
    text = quality_report.write(results, tmp_path / "q.md").partition("## How wide")[0]
    (row,) = [line for line in text.splitlines() if line.startswith("| python | GraLoRA k=2 r=8, matched | 0.001")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[3:5] == ["0.001", "+0.0000"] and cells[5:7] == ["-0.2000 ± 0.0000 (3)", "better"]
    assert cells[7:] == ["-0.3000 ± 0.0000 (3)", "better", "-0.2000 ± 0.0000 (3)", "better"]


def test_intervals_are_students() -> None:
    """Three values 1, 2, 3: 4.303 / sqrt(3) times their deviation of 1."""
    assert stats.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3))
    assert stats.half_width([1.0]) is None and stats.half_width([1.0, math.inf]) is None


def shifted(t: float, pairs: int) -> Difference:
    """A difference whose mean is t standard errors from 0."""
    values = [float(number) for number in range(pairs)]
    error = statistics.stdev(values) / math.sqrt(pairs)
    return Difference(tuple(value - statistics.mean(values) + t * error for value in values))


STUDENTS = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 20: 2.086, 30: 2.042}
"""Degrees of freedom -> end of the 95% interval, as printed in statistical tables."""


@pytest.mark.parametrize("degrees", STUDENTS)
def test_p_and_interval_are_students(degrees: int) -> None:
    """At the ends of the 95% interval p is 5%, for as many seeds as one likes."""
    for sign in (-1, 1):
        found = shifted(sign * STUDENTS[degrees], degrees + 1)
        assert found.p == pytest.approx(0.05, abs=1e-4)
        assert found.half == pytest.approx(abs(found.mean), rel=1e-3)
    assert Difference((0.25, 0.25)).p == 0 and Difference((0.0, 0.0)).p == 1


def test_what_holds_together_is_holms() -> None:
    """Of three at 5%, the first needs a third of it, the second half: one that does not hold ends it."""
    small, middle, large = (shifted(t, 4) for t in (-20, 4, 3.3))
    assert small.p < 0.05 / 3 and 0.05 / 2 < middle.p < large.p < 0.05
    assert stats.holds_together([large, small, middle]) == [small]
    assert stats.holds_together([middle, small]) == [small, middle]
    assert stats.holds_together([middle, large]) == []


def test_fewer_rows_are_beside_all(tmp_path: Path) -> None:
    """With fewer rows 2.5e-4 is best; all rows' best, 1e-3, was tried with LoRA, for the grid 5e-4 is nearest."""
    results = results_with([], [])
    for cell, exponents in ((LORA, (-3, -2, -1, 0)), (GRID, (-3, -2, -1))):
        for e in exponents:
            results.add(record(quality_plan.job(replace(cell, task="python-800"), e, 0, RUN), 1 + abs(e + 2)))
    lines = quality_report.write(results, tmp_path / "q.md").splitlines()
    assert "| python-800 | LoRA r=8 | 0.001 | 0.00025 | 1.0000 | 3.0000 |" in lines
    assert "| python-800 | GraLoRA k=2 r=8 | 0.001 | 0.00025 | 1.0000 | 2.0000 at 0.0005, the nearest tried |" in lines


def test_tasks_have_steps_ranks_and_learning_curves_of_their_own(tmp_path: Path) -> None:
    """A task of longer runs beside a shorter one; the losses on the way are those at the best rate."""
    results, much = results_with([], []), {"steps": 8, "tokens_per_step": 32}
    for r, level in ((8, 2.0), (64, 1.5)):
        for cell in (Cell("source", "lora", r), quality_plan.grid("source", r, 2 if r == 8 else 4, power=0.5)):
            for e in (-1, 0, 1):
                on_the_way = {"test_curve": {"2": level + 0.5 + e, "4": level + 0.25 + e}}
                results.add(record(quality_plan.job(cell, e, 0, much), level + abs(e), **on_the_way))
    results.add(record(quality_plan.job(LORA, 3, 0, much), 0.1))  # a run of a task's that was made with other steps
    text = quality_report.write(results, tmp_path / "q.md")
    assert "- 12 runs of 8 steps of 32 tokens" in text and "- 6 runs of 4 steps of 32 tokens" in text
    assert "| LoRA r=64 | 2.0000 | 1.7500 | 1.5000 |" in text and "| LoRA r=8 | 8.4000" not in text
    assert (tmp_path / "q-source-rank.svg").stat().st_size > 1000 and not (tmp_path / "q-python-rank.svg").exists()


def test_tuning_seed_decides_nothing(tmp_path: Path) -> None:
    text = quality_report.write(results_with([], []), tmp_path / "q.md")
    assert "nothing is decided" in text


# The documentation


def test_configuration_for_pefts_comparison(recwarn: pytest.WarningsRecorder) -> None:
    """PEFT reads it whole, as its own GraLoRA, and the scaling is ours of LoRA's lora_alpha = 2 r there, matched."""
    (folder,) = (ROOT / "configs" / "method_comparison" / "MetaMathQA" / "experiments" / "gralora").iterdir()
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, GraloraConfig) and not [w for w in recwarn if "nexpected" in str(w.message)]
    written = json.loads((folder / "adapter_config.json").read_text())
    assert {name: getattr(config, name) for name in ("alpha", "r", "gralora_k", "hybrid_r", "target_modules")} == {
        name: written[name] for name in ("alpha", "r", "gralora_k", "hybrid_r", "target_modules")
    }
    theirs = get_peft_model(tiny_llama(), config)
    ours = gralora.LoraConfig(
        use_gralora=True,
        r=64,
        lora_alpha=128,
        gralora_k="auto",
        gralora_scaling="matched",
        target_modules="all-linear",
    )
    (scaling,) = {m.scaling["default"] for m in theirs.modules() if isinstance(m, GraloraLinear)}
    scalings = {pair.scaling for pair in lora_pairs(get_peft_model(tiny_llama(), ours))}
    assert scalings == {scaling} == {4.0}


@pytest.fixture(scope="module")
def published() -> Results:
    return Results(r for path in (ROOT / "benchmarks" / "results").glob("quality-*.jsonl") for r in runs.read(path))


def test_page_is_that_of_the_results(published: Results, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    assert quality_report.write(published, tmp_path / "quality.md") == page


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md", "docs/gralora.md"])
def test_quoted_differences_are_in_the_results(published: Results, page: str) -> None:
    """Each "-0.0094 ± 0.0018" is a difference of two methods on one task, at some learning rates; the sign may be in
    words, as in "0.0070 ± 0.0011 below"."""
    runs = stats.collect(published).values()
    pairs = [(a, b) for a, b in itertools.permutations(runs, 2) if a.cell.task == b.cell.task]
    rates = {own.cell: {r["lr"] for r in own.records if r["seed"] != quality_plan.TUNING_SEED} for own in runs}
    known = {
        str(stats.difference(a, b, at=at)) for a, b in pairs for at in itertools.product(rates[a.cell], rates[b.cell])
    }
    quoted = re.findall(r"[-+]?\d\.\d{4} ± \d\.\d{4}", (ROOT / page).read_text(encoding="utf-8"))
    assert quoted and not {q if q[0] in "-+" else f"-{q}" for q in quoted} - known
