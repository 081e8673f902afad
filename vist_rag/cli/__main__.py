"""``python -m vist_rag.cli`` is ``vist-rag``."""

from vist_rag.cli import app

app(prog_name="vist-rag")
