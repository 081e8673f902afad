"""What stands in a prompt: documents as spans or as text, and the question beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue, StringPromptValue
from langchain_core.prompts import ChatPromptTemplate, StringPromptTemplate, format_document
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel, RunnablePassthrough

from langchain_vist.documents import REF, TITLE
from vist_rag import Passage, PromptTemplate, strip_spans, write_span

_TEMPLATE = PromptTemplate()


class VistDocumentPrompt(StringPromptTemplate):
    """A document as a span where it is read as memory, else as text with its title.

    For ``create_stuff_documents_chain(..., document_prompt=VIST_DOC_PROMPT)``. Documents must have passed a
    ``VistDocumentCompressor`` or a ``VistRetriever``, which give them the metadata that it reads.
    """

    def format(self, **kwargs: Any) -> str:
        """The text of a document in a prompt."""
        passage = Passage(kwargs["page_content"], title=kwargs[TITLE])
        if kwargs[REF]:
            return _TEMPLATE.memory + write_span(passage.content, kwargs[REF])
        return _TEMPLATE.raw_text(passage)

    @property
    def _prompt_type(self) -> str:
        return "vist-document"


VIST_DOC_PROMPT = VistDocumentPrompt(input_variables=["page_content", REF, TITLE])
"""One document in a prompt."""


def context(documents: Sequence[Document]) -> str:
    """Documents as they stand in a prompt, one after another."""
    return "".join(format_document(document, VIST_DOC_PROMPT) for document in documents)


def _with_context(asked: dict[str, Any]) -> dict[str, Any]:
    return {**asked, "context": context(asked["documents"])}


VIST_PROMPT: Runnable[dict[str, Any], PromptValue] = RunnableLambda(_with_context).with_config(
    run_name="VistContext"
) | ChatPromptTemplate.from_template("{context}" + _TEMPLATE.question.replace("{question}", "{query}"))
"""``{"query", "documents"}`` -> the prompt that the checkpoints were trained with."""


def with_query(retriever: Runnable[str, list[Document]]) -> Runnable[str, dict[str, Any]]:
    """``query -> {"query", "documents"}``, so that the question is still there after retrieval.

    Args:
        retriever: Anything that makes documents of a query.
    """
    return RunnableParallel(query=RunnablePassthrough(), documents=retriever)


def _strip(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return strip_spans(prompt)
    if isinstance(prompt, StringPromptValue):
        return StringPromptValue(text=strip_spans(prompt.text))
    if isinstance(prompt, ChatPromptValue):
        return ChatPromptValue(messages=_strip(prompt.messages))
    if isinstance(prompt, BaseMessage):
        return prompt.model_copy(update={"content": _strip_content(prompt.content)})
    if isinstance(prompt, Sequence):
        return [_strip(one) for one in prompt]
    return prompt


def _strip_content(content: Any) -> Any:
    if isinstance(content, str):
        return strip_spans(content)
    return [
        {**block, "text": strip_spans(block["text"])}
        if isinstance(block, dict) and isinstance(block.get("text"), str)
        else (strip_spans(block) if isinstance(block, str) else block)
        for block in content
    ]


readable: Runnable[Any, Any] = RunnableLambda(_strip).with_config(run_name="readable")
"""A prompt without markers, for a foreign model in the place of ours: ``chat.with_fallbacks([readable | other])``."""
