"""How a node says that it is read as memory: in its own template fields, which every store and copy keeps."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace

from llama_index.core.schema import BaseNode

from vist_rag import Marked, VistReader

_FIELDS = ("text_template", "metadata_template", "excluded_llm_metadata_keys", "excluded_embed_metadata_keys")
_OURS = ("vist_ref", "vist_latents", "vist_before")


def written(node: BaseNode, marked: Marked, reader: VistReader) -> BaseNode:
    """A copy of a node whose content for an LLM is what the reader writes for its passage.

    The text stays as it is. ``vist_ref`` and ``vist_latents`` in the metadata say how it is read, ``vist_before`` holds
    the fields that were replaced. Without metadata LlamaIndex passes a template over, so ``vist_ref`` is what an LLM
    may see of it, and the template shows nothing of the sort. To an embedding model the node is its bare text.
    """
    copy = node.model_copy(deep=True)
    before = {field: getattr(copy, field) for field in _FIELDS}
    hole = secrets.token_hex(16)  # stands for the text, and is in no title
    form = reader.write(replace(marked.hit.passage, text=hole), marked.ref)
    copy.metadata = {
        **copy.metadata,
        "vist_ref": marked.ref,
        "vist_latents": marked.size,
        "vist_before": json.dumps(before),
    }
    for field, value in {
        "text_template": form.replace("{", "{{").replace("}", "}}").replace(hole, "{content}"),
        "metadata_template": "{key}",
        "excluded_llm_metadata_keys": [key for key in copy.metadata if key != "vist_ref"],
        "excluded_embed_metadata_keys": list(copy.metadata),
    }.items():
        setattr(copy, field, value)
    return copy


def as_before(node: BaseNode) -> BaseNode:
    """A node as it was before :func:`written`: a copy, or the node itself where there is nothing to undo."""
    if "vist_before" not in node.metadata:
        return node
    copy = node.model_copy(deep=True)
    try:
        before = json.loads(node.metadata["vist_before"])
        for field in _FIELDS:
            setattr(copy, field, before[field])
    except (KeyError, TypeError, ValueError):  # a key of that name that is not of our making
        return node
    copy.metadata = {key: value for key, value in copy.metadata.items() if key not in _OURS}
    return copy
