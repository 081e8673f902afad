"""VistSynthesizer: all nodes in one prompt, as VistRAG writes it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.indices.prompt_helper import ChatPromptHelper, PromptHelper
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.types import RESPONSE_TEXT_TYPE

from llama_index_vist.llm import VistLLM
from vist_rag import Passage, Span, VistReader, read_spans, strip_spans


class VistSynthesizer(BaseSynthesizer):
    """Asks once, with every node in the prompt and nothing cut: the answer is that of :class:`vist_rag.VistRAG`.

    LlamaIndex's own ``simple_summarize`` is close to this, but puts its list of texts into the prompt as Python writes
    a list, line breaks escaped; a span whose text was changed is read as text.

    With an LLM other than a :class:`VistLLM` the nodes are plain text in the prompt that LlamaIndex always uses.

    Args:
        llm: Who answers; None: ``Settings.llm``.
        text_qa_template: How context and question become a prompt; knows ``{context_str}`` and ``{query_str}``. None:
            the checkpoint's own, LlamaIndex's for any other LLM.
        best_first: Whether nodes come best first. The best is put last, next to the question. False: they are in the
            order of the prompt already, as ``VistPostprocessor(best_last=True)`` gives them.
        streaming: Whether answers come piece by piece.
        callback_manager: None: ``Settings.callback_manager``.
    """

    def __init__(
        self,
        llm: LLM | None = None,
        *,
        text_qa_template: BasePromptTemplate | None = None,
        best_first: bool = True,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        super().__init__(
            llm=llm,
            callback_manager=callback_manager,
            # Nothing is cut here. Were none given, these would be made from the model's metadata, and load it.
            prompt_helper=PromptHelper(),
            chat_prompt_helper=ChatPromptHelper(),
            streaming=streaming,
        )
        self._text_qa_template = text_qa_template
        self._best_first = best_first

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template} if self._text_qa_template else {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._text_qa_template = prompts.get("text_qa_template", self._text_qa_template)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Answer a question from the texts of nodes; errors as :meth:`VistLLM.complete`."""
        template, context = self._asked(query_str, text_chunks)
        ask: Callable[..., RESPONSE_TEXT_TYPE] = self._llm.stream if self._streaming else self._llm.predict
        return self._said(ask(template, context_str=context, **response_kwargs))

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """As :meth:`get_response`; the event loop is free meanwhile."""
        template, context = await asyncio.to_thread(self._asked, query_str, text_chunks)
        ask: Callable[..., Awaitable[RESPONSE_TEXT_TYPE]] = self._llm.astream if self._streaming else self._llm.apredict
        return self._said(await ask(template, context_str=context, **response_kwargs))

    def _said(self, response: RESPONSE_TEXT_TYPE) -> RESPONSE_TEXT_TYPE:
        return response or self._empty_response if isinstance(response, str) else response

    def _asked(self, query_str: str, text_chunks: Sequence[str]) -> tuple[BasePromptTemplate, str]:
        if not isinstance(self._llm, VistLLM):
            template = self._text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL
            context = "\n\n".join(map(strip_spans, text_chunks))
        else:
            reader = self._llm.reader
            template = self._text_qa_template or _question(reader)
            ordered = text_chunks[::-1] if self._best_first else text_chunks
            end = _end_of_raw(reader)
            context = reader.template.instruction + "".join(
                text if _is_memory(reader, text) else text + end for text in ordered
            )
        return template.partial_format(query_str=query_str), context


def _question(reader: VistReader) -> PromptTemplate:
    return PromptTemplate("{context_str}" + reader.template.question.replace("{question}", "{query_str}"))


def _is_memory(reader: VistReader, text: str) -> bool:
    return any(isinstance(part, Span) for part in read_spans(text, reader.compressor.fingerprint))


def _end_of_raw(reader: VistReader) -> str:
    """The white space that ends a passage read as text, which ``get_content`` takes off."""
    raw = reader.write(Passage("text"), "")
    return raw[len(raw.rstrip()) :]
