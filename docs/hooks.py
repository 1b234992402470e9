"""What MkDocs adds to the pages: README.md before the list of pages, to the API the fields of `LoraConfig` and the
names of `gralora.__all__`, and to all of them where long names in code may break."""

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

import gralora
from gralora.config import GRALORA_FIELDS

ROOT = Path(__file__).parents[1]
MARK = "<!-- the other names of gralora.__all__ -->"
LONG = 44  # letters of a table's cell that is not to become a column of single words
FLAG = r'<span class="flag">\g<0></span>'
FIELDS = "<!-- the fields of gralora.LoraConfig -->"


def on_config(config: Any) -> Any:
    """Called by MkDocs once: link the repository that this clone is of, if that has an address."""
    command = ["git", "-C", str(ROOT), "config", "--get", "remote.origin.url"]
    if found := address(subprocess.run(command, capture_output=True, text=True).stdout.strip()):
        config.repo_url, config.repo_name = found, "Repository"
    return config


def address(remote: str) -> str | None:
    """The page of a repository on the web, without a name or password that `remote` may have; None of a folder."""
    remote = re.sub(r"^(?:ssh://)?git@([^:/]+)[:/]", r"https://\1/", remote)
    remote = re.sub(r"^https://[^/@]+@", "https://", remote)
    return remote.removesuffix(".git") if remote.startswith("https://") else None


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by MkDocs for each page."""
    if page.file.src_uri == "index.md":
        return f"{front((ROOT / 'README.md').read_text(encoding='utf-8'), config.repo_url)}\n\n{markdown}"
    return with_references(markdown.replace("](../README.md", "](index.md"))  # which begins with it


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs for each page's HTML: says where code may break in a line; what a reader copies stays as it is.

    Flags keep their dashes. In tables, long names break after `_`, `.`, `/`, `(`, `=` or `::`, and cells of much text
    are marked: style.css keeps them wide enough to be read.
    """
    html = re.sub(r"<code>[^<\n]+</code>", lambda code: re.sub(r"(?<![^\s>])--[a-z0-9]+", FLAG, code[0]), html)
    cell = re.compile(r"<td.*?</td>", re.S)
    html = cell.sub(lambda c: c[0].replace("<td", '<td class="long"', 1) if letters(c[0]) >= LONG else c[0], html)
    name = re.compile(r"(?<=[>\s])[\w./:(=]{20,}(?=[^<>]*</code>)")
    return cell.sub(lambda c: name.sub(lambda n: re.sub(r"(?:[_./(=]|::)(?=\w)", r"\g<0><wbr>", n[0]), c[0]), html)


def letters(html: str) -> int:
    return len(re.sub("<[^>]+>", "", html))


def front(readme: str, repository: str | None = None) -> str:
    """README.md with links from the site's root, and the repository's address where it stands for it.

    A file outside of docs is named without a link.
    """
    readme = readme.replace("](docs/", "](")
    if repository:
        readme = readme.replace(" REPOSITORY is the address of this one.", "").replace("REPOSITORY", repository)
    return re.sub(r"\[[^\]]+\]\(([A-Z]+(?:\.md)?)\)", r"`\1`", readme)


def with_references(markdown: str) -> str:
    """A page with the fields in place of FIELDS, and of MARK a reference of each public name that it has none of."""
    there = {found.rpartition(".")[2] for found in re.findall(r"^::: (\S+)$", markdown, re.M)}
    missing = (name for name in gralora.__all__ if name not in there)
    fields = {f.name: f.metadata["help"] for f in dataclasses.fields(gralora.LoraConfig)}
    rows = "\n".join(f"| `{name}` | {fields[name].replace('|', '&#124;')} |" for name in GRALORA_FIELDS)
    markdown = markdown.replace(FIELDS, f"| field, besides PEFT's | |\n| --- | --- |\n{rows}")
    return markdown.replace(MARK, "\n".join(f"::: {getattr(gralora, name).__module__}.{name}" for name in missing))
