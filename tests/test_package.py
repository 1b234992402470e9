"""Importing gralora: no warnings of its own, and a clear message about versions that it does not support."""

import importlib.metadata
import subprocess
import sys
import warnings

import pytest

from gralora import versions

QUIET_IMPORT = """
import os, sys, tempfile, warnings
import peft  # what it and the libraries under it print is theirs
warnings.simplefilter("error")
caught = tempfile.TemporaryFile()
os.dup2(caught.fileno(), 2)
import gralora
for name in gralora.__all__:
    getattr(gralora, name)
import gralora.tool.cli
sys.stderr.flush()
caught.seek(0)
print(caught.read().decode())
"""


def test_import_is_silent() -> None:
    done = subprocess.run([sys.executable, "-c", QUIET_IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("peft", "0.19.1", r"supports peft<0.22,>=0.20, and 0.19.1 is installed: pip install 'peft<0.22,>=0.20'"),
        ("transformers", "4.57.0", "supports transformers>=5.6, and 4.57.0 is installed"),
        ("torch", "2.10.0+cu128", r"supports torch>=2.11, and 2.10.0\+cu128 is installed"),
    ],
)
def test_older_versions_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, version: str, message: str) -> None:
    pretend(monkeypatch, name, version)
    with pytest.raises(ImportError, match=message):
        versions.check_versions()


@pytest.mark.parametrize("version", ["0.22.0", "0.22.0.dev0", "1.0"])
def test_newer_versions_are_warned_about(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    pretend(monkeypatch, "peft", version)
    with pytest.warns(UserWarning, match=f"{version} is installed: it is newer than what was tested; update gralora"):
        versions.check_versions()


def test_installed_versions_are_supported() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_versions()


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: version if asked == name else real(asked))
    requires = ["peft>=0.20,<0.22", "torch>=2.11", "transformers>=5.6", 'pytest; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda asked: requires)
