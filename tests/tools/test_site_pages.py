"""The site has every page, and a link leads in it where it leads on GitHub."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from making.site_pages import PAGES, links_from_docs, links_from_root, slug

ROOT = Path(__file__).parents[2]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
FILES = [ROOT / name for name in PAGES] + sorted((ROOT / "docs").rglob("*.md"))


def pages_of(nav: list) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages_of(value)


def test_every_page_is_in_the_navigation_once():
    docs = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages_of(SITE["nav"])) == sorted([*docs, *PAGES.values()])


@pytest.mark.parametrize(("text", "found"), [
    ("[a](docs/data.md) ![b](docs/memory.svg)", "[a](data.md) ![b](memory.svg)"),
    ("[a](docs/training.md#going-on) [b](CHANGELOG.md)", "[a](training.md#going-on) [b](changelog.md)"),
    ("[a](#on-a-card) [b](https://example.org/docs/x)", "[a](#on-a-card) [b](https://example.org/docs/x)"),
])  # fmt: skip
def test_links_of_the_readme(text: str, found: str):
    assert links_from_root(text) == found


@pytest.mark.parametrize(("text", "found"), [
    ("[a](../README.md#export) [b](data.md)", "[a](index.md#export) [b](data.md)"),
    ("[a](../../CHANGELOG.md) [b](../data.md)", "[a](../changelog.md) [b](../data.md)"),
])  # fmt: skip
def test_links_of_a_page(text: str, found: str):
    assert links_from_docs(text) == found


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page; the second of two that are alike ends in -1."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    return {slug(re.sub(r"\]\([^)]*\)", "", heading)) for heading in headings}


@pytest.mark.parametrize("page", FILES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_a_heading_find_it(page: Path):
    for link, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert anchor in anchors(page.parent / link if link else page), f"{link}#{anchor}"


def test_a_heading_has_the_anchor_that_github_gives_it():
    assert slug("What `--verify` says, and how to read it") == "what---verify-says-and-how-to-read-it"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_for_nothing_elsewhere(tmp_path: Path):
    pytest.importorskip("material", reason="mkdocs-material is missing: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = sorted(tmp_path.rglob("*.html"))
    assert len(built) == len(FILES) + 1  # and the one for what is not found
    loaded = re.compile(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^>]*>")
    assert [found for page in built for found in loaded.findall(page.read_text(encoding="utf-8"))] == []
