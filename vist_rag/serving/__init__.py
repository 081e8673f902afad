"""An OpenAI-compatible server over an index: ``create_app`` makes it, ``serve`` runs it. Needs the extra ``serve``."""

from __future__ import annotations

from vist_rag.errors import MissingDependencyError

try:
    from vist_rag.serving.app import create_app
    from vist_rag.serving.limits import Limits
    from vist_rag.serving.run import is_loopback, serve
except ModuleNotFoundError as error:
    if error.name not in {"fastapi", "prometheus_client", "uvicorn"}:
        raise
    raise MissingDependencyError("A server", error.name, "serve") from error

__all__ = ["Limits", "create_app", "is_loopback", "serve"]
