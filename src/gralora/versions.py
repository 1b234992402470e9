"""Check the installed PEFT, torch and transformers against the versions that pyproject.toml supports."""

import importlib.metadata
import warnings

from packaging.requirements import Requirement


def check_versions() -> None:
    """Refuse a package that is too old; `import gralora` calls this before it imports any of them.

    Raises:
        ImportError: if a package is older than gralora supports; a newer one gives a warning.
    """
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("gralora") or []]
    except importlib.metadata.PackageNotFoundError:  # run from its source tree, not installed
        return
    for requirement in requirements:
        if requirement.marker is not None:  # the requirement belongs to an extra
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # importing the missing package raises the error
        if requirement.specifier.contains(version, prereleases=True):
            continue
        advice = f"gralora {importlib.metadata.version('gralora')} supports {requirement}, and {version} is installed"
        newer = [part for part in requirement.specifier if part.operator in ("<", "<=")]
        if any(not part.contains(version, prereleases=True) for part in newer):
            warnings.warn(f"{advice}: it is newer than what was tested; update gralora.", stacklevel=3)
        else:
            raise ImportError(f"{advice}: pip install '{requirement}'")
