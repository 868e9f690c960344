"""The code in README.md and docs/ runs: each page from top to bottom, in one namespace, as a reader's session would.

A block opened by ```python no-run is for reading only.
"""

import re
from pathlib import Path

import pyro
import pytest
import torch

from pyro_vfe import errors

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python[ \t]*\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Returns (line of the block's first statement, code) for every block of a page that is to run."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start("code")) + 1, found["code"]) for found in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    torch.manual_seed(0)
    namespace = {"__name__": page.stem}
    for line, code in blocks(page):
        # The blank lines let a traceback name the page's own line.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
    assert "nan" not in capsys.readouterr().out


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
