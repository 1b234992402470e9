"""`gralora tune`: candidates trained side by side are what they are alone, and the worse ones are stopped."""

import csv
import itertools
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
import yaml
from benchmarks.tuning import is_measured, judged, picked, recorded
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from gralora.checkpoints.files import locked
from gralora.tool import cli
from gralora.tool.finetune import finetune, read_arguments
from gralora.tool.tune import main, shares
from gralora.tool.tuning import run
from gralora.tool.tuning.lockstep import LockstepTrainer, Rungs, fastest_together
from gralora.tool.tuning.report import certainty, is_worse
from gralora.tool.tuning.search import JOURNAL, Search, values, wait_for_study

RATES = "0.002,0.03,0.01,2"
pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without use_gralora")


@pytest.fixture(scope="module")
def flags(tiny_model, tmp_path_factory) -> list[str]:
    """Of a training whose clipping, accumulation and weight decay all have an effect."""
    words = ["".join(letters) for letters in itertools.product("abcd", repeat=3)]
    rows = [{"instruction": f"Repeat {word}", "output": word * (1 + i % 5)} for i, word in enumerate(words)]
    data = tmp_path_factory.mktemp("data") / "words.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--base_model", str(tiny_model), "--data_path", str(data), "--use_gralora", "--gralora_k", "2"]
    flags += ["--lora_r", "8", "--lora_target_modules", "all-linear", "--max_steps", "10", "--batch_size", "8"]
    flags += ["--micro_batch_size", "4", "--max_seq_length", "100", "--val_set_size", "12", "--max_grad_norm", "0.2"]
    return [*flags, "--weight_decay", "0.1", "--disable_tqdm", "true"]


def tune(flags: list[str], folder: Path, *more: object) -> dict:
    main([*flags, "--study_dir", str(folder), *map(str, more)])
    return json.loads((folder / "tune.json").read_text())


def alone(flags: list[str], folder: Path, **settings: object) -> float:
    """The held-out loss of `gralora finetune` with a candidate's settings."""
    more = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    args, _ = read_arguments([*flags, *more, "--output_dir", str(folder)])
    return finetune(args)["held_out_loss"]["after"]


@pytest.mark.parametrize("together", [1, 3])
def test_a_candidate_is_trained_as_alone(flags, tmp_path, together):
    """Of different ranks and k, one after the other and several in one pass, with the candidates' own clipping."""
    more = ("--learning_rate", "0.01,0.03", "--lora_r", "8,16", "--gralora_k", "2,4", "--full_sweep")
    found = tune(flags, tmp_path / "study", *more, "--together", together)  # alpha / r of the defaults is 2
    rows = found["candidates"]
    assert found["together"] == together and len(rows) == 8 and found["share_of_full_sweep"] == 1
    for row in rows[::3]:
        settings = {name: row[name] for name in ("learning_rate", "lora_r", "gralora_k")}
        expected = alone(flags, tmp_path / row["name"], **settings, lora_alpha=2 * row["lora_r"])
        assert row["held_out_loss"] == pytest.approx(expected, rel=2e-4), settings
    assert len({round(row["held_out_loss"], 4) for row in rows}) == 8


def test_search(flags, tmp_path, tiny_model, capsys, monkeypatch):
    """The worse candidates are stopped, and what is left behind says and loads what was best.

    The full sweep measures steps first, as on a GPU, one by one and together; that changes none of its losses.
    """
    folder = tmp_path / "study"
    found = tune(flags, folder, "--learning_rate", RATES, "--rungs", "0.2,0.5", "--reduction", 2)
    measured = []

    def measure(trainer: LockstepTrainer, *more: object) -> Rungs:
        measured.append(fastest_together(read_arguments(flags)[0], trainer))
        trainer.together = 1
        trainer.activate()
        return Rungs(trainer, *more)

    monkeypatch.setattr(run, "Rungs", measure)
    full = tune(flags, tmp_path / "full", "--learning_rate", RATES, "--rungs", "0.2,0.5", "--full_sweep")
    assert [sorted(seconds) for seconds in measured] == [[1, 4]] and all(measured[0].values())
    assert found["rungs"] == [2, 5, 10] and sorted(row["steps"] for row in found["candidates"]) == [2, 2, 5, 10]
    assert found["steps_trained"] == 19 and found["share_of_full_sweep"] == 19 / 40
    for row, whole in zip(found["candidates"], full["candidates"], strict=True):
        for step, loss in row["losses"].items():  # the others' end changes nothing for those that go on
            assert loss == pytest.approx(whole["losses"][step], rel=1e-5)
    best = found["best"]
    at_step_2 = {row["name"]: row["losses"]["2"] for row in full["candidates"]}
    assert best["name"] in sorted(at_step_2, key=at_step_2.get)[:2]
    assert best["held_out_loss"] < found["base_model_loss"]

    settings = yaml.safe_load((folder / "best.yaml").read_text())
    assert settings["learning_rate"] == best["learning_rate"] and settings["max_grad_norm"] == 0.2
    trained = finetune(read_arguments([str(folder / "best.yaml"), "--output_dir", str(tmp_path / "again")])[0])
    assert trained["held_out_loss"]["after"] == pytest.approx(best["held_out_loss"], rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(10)[None]
    logits = []
    for adapter in (folder / "adapter", tmp_path / "again"):
        model = PeftModel.from_pretrained(base, adapter).eval()
        logits.append(model(input_ids=ids).logits)
        base = model.unload()
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)

    with (folder / "candidates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["learning_rate"]) for row in rows] == [0.002, 0.03, 0.01, 2]
    assert [row["minus_best"] == "" for row in rows] == [row["name"] == best["name"] for row in rows]
    assert (folder / "learning_rate.png").read_bytes()[:4] == b"\x89PNG"
    states = [trial.state.name for trial in Search(folder, 2).study.get_trials()]
    assert states.count("COMPLETE") == 1 and states.count("PRUNED") == 3
    printed = capsys.readouterr().out
    assert "took 48% of the steps of training every candidate to the end" in printed


def test_candidates_in_one_pass_are_stopped(flags, tmp_path):
    """The last one measured, which PEFT's model then calls active, is among those that are deleted."""
    found = tune(
        flags, tmp_path / "study", "--learning_rate", RATES, "--rungs", "0.2", "--reduction", 2, "--together", 4
    )
    assert (
        sorted(row["steps"] for row in found["candidates"]) == [2, 2, 10, 10] and found["candidates"][-1]["steps"] == 2
    )


def test_a_rung_measures_the_mean_of_the_later_half(flags, tmp_path, monkeypatch):
    """At step 4 of steps 3 and 4, at step 6 of those since then; at the end what is kept."""
    at: dict[int, dict[str, torch.Tensor]] = {}
    measured: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

    def factors(trainer: LockstepTrainer, name: str = "") -> dict[str, torch.Tensor]:
        return {key: p.detach().clone() for key, p in trainer.factors() if name in key}

    class Noted(Rungs):
        def on_step_end(self, args, state, control, **more):
            at[state.global_step] = factors(self.trainer)
            super().on_step_end(args, state, control, **more)

    original = LockstepTrainer.held_out

    def held_out(trainer, name, *more):
        if name is not None:
            measured[trainer.state.global_step, name] = factors(trainer, name)
        return original(trainer, name, *more)

    monkeypatch.setattr(run, "Rungs", Noted)
    monkeypatch.setattr(LockstepTrainer, "held_out", held_out)
    tune(flags, tmp_path / "study", "--learning_rate", "0.01,0.03", "--rungs", "0.4,0.6", "--full_sweep")
    assert measured.keys() == {(step, name) for step in (4, 6, 10) for name in ("candidate_0", "candidate_1")}
    for (step, _), found in measured.items():
        steps = {4: (3, 4), 6: (5, 6), 10: (10,)}[step]
        for key, value in found.items():
            torch.testing.assert_close(value, sum(at[s][key] for s in steps) / len(steps))


class Interrupt(TrainerCallback):
    """Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 4, 8])
def test_resume(flags, tmp_path, monkeypatch, capsys, caplog, step):
    """A search that goes on finds what one in one piece finds; before the first rung it begins anew."""
    more = ("--learning_rate", RATES, "--rungs", "0.2,0.5", "--reduction", "2", "--save_steps", "4")
    expected = tune(flags, tmp_path / "whole", *more)
    folder = tmp_path / "study"
    with monkeypatch.context() as patched:
        original = LockstepTrainer.train

        def train(self, **options):
            self.add_callback(Interrupt(step))
            return original(self, **options)

        patched.setattr(LockstepTrainer, "train", train)
        argv = ["tune", *flags, "--study_dir", str(folder), *more]
        assert cli.main(argv) == cli.INTERRUPTED
        assert "give --resume, too" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds a search; go on with --resume"):
        tune(flags, folder, *more)
    with pytest.raises(ValueError, match="the search to go on with had batch_size=8, not 4; .* another --study_dir"):
        tune(flags, folder, *more, "--resume", "--batch_size", 4)
    found = tune(flags, folder, *more, "--resume")
    said, since = capsys.readouterr().out, step if step > 2 else 0
    assert found["since_step"] == since
    assert (step > 2) == ("going on from" in said) == (f"time from step {since} on: " in said)
    assert not [
        one for one in caplog.records if "missing keys" in one.getMessage()
    ]  # of the base model, which none has
    for row, whole in zip(found["candidates"], expected["candidates"], strict=True):
        assert row["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert found["best"]["name"] == expected["best"]["name"]


def test_devices_share_the_candidates(flags, tmp_path):
    """Two processes, here both on the CPU, stop the same candidates as one."""
    more = ("--learning_rate", RATES, "--rungs", "0.2,0.5", "--reduction", "2")
    expected = tune(flags, tmp_path / "one", *more)
    command = [sys.executable, "-m", "gralora_command", "tune", *flags, "--study_dir", str(tmp_path / "two"), *more]
    done = subprocess.run([*command, "--devices", "0,1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "two" / "tune.json").read_text())
    for row, whole in zip(found["candidates"], expected["candidates"], strict=True):
        assert row["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_later_process_waits_for_the_study(tmp_path):
    """One that loaded its model first must not make it: the first process would take it for an earlier search."""
    journal = tmp_path / JOURNAL
    later = threading.Thread(target=wait_for_study, args=[tmp_path], daemon=True)
    later.start()
    later.join(timeout=0.2)
    assert later.is_alive() and not journal.exists()
    journal.touch()
    later.join(timeout=60)
    assert not later.is_alive()


def test_two_searches_in_one_folder(flags, tmp_path):
    folder = tmp_path / "study"
    with (
        locked(tmp_path / ".study.lock", folder),
        pytest.raises(BlockingIOError, match=f"study' is being written by process {os.getpid()} "),
    ):
        tune(flags, folder, "--learning_rate", "0.01,0.03")
    assert not folder.exists()


def test_if_a_process_fails_the_others_are_ended(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/sh\necho $CUDA_VISIBLE_DEVICES $* > $0.${GRALORA_TUNE_SHARE%/2}\n"
        "[ $GRALORA_TUNE_SHARE = 0/2 ] && exec sleep 100\nexit 2\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ValueError, match="a process of the search has failed, see above; go on with --resume"):
        main(["config.yaml", "--devices", "3,5"])
    for number, device in enumerate(("3", "5")):
        words = Path(f"{program}.{number}").read_text().split()
        assert words == [device, "-m", "gralora_command", "tune", "config.yaml", "--devices", "3,5"]


# ---- the rule ------------------------------------------------------------------------------------------------------


def studied(folder: Path, losses: dict[str, dict[int, list[float]]], reduction: float = 4) -> Search:
    """A search with these losses, of each answer."""
    folder.mkdir(exist_ok=True)
    search = Search(folder, reduction)
    made = [run.Candidate(name, {"learning_rate": 1e-4 * (i + 1)}) for i, name in enumerate(losses)]
    search.begin(made, {})
    for name, at in losses.items():
        for step, items in at.items():
            search.report(name, step, items)
    return search


def test_the_best_go_on(tmp_path):
    losses = {f"c{i}": {5: [float((i * 3) % 8)]} for i in range(8)}
    losses["c4"] = {5: [math.nan]}
    assert studied(tmp_path, losses).stopped([5]) == {name: 5 for name in losses if name not in ("c0", "c3")}
    assert studied(tmp_path / "half", losses, 2).stopped([5]).keys() == {"c2", "c4", "c5", "c7"} | set()


def test_nobody_is_stopped_before_all_are_measured(tmp_path):
    losses = {"c0": {5: [1.0]}, "c1": {5: [2.0]}, "c2": {}}
    search = studied(tmp_path, losses, 2)
    assert search.stopped([5]) == {}
    search.report("c2", 5, [3.0])
    assert search.stopped([5]) == {"c2": 5}
    search.report("c0", 9, [2.0])
    assert search.stopped([5, 9]) == {"c2": 5}
    search.report("c1", 9, [1.0])
    assert search.stopped([5, 9]) == {"c2": 5, "c0": 9}  # by their losses at 9, whoever was better at 5
    assert search.stopped([5]) == {"c2": 5}


def test_first_report_of_a_step_stands(tmp_path):
    search = studied(tmp_path, {"c0": {5: [1.0, 3.0]}, "c1": {}})
    search.report("c0", 5, [9.0])
    assert search.trials()["c0"].intermediate_values == {5: 2.0}
    again = Search(tmp_path, 4)
    assert again.trials()["c0"].user_attrs["losses_5"] == [1.0, 3.0]
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING


@pytest.mark.parametrize(
    "field, text, expected",
    [
        ("learning_rate", "1e-4..8e-4", [1e-4, 2e-4, 4e-4, 8e-4]),
        ("learning_rate", "1e-4..1.2e-4", [1e-4, 1.2e-4]),
        ("learning_rate", "3e-4,1e-3", [3e-4, 1e-3]),
        ("gralora_k", "2,4,auto", [2, 4, "auto"]),
        ("lora_r", "16", [16]),
    ],
)
def test_values(field, text, expected):
    assert values(field, text) == expected


def test_default_range_has_a_rate_for_each_doubling():
    found = values("learning_rate", "1e-4..8e-3")
    assert len(found) == 7 and found[0] == 1e-4 and found[-1] == 8e-3
    assert all(1.9 < after / before < 2.2 for before, after in itertools.pairwise(found))


@pytest.mark.parametrize(
    "field, text",
    [
        ("learning_rate", "1e-4.."),
        ("learning_rate", "8e-3..1e-4"),
        ("learning_rate", "0..1"),
        ("learning_rate", "1e-4,1e-4"),
        ("learning_rate", "-1e-4,1e-4"),
        ("learning_rate", "nan,1"),
        ("learning_rate", "fast"),
        ("lora_r", "8..64"),
        ("lora_r", "8.5"),
    ],
)
def test_values_that_cannot_be(field, text):
    with pytest.raises(ValueError, match=f"{field}='.*' must"):
        values(field, text)


def test_shares():
    assert shares("0.1,0.2") == [0.1, 0.2]
    for text in ("", "0,0.5", "0.5,1", "0.3,0.1", "x", "0.1,0.1"):
        with pytest.raises(ValueError, match="rungs="):
            shares(text)


@pytest.mark.parametrize(
    "steps, warmup, rungs",
    [
        (200, 0.05, [20, 60, 200]),
        (14, 0.05, [2, 4, 14]),
        (100, 10, [11, 30, 100]),
        (20, 8, [9, 20]),
        (3, 8, [3]),
        (10, 0, [1, 3, 10]),
    ],
)
def test_no_rung_is_in_the_warmup(steps, warmup, rungs, tmp_path):
    """Of a warmup's first step, whose rate is 0, all candidates are as they began, and would tie."""
    training = TrainingArguments(str(tmp_path), warmup_steps=warmup, use_cpu=True)
    rows = Rungs(SimpleNamespace(args=training), None, [], [0.1, 0.3], 1)
    assert rows.steps(SimpleNamespace(max_steps=steps)) == rungs


@pytest.mark.parametrize(
    "more, message",
    [
        (["--learning_rate", "1e-4"], "is one candidate; a search needs two"),
        (
            ["--lora_r", "8,9", "--lora_alpha", "12"],
            "lora_r=9: lora_alpha would be 3.375, to keep",
        ),
        (["--gralora_k", "2,3"], "gralora_k=3"),
        (["--val_set_size", "0"], "val_set_size=0: candidates are compared by their held-out loss"),
        (["--fp16"], "fp16=True: a loss scale would be common"),
        (["--optim", "lomo"], "optim='lomo' does not treat parameters one by one"),
        (["--resume"], "there is no search in"),
        (["--reduction", "1"], "reduction=1 must be above 1"),
        (["--together", "0"], "together='0' must be a number"),
        (["--together", "2", "--lora_dropout", "0.1"], "need a training without dropout"),
        (["--devices", "0,0"], "names one twice"),
        (["--dry_run"], "are flags of `gralora finetune`"),
        (["--early_stopping_patience", "2"], "the search stops candidates itself"),
    ],
)
def test_searches_that_cannot_be(flags, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main([*flags, "--study_dir", str(tmp_path / "study"), *more])
    assert not (tmp_path / "study" / "tune.json").exists()


def found(best: float, tied: list[str] = (), base: float = 3.0) -> dict:
    rates = (1e-4, 2e-4, 4e-4)
    rows = [{"name": f"c{i}", "learning_rate": rate, "held_out_loss": 2.0} for i, rate in enumerate(rates)]
    chosen = next(row for row in rows if row["learning_rate"] == best)
    return {
        "best": chosen,
        "candidates": rows,
        "tied": list(tied),
        "base_model_loss": base,
        "held_out_answers": 20,
        "share_of_full_sweep": 0.2,
    }


def test_certainty():
    said = "\n".join(certainty(found(2e-4), ["learning_rate"]))
    assert "sure, for this seed" in said and "the same 20 answers" in said
    assert "end of the range" not in said and "took 20%" in said
    assert "not sure: 1 candidate ties " in "\n".join(certainty(found(2e-4, ["c0"]), ["learning_rate"]))
    one = found(2e-4) | {"held_out_answers": 1}
    assert "not sure: there is one held-out answer" in "\n".join(certainty(one, ["learning_rate"]))
    assert [is_worse({"low": low}) for low in (0.1, -0.1, None)] == [True, False, False]
    assert "--learning_rate 1.0e-05..2.0e-04" in "\n".join(certainty(found(1e-4), ["learning_rate"]))
    assert "--learning_rate 2.0e-04..4.0e-03" in "\n".join(certainty(found(4e-4), ["learning_rate"]))
    assert "no candidate is better than the base" in "\n".join(certainty(found(2e-4, base=1.9), ["learning_rate"]))


# ---- the benchmark -------------------------------------------------------------------------------------------------


def sweep(losses: list[list[float]], tied: tuple[str, ...] = ()) -> dict:
    """A full sweep with these losses at steps 10, 30 and 100."""
    rows = [
        {"name": f"c{i}", "losses": dict(zip(("10", "30", "100"), at, strict=True)), "held_out_loss": at[-1]}
        for i, at in enumerate(losses)
    ]
    return {"candidates": rows, "rungs": [10, 30, 100], "best": min(rows, key=lambda r: r["held_out_loss"])} | {
        "tied": list(tied)
    }


def test_what_a_rule_would_have_found():
    """Of four candidates, half go on at step 10, half of them at 30: 4 x 10 + 2 x 20 + 70 of 400 steps."""
    whole = sweep([[3.0, 2.5, 2.2], [2.9, 2.6, 2.1], [4.0, 2.0, 1.0], [5.0, 5.0, 5.0]])
    pick, cost = picked(whole, (0.1, 0.3), 2)
    assert pick["name"] == "c0" and cost == 150 / 400
    assert picked(whole, (0.1,), 2)[0]["name"] == "c1" and picked(whole, (0.3,), 4)[0]["name"] == "c2"
    tie = sweep([[1.0, 1.0, 1.0], [2.0, 2.0, 0.9], [3.0, 3.0, 3.0], [4.0, 4.0, 9.0]], ("c0",))
    found = judged([whole, tie], (0.1, 0.3), 4)
    assert (found["best"], found["best_or_tie"], found["sweeps"]) == (0, 1, 2)
    assert found["most_regret"] == pytest.approx(2.1 - 1.0) and found["mean_regret"] == pytest.approx((1.1 + 0.1) / 2)


def test_recorded_runs_are_sweeps(tmp_path):
    """Of the tuning seed, with losses on the way; one that diverged is the worst."""
    common = {"task": "python", "method": "lora", "r": 8, "scale": 1.0, "steps": 100}
    runs = [(2e-3, 0, 2.0, 1.0), (1e-3, 0, 1.5, 1.2), (4e-3, 0, 2.5, None), (1e-3, 1, 0.1, 0.1)]
    records = [
        common | {"lr": lr, "seed": seed, "test_curve": {"20": early}, "test_loss": late}
        for lr, seed, early, late in runs
    ]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*records, common | {"seed": 0, "test_curve": {}}]))
    ((name, whole),) = recorded(path).items()
    assert name == "python-lora-r8-x1" and whole["rungs"] == [20, 100] and whole["best"]["learning_rate"] == 2e-3
    assert [row["learning_rate"] for row in whole["candidates"]] == [1e-3, 2e-3, 4e-3]
    assert picked(whole, (0.2,), 4)[0]["learning_rate"] == 1e-3
    assert is_measured(0.2, whole["rungs"]) and not is_measured(0.1, whole["rungs"])
