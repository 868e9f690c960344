"""What makes one text serve GitHub and the site: which blocks are run, where links lead, how docstrings are set."""

import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

NOTEBOOK = """---
file_format: mystnb
kernelspec: {name: python3, display_name: Python 3}
---
"""

PAGES = {
    "README.md": "docs/index.md",
    "CONTRIBUTING.md": "docs/contributing.md",
    "CHANGELOG.md": "docs/changelog.md",
    "benchmarks/RESULTS.md": "docs/benchmarks.md",
    "benchmarks/NOTES.md": "docs/benchmark_notes.md",
    "examples": "docs/gallery/index.rst",
}
"""Which page of the site shows a file of the repository."""

EXAMPLE = re.compile(r"examples/(\w+)\.py")
PYTHON_BLOCK = re.compile(r"^```python[ \t]*$", re.MULTILINE)
NOT_RUN = re.compile(r"^```python no-run[ \t]*$", re.MULTILINE)
INCLUDE = re.compile(r"\A```\{include\} (?P<path>\S+)\n```\s*\Z")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)(?P<path>[^)#\s]+)")
YEAR = re.compile(r"\(\d{4}\)")
SECTION = re.compile(r"^(Args|Returns|Raises|References|Yields):$")


def prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    """Makes a page of the site of a text that is written for GitHub too.

    Args:
        app: Sphinx.
        docname: The page's name.
        source: Its text, to be changed in place.
    """
    page = Path(app.env.doc2path(docname))
    if page.suffix == ".md":
        root = Path(app.srcdir).parent
        source[0] = run_python_blocks(with_links_of_the_site(*included(source[0], page), page, root))


def included(text: str, page: Path) -> tuple[str, Path]:
    """Returns the text of the file that a page consists of, and the file; or the page's own.

    Args:
        text: The page's text.
        page: Its path.
    """
    found = INCLUDE.match(text)
    if not found:
        return text, page
    path = (page.parent / found["path"]).resolve()
    return path.read_text(encoding="utf-8"), path


def with_links_of_the_site(text: str, origin: Path, page: Path, root: Path) -> str:
    """Returns a text whose links to files of the repository lead to the pages that show these.

    Args:
        text: A text.
        origin: The file that its links are relative to.
        page: The file that they shall be relative to.
        root: The repository.
    """

    def target(link: re.Match[str]) -> str:
        path = os.path.relpath(origin.parent / link["path"], root)
        shown = PAGES.get(path, EXAMPLE.sub(r"docs/gallery/\1.rst", path))
        return os.path.relpath(root / shown, page.parent)

    return LINK.sub(target, text)


def run_python_blocks(text: str) -> str:
    """Returns a notebook of a page with ```python blocks, which GitHub colours: so the site runs them too.

    Args:
        text: The page's text.
    """
    if PYTHON_BLOCK.search(text) and not text.startswith("---"):
        text = NOTEBOOK + PYTHON_BLOCK.sub("```{code-cell}", text)
    return NOT_RUN.sub("```python", text)


def indent_arguments(app: Sphinx, what: str, name: str, item: object, options: Any, lines: list[str]) -> None:
    """Indents what follows an `Args:` that opens a docstring, which lies flat once the docstring's margin is cut.

    Args:
        app: Sphinx.
        what: The kind of thing.
        name: Its name.
        item: The thing.
        options: Of the directive.
        lines: Its docstring, to be changed in place.
    """
    if not lines or lines[0] != "Args:":
        return
    for at in range(1, len(lines)):
        if SECTION.match(lines[at]):
            break
        lines[at] = f"    {lines[at]}" if lines[at] else ""


def list_references(app: Sphinx, what: str, name: str, item: object, options: Any, lines: list[str]) -> None:
    """Makes a list of the works that a docstring refers to; each begins with authors and year.

    Args:
        app: Sphinx.
        what: The kind of thing.
        name: Its name.
        item: The thing.
        options: Of the directive.
        lines: Its docstring, to be changed in place.
    """
    if "References:" not in lines:
        return
    for at in range(lines.index("References:") + 1, len(lines)):
        if not lines[at].startswith("    "):
            break
        lines[at] = f"    {'* ' if YEAR.search(lines[at]) else '  '}{lines[at].strip()}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the above.

    Args:
        app: Sphinx.
    """
    app.connect("source-read", prepare)
    # Before napoleon reads the sections.
    app.connect("autodoc-process-docstring", indent_arguments, priority=100)
    app.connect("autodoc-process-docstring", list_references, priority=101)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
