"""Nodes as passages, and passages as nodes."""

from __future__ import annotations

from dataclasses import replace

from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    MetadataMode,
    Node,
    TextNode,
)
from llama_index.core.vector_stores.utils import node_to_metadata_dict

from vist_rag import Passage

_KINDS: dict[str, type[BaseNode]] = {
    kind.class_name(): kind for kind in (Document, ImageDocument, ImageNode, IndexNode, Node, TextNode)
}


def to_passage(node: BaseNode) -> Passage:
    """A node as it is read: its text, and the title that its metadata names."""
    title = node.metadata.get("title")
    return Passage(
        node.get_content(MetadataMode.NONE),
        id=node.node_id,
        title=title if isinstance(title, str) else "",
    )


def to_stored(node: BaseNode) -> Passage:
    """A node as an index keeps it: what is read, and beside it all that makes the node again."""
    source = node.metadata.get("source")
    return replace(
        to_passage(node),
        source=source if isinstance(source, str) else "",
        metadata=node_to_metadata_dict(node, remove_text=isinstance(node, TextNode)),
    )


def to_node(passage: Passage) -> BaseNode:
    """The node that was stored, or a new one for a passage that came another way."""
    content = passage.metadata.get("_node_content")
    if content is None:
        named = {"title": passage.title, "source": passage.source}
        metadata = {**passage.metadata, **{key: value for key, value in named.items() if value}}
        return TextNode(id_=passage.id, text=passage.text, metadata=metadata)
    node = _KINDS.get(passage.metadata["_node_type"], TextNode).from_json(content)
    if isinstance(node, TextNode):
        node.set_content(passage.text)
    return node


def is_text(node: BaseNode) -> bool:
    """Whether a node is text and nothing else."""
    if isinstance(node, Node):
        return not (node.image_resource or node.audio_resource or node.video_resource)
    return isinstance(node, TextNode) and not isinstance(node, ImageNode)
