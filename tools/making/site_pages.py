"""Pages of the site that lie outside of docs/: README.md as its first page, CONTRIBUTING.md and CHANGELOG.md.

mkdocs calls this by `hooks` in mkdocs.yml. The files stay as GitHub shows them: only their links are turned, because
in the site they stand beside the pages of docs/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\()((?:\.\./)*)([^)\s#:]+)")


def on_config(config: Any) -> Any:
    """Give headings the anchors that GitHub gives them, so that a link works in both places."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of docs/."""
    from mkdocs.structure.files import File

    for name, place in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=links_from_root(text)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn what a page of docs/ links to above it."""
    return markdown if page.file.src_uri in PAGES.values() else links_from_docs(markdown)


def links_from_root(text: str) -> str:
    """A page of the root, its links as they are from within docs/."""
    return LINK.sub(lambda found: found[1] + PAGES.get(found[3], found[3].removeprefix("docs/")), text)


def links_from_docs(text: str) -> str:
    """A page of docs/, its links to the root's pages as they are where those lie in docs/ too."""

    def turned(found: re.Match[str]) -> str:
        above = found[2].removeprefix("../")
        return found[1] + (above + PAGES[found[3]] if found[2] and found[3] in PAGES else found[2] + found[3])

    return LINK.sub(turned, text)
