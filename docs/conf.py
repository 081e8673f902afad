"""The documentation as HTML: ``make docs``, without a network.

What stands elsewhere in the repository is shown, not copied: notebooks are executed, the command line describes itself,
and changelog, security, model card and contributing are included by the pages in ``project/``.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any, ClassVar

import llama_index.core  # noqa: F401  # before autodoc looks at other classes of pydantic: it leaves notes in their base
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

logging.getLogger("faiss").setLevel(logging.WARNING)  # says which instructions it looked for, once for each

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "vist-rag"
author = "The vist-rag authors"
project_copyright = author
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
version = release

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "*.py", "**/.ipynb_checkpoints"]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# The notebooks: percent scripts, each executed once until it changes.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / ".jupyter_cache")
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_render_markdown_format = "myst"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]

html_theme = "furo"
html_title = f"vist-rag {release}"
html_static_path = ["_static"]
html_css_files = ["vist.css"]
html_show_sourcelink = False
html_show_copyright = False
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True


class CommandLine(SphinxDirective):
    """``{command-line}``: every command with its options, as the installed ``vist-rag`` has them."""

    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        """The commands, a section each."""
        import typer
        from typer.cli import get_docs_for_click

        from vist_rag.cli import app

        self.env.note_dependency(str(ROOT / "vist_rag" / "cli" / "__init__.py"))
        group: Any = typer.main.get_command(app)
        text = ""
        for name in group.commands:
            context: Any = typer.Context(group, info_name="vist-rag")
            text += get_docs_for_click(obj=group.commands[name], ctx=context, indent=1, call_prefix="vist-rag")
        return self.parse_text_to_nodes(text.replace("```console\n$ ", "```text\n"), allow_section_headings=True)


def copy_notebooks(app: Sphinx) -> None:
    """Put the notebooks where Sphinx looks for pages; what has not changed keeps its time."""
    wanted = {HERE / "tutorials" / notebook.name: notebook for notebook in sorted(ROOT.glob("notebooks/[0-9]*.py"))}
    for old in set((HERE / "tutorials").glob("*.py")) - set(wanted):
        old.unlink()
    for copy, notebook in wanted.items():
        if not copy.exists() or copy.read_bytes() != notebook.read_bytes():
            shutil.copyfile(notebook, copy)


def point_links_from_here(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Links of an included file are relative to that file; make them so to the page that includes it."""
    source = (HERE / path).resolve()

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[2]).resolve()
        # GitHub shows a directory; a page of this site cannot.
        return link[1] + os.path.relpath(target, HERE / "project") + link[3] if target.is_file() else link[0]

    text = re.sub(r"\A---\n.*?\n---\n", "", content[0], flags=re.DOTALL)  # the hub's, about a model card
    content[0] = re.sub(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))", moved, text)


def leave_out_what_is_inherited(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Methods of PyTorch and transformers are documented there, by them."""
    function = getattr(thing, "fget", None) or getattr(thing, "__func__", thing)
    home = getattr(function, "__module__", None) or ""
    return None if home.split(".")[0] in ("vist_rag", "langchain_vist", "llama_index_vist") else True


def setup(app: Sphinx) -> None:
    """What this site does beyond its extensions."""
    app.add_directive("command-line", CommandLine)
    app.connect("config-inited", lambda app, _config: copy_notebooks(app))
    app.connect("autodoc-skip-member", leave_out_what_is_inherited)
    app.connect("include-read", point_links_from_here)
