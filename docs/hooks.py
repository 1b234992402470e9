"""What MkDocs adds to the pages: README.md before the list of pages, to the API
the fields of `LoraConfig` and the names of `gralora.__all__`."""

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

import gralora
from gralora.config import GRALORA_FIELDS

ROOT = Path(__file__).parents[1]
MARK = "<!-- the other names of gralora.__all__ -->"
FIELDS = "<!-- the fields of gralora.LoraConfig -->"


def on_config(config: Any) -> Any:
    """Called by MkDocs once: link the repository that this clone is of, if that has an address."""
    command = ["git", "-C", str(ROOT), "config", "--get", "remote.origin.url"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if found.startswith("https://"):
        config.repo_url, config.repo_name = found.removesuffix(".git"), "Repository"
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by MkDocs for each page."""
    if page.file.src_uri == "index.md":
        return f"{front((ROOT / 'README.md').read_text(encoding='utf-8'))}\n\n{markdown}"
    return with_references(markdown.replace("](../README.md", "](index.md"))  # which begins with it


def front(readme: str) -> str:
    """README.md with links from the site's root. A file outside of docs is named without a link."""
    readme = readme.replace("](docs/", "](")
    return re.sub(r"\[[^\]]+\]\(([A-Z]+(?:\.md)?)\)", r"`\1`", readme)


def with_references(markdown: str) -> str:
    """A page with the fields in place of FIELDS, and of MARK a reference of each public name that it has none of."""
    there = {found.rpartition(".")[2] for found in re.findall(r"^::: (\S+)$", markdown, re.M)}
    missing = (name for name in gralora.__all__ if name not in there)
    fields = {f.name: f.metadata["help"] for f in dataclasses.fields(gralora.LoraConfig)}
    rows = "\n".join(f"| `{name}` | {fields[name].replace('|', '&#124;')} |" for name in GRALORA_FIELDS)
    markdown = markdown.replace(FIELDS, f"| field, besides PEFT's | |\n| --- | --- |\n{rows}")
    return markdown.replace(MARK, "\n".join(f"::: {getattr(gralora, name).__module__}.{name}" for name in missing))
