"""The speed benchmark: what it compares before it prints, and that every section runs, at tiny sizes on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.speed import __main__ as speed
from benchmarks.speed import exact, kinds, layers
from benchmarks.speed.methods import ACCELERATED, LINEARS, METHODS, methods_of
from benchmarks.speed.report import environment
from benchmarks.speed.steps import TINY, llama
from helpers import Case, naive_update, random_factors, random_input
from torch import nn

from gralora import seam

QUICK = ["--tiny", "--device", "cpu", "--rounds", "1", "--repeats", "1", "--ranks", "8"]


def run(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    speed.main([*arguments, *QUICK, "--out", str(tmp_path / "rows.json")])
    return json.loads((tmp_path / "rows.json").read_text())


def one_linear(name: str) -> layers.LayerStep:
    (method,) = methods_of([name], 8, 2, ["0"])
    base = nn.Sequential(nn.Linear(32, 48))
    return layers.LayerStep(method.adapt(base, False), torch.randn(5, 32, requires_grad=True))


@pytest.mark.parametrize("section", ["linear", "decode", "merge"])
def test_sections_of_layers(tmp_path: Path, section: str) -> None:
    """Every row names the method, its ratio, how far it is from the reference, and what ran."""
    rows = run(tmp_path, section)
    assert {row["method"] for row in rows} >= {"PEFT LoRA", "PEFT GRALORA", "gralora"}
    for row in rows:
        assert row["time_ms"] > 0 and row["p20_ms"] <= row["time_ms"] <= row["p80_ms"]
        facts = {"card", "implementation", "kernels", "commit", "date", "torch", "triton", "transformers", "peft"}
        assert row.keys() > facts and all(row[fact] for fact in facts - {"triton"})


@pytest.mark.parametrize("section", ["model", "nf4"])
def test_sections_of_steps(tmp_path: Path, section: str) -> None:
    """With and without checkpointing; each method's loss stands beside the reference's, and the frozen base's."""
    rows = run(tmp_path, section, "--checkpointing", "--methods", "frozen", "PEFT LoRA", ACCELERATED, "gralora")
    assert [row["method"] for row in rows] == ["frozen", "PEFT LoRA", ACCELERATED, "gralora"] * 2
    assert [row["checkpointing"] for row in rows] == [False] * 4 + [True] * 4
    fused = {row["method"]: row["layers"].partition(" run")[0] for row in rows}
    assert fused == {
        "frozen": "no LoRA layers",
        "PEFT LoRA": "0 of 14 LoRA layers",
        ACCELERATED: "14 of 14 LoRA layers",
        "gralora": "14 of 14 LoRA layers",
    }
    for row in rows:
        assert row["loss"] == pytest.approx(row["exact_loss"], rel=1e-4) and row["tokens_per_s"] > 0
        assert row["method"] == "frozen" or 0 < row["error_A"] < 1e-5 and 0 < row["error_B"] < 1e-5
    losses = {row["method"]: row["exact_loss"] for row in rows}
    assert losses.pop(ACCELERATED) == losses["PEFT LoRA"]
    assert len(set(losses.values())) == 3  # of adapters that change something


@pytest.mark.parametrize("arguments", [["--compile"], ["--compile_mode", "blocks"]], ids="-".join)
def test_compiled_steps(tmp_path: Path, arguments: list[str]) -> None:
    """The table names the mode. Nothing is compiled here, which takes half a minute."""
    with torch.compiler.set_stance("force_eager"):
        rows = run(tmp_path, "short", *arguments, "--methods", "PEFT LoRA", "gralora")
    assert all(str(row["setting"]).endswith(("compiled", "compiled (blocks)")[len(arguments) - 1]) for row in rows)
    assert all(row["loss"] == pytest.approx(row["exact_loss"], rel=1e-4) for row in rows)


@pytest.mark.parametrize("case", kinds.KINDS, ids=lambda case: case.name)
def test_kinds_agree_with_their_reference(case: kinds.KindCase) -> None:
    if case.fields.get("use_dora") and not seam.MERGES_DORA:
        pytest.skip("GraLoRA refuses DoRA with this PEFT")
    args = speed.parser().parse_args(["kinds", *QUICK])
    args.shrink = 64
    steps = case.steps(args)
    for step in steps.values():
        step.module.eval()  # without dropout
    found = {name: step.outcome() for name, step in steps.items()}
    errors = {name: exact.errors_of(own, case.reference(steps[name])) for name, own in found.items()}
    exact.check(errors, case.dtype or torch.float32)
    assert found.keys() == {"frozen", "PEFT LoRA", ACCELERATED, "gralora"}
    assert not torch.allclose(found["gralora"]["y"][0], found["frozen"]["y"][0])
    assert all(grad.any() for name in ("A", "B") for grad in found["gralora"][name])


def test_reference_is_the_formula() -> None:
    factors = random_factors(Case(4, 8, 0, 24, 16))
    x = random_input(3, 24)
    torch.testing.assert_close(exact.grid_update(x, factors.A, factors.B), naive_update(x, factors))


@pytest.mark.parametrize("method", METHODS[1:])
def test_reference_model_is_the_model(method: str) -> None:
    """In float64 the model and its reference give the same loss; with the factors doubled in one they do not."""
    plain = llama(TINY, "cpu", torch.float64)
    (chosen,) = methods_of([method], 8, 2, LINEARS)
    model = chosen.adapt(plain, False)
    tokens = torch.randint(0, 256, (2, 16))
    wanted = exact.exact_loss(plain, model, tokens)["loss"][0]
    assert model(input_ids=tokens, labels=tokens).loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for parameter in model.parameters():
        parameter.data *= 2 if parameter.requires_grad else 1
    assert model(input_ids=tokens, labels=tokens).loss.item() != pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("broken", ["y", "x", "A", "B", "nan"])
@pytest.mark.parametrize("method", ["PEFT LoRA", "gralora"])
def test_what_is_wrong_is_refused(broken: str, method: str) -> None:
    """One wrong result of one method is enough, and a NaN is wrong."""
    steps = {name: one_linear(name) for name in ("frozen", "PEFT LoRA", "gralora")}
    found = {name: step.outcome() for name, step in steps.items()}
    wanted = {name: layers.exact_outcome(step) for name, step in steps.items()}

    def check() -> None:
        exact.check({name: exact.errors_of(found[name], wanted[name]) for name in steps}, torch.float32)

    check()
    tensor = found[method]["y" if broken == "nan" else broken][0]
    tensor.view(-1)[0] = torch.nan if broken == "nan" else tensor.view(-1)[0] + 0.5 * tensor.norm()
    with pytest.raises(exact.NotTheReference, match=f"{method}: {'y' if broken == 'nan' else broken} is"):
        check()


def test_no_figures_of_a_wrong_method(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """A scaling that is off by 1% ends the command with an error, before anything is timed or written."""
    forward = exact.ExactLinear.forward

    def off(self: Any, x: Any) -> Any:
        self.scaling = [0.99 * s for s in self.scaling]
        return forward(self, x)

    monkeypatch.setattr(exact.ExactLinear, "forward", off)
    with pytest.raises(SystemExit, match=r"linear: PEFT LoRA: y is .* No figures are printed"):
        run(tmp_path, "linear")
    assert "ms [" not in capsys.readouterr().out and not (tmp_path / "rows.json").exists()


def test_methods_share_the_base_and_are_not_zero() -> None:
    base = llama(TINY, "cpu", torch.float32)
    for method in methods_of(METHODS, 8, 2, LINEARS):
        model = method.adapt(base, True)
        shared = {p.data_ptr() for p in base.parameters()}
        assert shared <= {p.data_ptr() for p in model.parameters()}
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert (method.name == "frozen") == (not trainable)
        assert all(p.ne(0).float().mean() > 0.99 for p in trainable)


@pytest.mark.parametrize(
    "arguments, words",
    [(["nothing"], "no such section"), (["liger"], "--liger"), (["model", "--methods", "Unsloth"], "--unsloth")],
)
def test_what_is_missing_is_named(arguments: list[str], words: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        speed.main(arguments)
    assert words in capsys.readouterr().err


def test_commit_can_be_given() -> None:
    """Where the source runs without its repository."""
    assert environment("abc")["commit"] == "abc" and environment()["commit"]
