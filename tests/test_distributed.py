"""Several processes, on the CPU with gloo: DDP and FSDP2 as accelerate starts them with configs/accelerate.

They must give what one process gives with as many examples a step: losses, adapters, files. The launched processes
run `distributed_runs.py`; this file compares what they saw.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from benchmarks.speed.methods import METHODS
from packaging.version import Version
from peft import load_peft_weights
from transformers import AutoModelForCausalLM

import gralora
from gralora.tool.arguments import FinetuneArguments
from gralora.tool.finetune import finetune
from gralora.tool.training.resume import fault

ROOT = Path(__file__).parent.parent
RESUMES_ON_CPUS = Version(transformers.__version__) >= Version("5.17")  # 5.6 cannot, from "cpu:0" tensors
CONFIGS = ROOT / "configs" / "accelerate"
RUNS = {
    "plain": {},  # gradient accumulation, a hybrid
    "bf16": {"bf16": True},  # factors in float32 on a base in bfloat16
    "checkpointing": {"gradient_checkpointing": True, "gralora_k": "1", "hybrid_r": 0},  # fewer blocks than processes
    "streaming": {"streaming": True},
}
# how far losses may be from those of one process, as a share: they are sums in another order
TOLERANCE = {(engine, name): 1e-5 for engine in ("ddp", "fsdp") for name in RUNS}
TOLERANCE["fsdp", "bf16"] = 2**-8  # accelerate has FSDP2 round the loss, and sums of gradients, to bfloat16


@pytest.fixture(scope="module")
def arguments(tiny_model, tmp_path_factory):
    """Arguments of a run by its name and folder."""
    data = tmp_path_factory.mktemp("data") / "words.jsonl"
    # 8 held out, and four batches of 8: of a last batch that is not full, accelerate fills up some processes' shares
    words = ["".join(letters) for letters in itertools.product("abcd", repeat=3)][:40]
    data.write_text("\n".join(json.dumps({"instruction": f"Repeat {x}", "output": x * 3}) for x in words))

    def make(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
        options = {"base_model": str(tiny_model), "data_path": str(data), "output_dir": str(folder / name)}
        options |= {"max_steps": 6, "batch_size": 8, "micro_batch_size": 2, "max_seq_length": 100, "val_set_size": 8}
        options |= {"lora_r": 10, "hybrid_r": 2, "gralora_k": "4", "use_gralora": True, "learning_rate": 3e-2}
        options |= {"lora_target_modules": ["all-linear"], "logging_steps": 1, "save_steps": 3, "eval_steps": 3}
        return options | RUNS.get(name, {}) | changes

    return make


def launch(engine: str, processes: int, folder: Path, runs: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Run them on so many processes; what each process saw, by the run's name."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"folder": str(folder), "runs": runs}))
    output_of([*launcher(engine, processes), str(Path(__file__).parent / "distributed_runs.py"), str(plan)])
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(processes)] for name in runs}


def launcher(engine: str, processes: int) -> list[str]:
    """The command that starts so many processes of what follows it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{engine}.yaml")]
    return [*command, "--num_processes", str(processes), "--main_process_port", "0"]


def finetune_command(options: dict[str, Any]) -> list[str]:
    """What follows a launcher, or python, to make a run of `arguments` by the command itself."""
    flags = [f"--{name}={value}" for name, value in options.items() if not isinstance(value, list)]
    return ["-m", "gralora.tool.cli", "finetune", *flags, "--lora_target_modules", "all-linear"]


def output_of(command: list[str]) -> str:
    """What a launcher prints on stdout; if it hangs, it is told to end, and ends its processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        try:
            output, errors = launcher.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            launcher.terminate()
            output, errors = launcher.communicate()
    assert launcher.returncode == 0, errors[-8000:]
    return output


def losses(log: list[dict[str, float]]) -> dict[tuple[str, int], float]:
    names = ("loss", "eval_loss", "grad_norm")
    return {(name, row["step"]): row[name] for row in log for name in names if name in row}


def assert_same_losses(seen: dict, expected: dict, tolerance: float, after: int = 0) -> None:
    """All losses, and lengths of gradients, after a step are there, and equal up to a share of their value."""
    expected = {key: value for key, value in expected.items() if key[1] > after}
    seen = {key: value for key, value in seen.items() if key[1] > after}
    assert seen.keys() == expected.keys() and len(expected) > 3
    for key, value in expected.items():
        # a gradient's length is the more sensitive number
        assert seen[key] == pytest.approx(value, rel=tolerance * (10 if key[0] == "grad_norm" else 1)), key


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """Each run in this process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        finetune(FinetuneArguments(**arguments(name, folder)))
    return folder


def log_of(folder: Path) -> dict[tuple[str, int], float]:
    return losses(json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"])


@pytest.fixture(scope="module")
def ddp(arguments, alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    runs = {name: arguments(name, folder) for name in RUNS}
    runs["interrupted"] = arguments("interrupted", folder, interrupted=True)
    if RESUMES_ON_CPUS:
        checkpoint = alone / "plain" / "checkpoint-3"
        runs["resumed"] = arguments("resumed", folder, resume_from_checkpoint=str(checkpoint))
    return launch("ddp", 2, folder, runs), folder


@pytest.fixture(scope="module")
def fsdp(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return launch("fsdp2", 2, folder, {name: arguments(name, folder) for name in RUNS}), folder


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_one_process(engine, name, alone, request):
    seen, _ = request.getfixturevalue(engine)
    expected = log_of(alone / name)
    assert expected["loss", 6] < expected["loss", 1] - 0.1, "the adapter learns"
    assert_same_losses(losses(seen[name][0]["log"]), expected, TOLERANCE[engine, name])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", RUNS)
def test_saved_adapter_is_the_one_trained(engine, name, alone, request, tiny_model):
    """Bit by bit the tensors that every process has at the end, under the names of a run of one process."""
    seen, folder = request.getfixturevalue(engine)
    saved, single = load_peft_weights(str(folder / name)), load_peft_weights(str(alone / name))
    assert {key: (t.shape, t.dtype) for key, t in saved.items()} == {
        key: (t.shape, t.dtype) for key, t in single.items()
    }
    for process in seen[name]:
        assert process["adapter"].keys() == saved.keys()
        assert all(torch.equal(process["adapter"][key], t) and t.any() for key, t in saved.items())
    configs = [json.loads((path / name / "adapter_config.json").read_text()) for path in (folder, alone)]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    model = gralora.load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), folder / name)
    assert all(torch.equal(t, saved[key]) for key, t in gralora_state(model).items())


def gralora_state(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_operations_stay_fused(engine, request):
    """Inside a sharded decoder layer the factors are plain tensors for the time of a step."""
    seen, _ = request.getfixturevalue(engine)
    for name in RUNS:
        for process in seen[name]:
            layers = [unit.split(".")[-1] for unit in process["units"] if "layers" in unit]
            assert layers == ([] if engine == "ddp" else ["0", "1"]), "a unit is a layer, with all that is in it"
            assert process["fused"] > 0 and not process["fused_got_dtensor"]
    assert seen["bf16"][0]["dtypes"] == {True: torch.float32, False: torch.bfloat16}


def test_memory_is_divided(ddp, fsdp):
    """Bytes of parameters and of AdamW's states in each process: all in each with DDP, half in each with FSDP2."""
    for name in ("plain", "bf16"):
        for kind in ("parameter_bytes", "optimizer_bytes"):
            copies, shares = ([process[kind] for process in seen[name]] for seen in (ddp[0], fsdp[0]))
            assert copies[0] == copies[1] == sum(shares) > 0
            assert max(shares) < 0.52 * copies[0], (name, kind)
    # one block cannot be divided, so the first process has the grids and the second none of them
    shares = [process["optimizer_bytes"] for process in fsdp[0]["checkpointing"]]
    assert shares[1] == 0 and shares[0] == ddp[0]["checkpointing"][0]["optimizer_bytes"]


@pytest.mark.skipif(not RESUMES_ON_CPUS, reason="old transformers resume several processes on GPUs only")
def test_one_process_goes_on_from_two(ddp, alone, arguments, tmp_path):
    """And two go on from one: optimizer, schedule and order of the data are the same in each."""
    expected = log_of(alone / "plain")
    assert_same_losses(losses(ddp[0]["resumed"][0]["log"]), expected, 1e-5, after=3)
    checkpoint = ddp[1] / "plain" / "checkpoint-3"
    finetune(FinetuneArguments(**arguments("plain", tmp_path, resume_from_checkpoint=str(checkpoint))))
    assert_same_losses(log_of(tmp_path / "plain"), expected, 1e-5, after=3)


def test_one_process_goes_on_from_two_shards(fsdp, alone, arguments, tmp_path):
    checkpoint = fsdp[1] / "plain" / "checkpoint-3"
    assert fault(checkpoint) is None and (checkpoint / "optimizer_0" / "__1_0.distcp").exists()
    runs = {"resumed": arguments("resumed", tmp_path, resume_from_checkpoint=str(checkpoint))}
    seen = launch("fsdp2", 1, tmp_path, runs)
    assert_same_losses(losses(seen["resumed"][0]["log"]), log_of(alone / "plain"), 1e-5, after=3)


def test_shards_are_refused_without_their_engine(fsdp, arguments, tmp_path):
    checkpoint = fsdp[1] / "plain" / "checkpoint-3"
    with pytest.raises(ValueError, match="was saved by FSDP2, and this run is one process or DDP"):
        finetune(FinetuneArguments(**arguments("plain", tmp_path, resume_from_checkpoint=str(checkpoint))))


@pytest.mark.slow
@pytest.mark.skipif(not RESUMES_ON_CPUS, reason="old transformers resume several processes on GPUs only")
def test_one_launched_process_goes_on_from_two(ddp, alone, arguments, tmp_path):
    checkpoint = ddp[1] / "plain" / "checkpoint-3"
    runs = {"resumed": arguments("resumed", tmp_path, resume_from_checkpoint=str(checkpoint))}
    seen = launch("ddp", 1, tmp_path, runs)
    assert_same_losses(losses(seen["resumed"][0]["log"]), log_of(alone / "plain"), 1e-5, after=3)


@pytest.mark.slow
def test_two_processes_go_on_from_one_shard(alone, arguments, tmp_path):
    expected = log_of(alone / "plain")
    seen = launch("fsdp2", 1, tmp_path, {"plain": arguments("plain", tmp_path)})
    assert_same_losses(losses(seen["plain"][0]["log"]), expected, 1e-5)
    checkpoint = tmp_path / "plain" / "checkpoint-3"
    runs = {"resumed": arguments("resumed", tmp_path, resume_from_checkpoint=str(checkpoint))}
    seen = launch("fsdp2", 2, tmp_path, runs)
    assert_same_losses(losses(seen["resumed"][0]["log"]), expected, 1e-5, after=3)


def test_interrupt_of_one_process_stops_all(ddp):
    """They save one checkpoint together, of the step in which one of them was told to stop."""
    seen, folder = ddp
    for process in seen["interrupted"]:
        assert "stopped at step 2 of 6, checkpoint saved in" in process["stopped"]
    assert fault(folder / "interrupted" / "checkpoint-2") is None


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage, alone, arguments, tiny_model, tmp_path, monkeypatch):
    """Losses, the saved adapter, shares of the memory, and going on from a checkpoint: on as many processes only."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    runs = {"plain": arguments("plain", tmp_path)}
    checkpoint = tmp_path / "plain" / "checkpoint-3"
    runs["resumed"] = arguments("resumed", tmp_path, resume_from_checkpoint=str(checkpoint))
    seen = launch(f"zero{stage}", 2, tmp_path, runs)
    expected = log_of(alone / "plain")
    assert_same_losses(losses(seen["plain"][0]["log"]), expected, 1e-5)
    assert_same_losses(losses(seen["resumed"][0]["log"]), expected, 1e-5, after=3)
    saved, single = load_peft_weights(str(tmp_path / "plain")), load_peft_weights(str(alone / "plain"))
    torch.testing.assert_close(saved, single, rtol=1e-3, atol=1e-5)
    gralora.load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "plain")
    model = gralora.load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), alone / "plain")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for process in seen["plain"]:
        assert (process["fused"] > 0) == (stage == 2), "ZeRO-3 gathers weights in hooks, module by module"
        assert process["parameter_bytes"] == size if stage == 2 else process["parameter_bytes"] < 0.55 * size
    resumed = arguments("refused", tmp_path, resume_from_checkpoint=str(checkpoint))
    saved = f"was saved by DeepSpeed ZeRO-{stage} on 2 processes, and this run is"
    with pytest.raises(ValueError, match=f"{saved} one process or DDP"):
        finetune(FinetuneArguments(**resumed))
    with pytest.raises(AssertionError, match=f"{saved} DeepSpeed ZeRO-{stage} on 1 process"):
        launch(f"zero{stage}", 1, tmp_path, {"refused": resumed})


@pytest.mark.slow
def test_the_command_itself(alone, arguments, tmp_path):
    """`gralora finetune` as the docs launch it, and what it prints, without anything of the tests in between."""
    command = [*launcher("ddp", 2), *finetune_command(arguments("plain", tmp_path))]
    metrics = json.loads(output_of([*command, "--json", "--verify"]))
    assert metrics["max_logit_difference"]["reloaded"] < 1e-4
    assert_same_losses(log_of(tmp_path / "plain"), log_of(alone / "plain"), 1e-5)


@pytest.mark.slow
def test_verify_of_shards(arguments, tmp_path):
    """All processes compute the logits that the reloaded adapter is compared with, since none has the whole model."""
    seen = launch("fsdp2", 2, tmp_path, {"plain": arguments("plain", tmp_path, max_steps=2, verify=True)})
    assert seen["plain"][0]["stopped"] is None
    metrics = json.loads((tmp_path / "plain" / "metrics.json").read_text())
    assert metrics["max_logit_difference"]["reloaded"] < 1e-4 < metrics["max_logit_difference"]["base"]


@pytest.mark.slow
def test_benchmark(tmp_path):
    """`benchmarks.multi_gpu` on the tiny model: a row for each method, engine and number of processes."""
    command = [sys.executable, "-m", "benchmarks.multi_gpu", "--tiny", "--batch", "1", "--sequence", "16"]
    command += ["--rounds", "2", "--out", str(tmp_path / "rows.json")]
    output_of(command)
    rows = json.loads((tmp_path / "rows.json").read_text())
    methods = list(METHODS)
    found = [(row["engine"], row["gpus"], row["method"]) for row in rows]
    assert found == [(*run, name) for run in (("ddp", 1), ("ddp", 2), ("fsdp2", 2)) for name in methods]
    for row in rows:
        alone = next(other for other in rows if other["method"] == row["method"])
        assert row["tokens_per_s"] == pytest.approx(16e3 * row["gpus"] / row["time_ms"])
        share = row["tokens_per_s"] / (row["gpus"] * alone["tokens_per_s"])
        assert row["efficiency_percent"] == pytest.approx(100 * share)
        assert row["loss_difference"] < 1e-5
        assert (row["losses"][-1] < row["losses"][0]) == (row["method"] != "frozen")
