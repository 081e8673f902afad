"""Documents in vist-rag's words, and back."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from langchain_core.documents import Document

from vist_rag import InputError, Marked, Passage

REF, LATENTS, TITLE = "vist_ref", "vist_latents", "vist_title"
"""What a document's metadata says about its memory: reference (empty: read as text), positions, title."""


def to_passage(text: str, id_: str | None, metadata: Mapping[str, Any]) -> Passage:
    """A document as a passage; ``title`` and ``source`` are taken from the metadata, which stays whole.

    Raises:
        InputError: If the metadata is not JSON.
    """
    metadata = {key: value for key, value in metadata.items() if key not in (REF, LATENTS, TITLE)}
    title, source = metadata.get("title"), metadata.get("source")
    return Passage(
        text,
        id_ or _content_id(text, metadata),
        title if isinstance(title, str) else "",
        source if isinstance(source, str) else "",
        metadata,
    )


def to_document(passage: Passage, **more: Any) -> Document:
    """A passage as a document."""
    metadata = {"title": passage.title, "source": passage.source}
    metadata = {key: value for key, value in metadata.items() if value}
    metadata = {**metadata, **copy.deepcopy(dict(passage.metadata)), **more}
    return Document(id=passage.id, page_content=passage.text, metadata=metadata)


def marked(document: Document, mark: Marked) -> Document:
    """A copy of a document that says how it is read."""
    says = {REF: mark.ref, LATENTS: mark.size, TITLE: mark.hit.passage.title}
    return document.model_copy(update={"metadata": {**copy.deepcopy(document.metadata), **says}})


def plain(document: Document) -> Document:
    """A copy of a document that is read as text."""
    title = document.metadata.get("title")
    says = {REF: "", LATENTS: 0, TITLE: title if isinstance(title, str) else ""}
    return document.model_copy(update={"metadata": {**copy.deepcopy(document.metadata), **says}})


def _content_id(text: str, metadata: Mapping[str, Any]) -> str:
    """Adding a document twice is adding it once; one that says something else about the same text is another one."""
    try:
        content = json.dumps([text, metadata], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"Metadata of a document must be JSON, got {error}; keep to strings, finite numbers, booleans, None, lists "
            "and dicts."
        ) from error
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]
