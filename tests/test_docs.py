"""The code in README.md and docs/ runs: each page from top to bottom, in one namespace, as a reader's session would.

Blocks are opened by ```python or, in pages that are notebooks, by ```{code-cell}; a block's last expression is printed,
as a notebook shows it. A block opened by ```python no-run is for reading only.
"""

import ast
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from matplotlib import pyplot

import pyro_vfe
from pyro_vfe import errors

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MADE_BY_SPHINX = {"_build", "gallery"}
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in DOCS.rglob("*.md") if page.relative_to(DOCS).parts[0] not in MADE_BY_SPHINX),
]
BLOCK = re.compile(r"^```(?:python|\{code-cell\}.*?)[ \t]*\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
CELL_OPTIONS = re.compile(r"\A(?:^:[^\n]*\n)+", re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Returns (line of the block's first statement, code) for every block of a page that is to run."""
    text = page.read_text(encoding="utf-8")
    found = [(text.count("\n", 0, block.start("code")) + 1, block["code"]) for block in BLOCK.finditer(text)]
    # Options of a cell keep their lines, so that the others keep their numbers.
    return [(line, CELL_OPTIONS.sub(lambda options: "\n" * options[0].count("\n"), code)) for line, code in found]


def run_cell(code: str, line: int, page: Path, namespace: dict[str, Any]) -> None:
    """Runs a block, and prints the value of the expression that it ends with, unless a semicolon follows."""
    # The blank lines let a traceback name the page's own line.
    tree = ast.parse("\n" * (line - 1) + code, str(page))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(page), "exec"), namespace)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), str(page), "eval"), namespace)
        if value is not None and not code.rstrip().endswith(";"):
            print(value)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": page.stem}
    try:
        for line, code in blocks(page):
            run_cell(code, line, page, namespace)
    finally:
        pyplot.close("all")
    assert not re.search(r"\bnan\b", capsys.readouterr().out, re.IGNORECASE)


def test_the_readme_has_a_quickstart() -> None:
    (_, quickstart), *_ = blocks(ROOT / "README.md")
    assert "decompose" in quickstart
    assert len([line for line in quickstart.splitlines() if line.strip()]) <= 25


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there."


@pytest.mark.parametrize("error", sorted(name for name in vars(errors) if name.endswith("Error")))
def test_every_error_has_its_entry_among_the_sharp_bits(error: str) -> None:
    assert f"`{error}`" in (ROOT / "docs" / "sharp_bits.md").read_text(encoding="utf-8")


def test_every_public_name_stands_once_in_the_reference() -> None:
    entries = Counter(
        entry
        for page in sorted((DOCS / "api").glob("*.md"))
        for entry in re.findall(r"^\.\. auto(?:class|function):: (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert entries == Counter(pyro_vfe.__all__)


def test_the_page_of_tasks_names_every_public_name() -> None:
    named = re.findall(r"`(\w+)`", (DOCS / "api" / "index.md").read_text(encoding="utf-8"))
    assert Counter(named) == Counter([*pyro_vfe.__all__, "VFEError"])


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    api = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    listed = [
        pattern
        for tree in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL)
        for pattern in re.findall(r"[\w*/]+(?=>?$)", tree, re.MULTILINE)
    ]
    for page in PAGES[1:]:
        name = page.relative_to(DOCS).with_suffix("")
        where = listed if name.parent == Path() else re.findall(r"^\w+$", api, re.MULTILINE)
        here = name if name.parent == Path() else Path(name.name)
        assert name in (Path("index"), Path("api/index")) or any(here.match(entry) for entry in where), page.name


@pytest.mark.parametrize("target", ["docs", "docs-check"])
def test_make_knows_the_folders_that_the_site_is_built_in(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rule = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert rule and "docs/_build/html" in rule[1]
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    for folder in MADE_BY_SPHINX:
        assert f"docs/{folder}/" in ignored
        assert f"docs/{folder}" in makefile.partition("\nclean:")[2].partition("\n\n")[0]
