"""LlamaIndex's metadata filters, nested ones too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from vist_rag import InputError


def matches(asked: MetadataFilters | MetadataFilter | None, metadata: Mapping[str, Any]) -> bool:
    """Whether metadata is what filters ask for; each of them means what it means to LlamaIndex's own store.

    Raises:
        InputError: If a value cannot be compared with the one that is asked for.
    """
    if asked is None:
        return True
    if isinstance(asked, MetadataFilter):
        return _holds(asked, metadata)
    each = (matches(one, metadata) for one in asked.filters)
    if not asked.filters or asked.condition is None or asked.condition == FilterCondition.AND:
        return all(each)
    return any(each) == (asked.condition == FilterCondition.OR)


def _holds(asked: MetadataFilter, metadata: Mapping[str, Any]) -> bool:
    try:
        return build_metadata_filter_fn(lambda _: metadata, MetadataFilters(filters=[asked]))("")
    except TypeError as error:
        raise InputError(
            f"The filter {asked.key} {asked.operator.value} {asked.value!r} cannot be applied to "
            f"{metadata.get(asked.key)!r} ({error}); give a value of the same kind."
        ) from error
