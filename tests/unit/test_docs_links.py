"""Links between pages lead to files and headings that exist."""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from docs_pages import PAGES, ROOT, fences, name, text

OF_OTHERS = {"docs/gguf.md"}  # ggml's


def slug(heading: str) -> str:
    """The anchor of a heading, as the site's generator and GitHub make it."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    plain = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, whether written or generated."""
    body = text(page)
    for block in fences(page, "", "text", "bash", "console", "yaml", "python", "toml", "json"):
        body = body.replace(block, "")
    return {slug(heading) for heading in re.findall(r"^#{1,6} (.+)$", body, re.MULTILINE)}


def broken(page: Path, target: str) -> bool:
    """Whether a link of a page leads nowhere. The web is not asked."""
    if re.match(r"[a-z]+:", target):
        return False
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    return not file.exists() or bool(anchor and anchor not in anchors(file))


def links(page: Path) -> list[str]:
    """The targets of all links and images of a page's text."""
    body = re.sub(r"^ *```.*?^ *```$", "", text(page), flags=re.MULTILINE | re.DOTALL)
    codes = re.compile(r"`[^`\n]*`")  # some look like links
    return re.findall(r"\]\(([^)\s]+)\)", codes.sub(lambda code: code[0].replace("](", ""), body))


def test_links_and_anchors() -> None:
    found = [(page, target) for page in PAGES for target in links(page)]
    assert [f"{name(page)}: {target}" for page, target in found if broken(page, target)] == []
    assert len(found) > 120 and sum("#" in target for _, target in found) > 40


def test_pages_that_the_source_names() -> None:
    """`docs/…` in docstrings and messages, with or without a heading behind it."""
    wrong, seen = [], 0
    for file in [*(ROOT / "hlat").rglob("*.py"), *(ROOT / "recipes").rglob("*.yaml")]:
        for path, anchor in re.findall(
            r"\b(docs/[\w./-]+\.md)(?:#([\w-]+))?", file.read_text(encoding="utf-8")
        ):
            seen += 1
            if path in OF_OTHERS:
                continue
            if broken(ROOT / "README.md", f"{path}#{anchor}" if anchor else path):
                wrong.append(f"{file.relative_to(ROOT)}: {path}#{anchor}")
    assert wrong == [] and seen > 15


def test_a_broken_link_is_noticed() -> None:
    page = ROOT / "docs" / "index.md"
    assert broken(page, "no-such-page.md") and broken(page, "design.md#no-such-heading")
    assert not broken(page, "design.md#four-seams") and not broken(page, "https://example.org/x")
