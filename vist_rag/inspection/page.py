"""The page that shows an inspection: three files without a build step, and all of them as one file with its data."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_DIRECTORY = Path(__file__).parents[1] / "assets" / "page"
_STYLE, _SCRIPT = '<link rel="stylesheet" href="page.css">', '<script src="page.js" defer></script>'


def page_files() -> dict[str, str]:
    """The files of the page by name: ``index.html``, ``page.css``, ``page.js``."""
    return {name: (_DIRECTORY / name).read_text(encoding="utf-8") for name in ("index.html", "page.css", "page.js")}


def whole_page(inspection: Mapping[str, Any]) -> str:
    """One file of HTML that shows an inspection and asks nothing of any network.

    Args:
        inspection: What ``Inspection.to_dict`` gives.
    """
    files = page_files()
    style, script = files["page.css"], files["page.js"]
    # Whatever stands in a passage, the element that holds it ends where it should: no "<" is in it.
    data = json.dumps(inspection, allow_nan=False).replace("<", "\\u003c")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    document = files["index.html"]
    for found, own in (
        (
            '<meta charset="utf-8">',
            f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">',
        ),
        (_STYLE, f"<style>{style}</style>"),
        (_SCRIPT, ""),
        # At the end, as there is no such thing as an inline script that is deferred.
        (
            "</body>",
            f'<script type="application/json" id="inspection">{data}</script>\n<script>{script}</script>\n</body>',
        ),
    ):
        document = document.replace(found, own, 1)
    return document


def _hash(text: str) -> str:
    """A source of a content security policy: this very text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
