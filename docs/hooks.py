"""The site's pages: those of docs/, and those of the repository that they link to, with links that lead to their places in the site."""

from __future__ import annotations

import functools
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\[\]]+)\]\(((?!https?://|#)[^)\s#]+)(#[^)\s]*)?\)")


def in_site(path: str) -> str | None:
    """Place in the site of a file of the repository; None for what is no page and no picture of one."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    return path.replace("README.md", "index.md").lower() if path.endswith(".md") else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("bench/**/*.md")]):
        path = page.relative_to(ROOT).as_posix()
        files.append(File.generated(config, in_site(path), content=with_links_of_the_site(page.read_text(encoding="utf-8"), path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Pages of docs/ get the links of the site; the others have them."""
    if (ROOT / "docs" / page.file.src_uri).is_file():
        return with_links_of_the_site(markdown, f"docs/{page.file.src_uri}")
    return markdown


def with_links_of_the_site(markdown: str, path: str) -> str:
    """The text of the file at ``path``: links to files that are not in the site become their names, names of pages their titles."""
    here = posixpath.dirname(in_site(path) or "")

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), found[2]))
        place = in_site(target)
        if place is None:
            return f"`{target}`"
        words = title_of(target) if found[1].endswith(".md") else found[1]
        return f"[{words}]({posixpath.relpath(place, here or '.')}{found[3] or ''})"

    return LINK.sub(link, markdown)


@functools.cache
def title_of(path: str) -> str:
    """The first heading of a page of the repository, up to a colon; its path where there is none."""
    heading = re.search(r"^# (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE) if (ROOT / path).is_file() else None
    return heading[1].partition(":")[0] if heading else path
