"""Lets the site take in what lies outside docs/: README (its first page), CONTRIBUTING, CHANGELOG, and what they link.

The documents are written for a reader of the repository, with links relative to each file. In the site docs/ is the
root; a page or file of the rest of the repository keeps its own path below it, and links are moved accordingly.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent
PAGES = {"README.md": "index.md"}  # where a page goes that does not keep its path
_MARK = "\0"
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds every file that is reached by links from the pages, and drops the list of documents that GitHub shows."""
    files.remove(files.get_file_from_path("README.md"))  # docs/README.md: the navigation is that list
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if files.get_file_from_path(_place(path)) is None:
            file = File.generated(config, _place(path), abs_src_path=str(ROOT / path))
            files.append(file)
        linked = _links(path) if path.endswith(".md") else []
        waiting += [link for link in linked if link not in seen and (ROOT / link).is_file()]
        seen.update(linked)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Moves the links of a page as its files were moved."""
    own = _origin(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = _target(own, match[2])
        if target is None:
            return match[0]
        if (ROOT / target).is_dir() or target == "docs/README.md":
            return match[0].partition("](")[0].lstrip("!") + "]"  # a folder is no page: its name stays, as text
        place = posixpath.relpath(_place(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{place}{match[3] or ''})"

    return _outside_code(markdown, lambda text: _LINK.sub(moved, text))


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Changes a page where it is not code; code inside a link's text stays part of the link."""
    code = [match[0] for match in _CODE.finditer(markdown)]
    marked = change(_CODE.sub(_MARK, markdown))
    kept = iter(code)
    return re.sub(_MARK, lambda _: next(kept), marked)


def _links(path: str) -> list[str]:
    text = _CODE.sub("", (ROOT / path).read_text(encoding="utf-8"))
    found = (_target(path, match[2]) for match in _LINK.finditer(text))
    return [target for target in found if target is not None]


def _target(page: str, link: str) -> str | None:
    """The file of the repository that a page links, relative to the root; None for other sites."""
    if "://" in link or link.startswith("mailto:"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _place(path: str) -> str:
    return PAGES.get(path, path.removeprefix("docs/"))


def _origin(place: str) -> str:
    back = {new: old for old, new in PAGES.items()}
    if place in back:
        return back[place]
    return place if (ROOT / place).is_file() else f"docs/{place}"
