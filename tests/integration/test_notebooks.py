"""Notebooks read like tutorials and import what users may.

The build of the documentation (``make docs``) executes all of them.
"""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext", reason="notebooks need the extra 'notebooks'")

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
NAMES = [
    "01_quickstart",
    "02_langchain",
    "03_llama_index",
    "04_open_domain_qa",
    "05_train_your_own",
    "06_inside_a_memory",
]
OURS = ("vist_rag", "langchain_vist", "llama_index_vist")
ROOMS = {"checkpoint", "compression", "config", "evaluation", "generation", "inspection", "retrieval", "training"}
"""Of ``vist_rag``, what notebooks may open besides the package itself: what the documentation's reference names."""
LONGEST_DEFINITION = 6
"""Lines; what is longer belongs in the library."""
LONGEST_CELL = 45


def cells(notebook: Path, kind: str) -> list[str]:
    read: Any = jupytext.read(notebook)
    return [cell.source for cell in read.cells if cell.cell_type == kind]


def code(notebook: Path) -> list[ast.Module]:
    return [ast.parse(source) for source in cells(notebook, "code")]


def test_the_six_are_there() -> None:
    assert [notebook.stem for notebook in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_a_tutorial(notebook: Path) -> None:
    text, sources = cells(notebook, "markdown"), cells(notebook, "code")
    assert re.match(r"# \S", text[0])
    assert "\n# " not in "\n".join(text)
    assert re.match(r"## What this shows, and what it does not\n", text[-1][text[-1].rfind("## ") :])
    assert text[-1].count("\n- ") >= 3
    assert max(len(source.splitlines()) for source in sources) <= LONGEST_CELL
    shown = [source for source in sources if "plt.show()" in source or "display(Image" in source]
    told = [one for one in text if one.startswith("*In words: ")]
    assert shown, "a notebook shows a figure"
    assert len(told) == len(shown), "every figure is told in words below it"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_nothing_that_belongs_in_the_library(notebook: Path) -> None:
    for tree in code(notebook):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < LONGEST_DEFINITION, node.name


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_public_names(notebook: Path) -> None:
    imports = [node for tree in code(notebook) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if str(node.module).partition(".")[0] in OURS]
    assert ours
    for node in ours:
        package, _, rest = str(node.module).partition(".")
        assert not rest or (package == "vist_rag" and rest.partition(".")[0] in ROOMS), node.module
        public = getattr(import_module(str(node.module)), "__all__", None)
        for name in (alias.name for alias in node.names):
            assert not name.startswith("_"), name
            assert public is None or name in public, f"{name} is no public name of {node.module}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_names_no_place_of_a_machine(notebook: Path) -> None:
    text = notebook.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|usr|Users|mnt|data)/", text)
    assert not re.search(r"https?://(?!arxiv\.org|127\.0\.0\.1|localhost)", text)
