"""What is shipped, and importing it: no file missing, no warning of its own, clear words about other versions."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import warnings
import zipfile
from pathlib import Path

import pytest

from gralora import versions

ROOT = Path(__file__).parents[1]

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


def test_import_needs_no_package_that_is_not_asked_for() -> None:
    """What PEFT imports late and does not ask for, such as attrs, is missing in a new environment."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('attr', 'attrs', 'rich', 'matplotlib', 'trl', 'datasets')))\n"
    )
    code += "import gralora; [getattr(gralora, name) for name in gralora.__all__]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def package_files() -> set[str]:
    """Of src, as a wheel names them."""
    found = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "gralora").rglob("*") if path.is_file()}
    return {"gralora_command.py", *(name for name in found if "__pycache__" not in name)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "src").mkdir()
    shutil.copy(ROOT / "src" / "gralora_command.py", source / "src")
    shutil.copytree(ROOT / "src" / "gralora", source / "src" / "gralora", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "dist"


def test_wheel_and_sdist_have_every_file(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in shipped if ".dist-info/" not in name} == package_files()
    assert any(name.endswith("licenses/LICENSE") for name in shipped)
    with tarfile.open(sdist) as archive:
        packed = {name.split("/src/", 1)[1] for name in archive.getnames() if "/src/gralora" in name}
    assert package_files() <= packed


def test_the_description_on_an_index_has_absolute_links() -> None:
    """As the release workflow writes them; each is a file of the repository."""
    address = runpy.run_path(str(ROOT / ".github" / "address.py"))["with_address"]
    text = address((ROOT / "README.md").read_text(encoding="utf-8"), "https://host/us/gralora", "v1")
    links = re.findall(r"\]\(([^)]+)\)", text)
    ours = [link for link in links if link.startswith("https://host/us/gralora/")]
    assert len(ours) > 10 and all(link.startswith("https://") for link in links)
    for link in ours:
        kind, file = re.fullmatch(r"https://host/us/gralora/(blob|raw)/v1/([^#]+)(?:#.*)?", link).groups()
        assert (ROOT / file).is_file() and (kind == "raw") == file.endswith(".svg"), link
    assert "REPOSITORY" not in text and "git clone https://host/us/gralora" in text


@pytest.mark.slow
def test_wheel_works_in_a_new_environment(built: Path, tmp_path: Path) -> None:
    """Installed alone; its dependencies are then lent to it from here."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    assert all((site / name).is_file() for name in package_files())
    lent = os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"]}
    code = "import gralora; print(gralora.__file__); [getattr(gralora, name) for name in gralora.__all__]"
    done = subprocess.run([python, "-c", code], env=lent, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == site / "gralora" / "__init__.py"
    done = subprocess.run([tmp_path / "bin" / "gralora", "--help"], env=lent, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: gralora" in done.stdout, done.stderr


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: version if asked == name else real(asked))
    requires = ["peft>=0.20,<0.22", "torch>=2.11", "transformers>=5.6", 'pytest; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda asked: requires)
