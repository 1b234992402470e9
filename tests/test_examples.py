"""The scripts in examples/ run: on a tiny model here, on the embedded one in the slow tests."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "common.py")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, embedded_stand_in: Path) -> Any:
    """Call an example's `main` in its short mode."""
    monkeypatch.setenv("GRALORA_CACHE", str(embedded_stand_in))
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "common", raising=False)

    def call(name: str) -> Any:
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](["--short", "--out", str(tmp_path / "out")])

    return call


def test_sft(run: Any, tmp_path: Path) -> None:
    assert run("sft") > 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
def test_qlora(run: Any) -> None:
    pytest.importorskip("bitsandbytes")
    first, *_, merged = run("qlora")
    assert merged < first


def test_faster_lora(run: Any) -> None:
    assert run("faster_lora") < 1e-4


def test_hybrid_sweep_compares_equal_numbers_of_parameters(run: Any) -> None:
    parameters = run("hybrid_sweep")
    assert len(parameters) == 5 and len(set(parameters.values())) == 1


def test_rows_of_a_mixed_batch_are_those_of_their_adapters(run: Any) -> None:
    assert run("several_adapters_in_one_batch") < 1e-5


def test_export_is_served_by_stock_peft(run: Any) -> None:
    assert run("export_and_serve") < 1e-5


def test_every_script_is_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert SCRIPTS and all(f'run("{path.stem}")' in source for path in SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_short_mode_on_the_embedded_model(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, script, "--short", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
