"""Real text in any amount that a machine without a model hub can get: source and documentation of packages on PyPI.

Wheels have a package's source, source distributions its documentation. pip downloads both, in the versions that the
lists in `packages` name, and wheels for one platform, so that every machine gets the same files; nothing is installed.
A package whose metadata do not say that its licence is a permissive one is an error.

    python -m benchmarks.quality data --task source --model MODEL --packages FOLDER --out source.npz
"""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PLATFORM = ["--python-version", "3.12", "--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_28_x86_64"]
DOMAINS = {"source": (".py",), "docs": (".rst", ".md", ".txt")}  # name of the list in `packages` -> kinds of files
PERMISSIVE = r"\b(MIT|BSD|Apache|ISC|Python Software Foundation|PSF|Zlib|0BSD|CC0|Repoze)\b"
OTHER = r"\b(A?L?GPL|General Public|MPL|Mozilla|EUPL|Proprietary)"


def fetch(domain: str, folder: Path) -> Path:
    """Download the packages of a domain that are not there yet, and unpack their files.

    Args:
        domain: "source", of which wheels are downloaded; or "docs", source distributions, for which pip runs the hooks
            of their builds.
        folder: for the archives and for what is unpacked.

    Returns:
        A folder with one for every package.

    Raises:
        subprocess.CalledProcessError: if pip cannot download a package.
        ValueError: if a package's metadata have no permissive licence.
    """
    is_source = domain == "source"
    kind = ["--only-binary", ":all:", *PLATFORM, "--platform", "any"] if is_source else ["--no-binary", ":all:"]
    archives, text = folder / ("wheels" if is_source else "sdists"), folder / domain
    for requirement in requirements(domain):
        name, _, version = requirement.partition("==")
        if not _archive(archives, name, version):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind]
            subprocess.run([*pip, "--dest", str(archives), requirement], check=True)
        if not (text / name).is_dir():
            unpack(_archive(archives, name, version), text / name, DOMAINS[domain])
    return text


def requirements(domain: str) -> list[str]:
    """`name==version` of each package of a domain."""
    lines = (Path(__file__).with_name("packages") / f"{domain}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _archive(folder: Path, name: str, version: str) -> Path | None:
    spelt = re.sub(r"[-_.]+", "[-_.]+", re.escape(name).replace(r"\-", "-"))
    pattern = rf"{spelt}-{re.escape(version)}(-.*\.whl|\.tar\.gz|\.zip)"
    return next((path for path in sorted(folder.glob("*")) if re.fullmatch(pattern, path.name, re.IGNORECASE)), None)


def unpack(archive: Path | None, folder: Path, suffixes: tuple[str, ...]) -> None:
    """Write an archive's files of these kinds below `folder`, if its licence is a permissive one."""
    assert archive is not None
    files = dict(_files(archive, (*suffixes, "METADATA", "PKG-INFO")))
    metadata = [path for path in files if path.name in ("METADATA", "PKG-INFO")]
    said = licence(files[min(metadata, key=lambda path: len(path.parts))].decode("utf-8", "replace"))
    if re.search(OTHER, said, re.IGNORECASE) or not re.search(PERMISSIVE, said):
        raise ValueError(f"{archive.name}: its metadata have the licence {said!r}, and no permissive one alone.")
    for path, content in files.items():
        if path not in metadata:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)


def licence(metadata: str) -> str:
    """What a package's metadata say of its licence: the expression, else its classifiers, else the first line."""
    message = email.message_from_string(metadata)
    classifiers = [str(c).split(" :: ")[-1] for c in message.get_all("Classifier", []) if str(c).startswith("License")]
    free_text = str(message.get("License", "")).strip().partition("\n")[0]
    return str(message.get("License-Expression") or ", ".join(classifiers) or free_text)


def _files(archive: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Relative path and content of an archive's files; paths that lead out of the archive are left out."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as whole:
            for name in whole.namelist():
                if name.endswith(suffixes) and _is_inside(name):
                    yield PurePosixPath(name), whole.read(name)
        return
    with tarfile.open(archive) as whole:
        for member in whole:
            if member.isfile() and member.name.endswith(suffixes) and _is_inside(member.name):
                content = whole.extractfile(member)
                assert content is not None
                yield PurePosixPath(*PurePosixPath(member.name).parts[1:]), content.read()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
