"""Write a repository's address into what PyPI shows: `python .github/address.py https://host/OWNER/NAME TAG`.

Links and pictures of README.md are relative, and PyPI has none of the files; pyproject.toml does not know where it is
published. The release workflow calls this before it builds.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(address: str, tag: str) -> None:
    readme, project = ROOT / "README.md", ROOT / "pyproject.toml"
    text = with_address(readme.read_text(encoding="utf-8"), address, tag)
    readme.write_text(text, encoding="utf-8")
    urls = f'[project.urls]\nSource = "{address}"\nChangelog = "{address}/blob/{tag}/CHANGELOG.md"\n'
    text = project.read_text(encoding="utf-8")
    project.write_text(text.replace("[project.urls]\n", urls), encoding="utf-8")


def with_address(readme: str, address: str, tag: str) -> str:
    """The text with absolute links, and REPOSITORY as the address."""
    readme = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\g<1>{address}/raw/{tag}/", readme)
    readme = re.sub(r"(?<=\]\()(?!https?:|#)", f"{address}/blob/{tag}/", readme)
    return readme.replace("REPOSITORY is the address of this one.", "").replace("REPOSITORY", address)


if __name__ == "__main__":
    main(*sys.argv[1:])
