"""Prompts that carry spans, and what packs them: no span is ever cut."""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.indices.prompt_helper import DEFAULT_PADDING, PromptHelper
from llama_index.core.llms.llm import LLM
from llama_index.core.node_parser.text.token import TokenTextSplitter
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.prompts.prompt_type import PromptType
from llama_index.core.tools.types import BaseTool

from llama_index_vist.llm import VistLLM
from llama_index_vist.spans import SpanCounter
from vist_rag import Prompt, strip_spans

VIST_QA_TEMPLATE = PromptTemplate(
    "{context_str}\nQuestion: {query_str}\nAnswer:", prompt_type=PromptType.QUESTION_ANSWER
)
"""Asks as the embedded model was taught to be asked; for the ``text_qa_template`` of any response mode."""


def vist_prompt_helper(llm: LLM, **settings: Any) -> PromptHelper:
    """What packs texts into prompts for an LLM, for ``prompt_helper=`` of a synthesizer or ``Settings.prompt_helper``.

    LlamaIndex joins the texts of nodes and cuts the whole anew at spaces, as much as fits a prompt; a span that is cut
    is no span. To count a span as its memory is not enough: there are fewer cuts, but they still go through spans. So
    the texts are cut between spans, or in what is read as text. A span that alone is too large is written as text.

    For a short context it also sets aside no more for the answer that is being refined than an answer may take.

    Args:
        llm: Who will be asked. For one that is not a :class:`VistLLM` this is LlamaIndex's own helper.
        **settings: ``chunk_overlap_ratio``, ``chunk_size_limit``, ``separator``.
    """
    if not isinstance(llm, VistLLM):
        return PromptHelper.from_llm_metadata(llm.metadata, **settings)
    frame = llm.reader.generator.prompt_length(Prompt(()))  # around each prompt
    return _SpanPromptHelper(
        SpanCounter(llm.reader),
        context_window=llm.metadata.context_window - frame,
        num_output=llm.metadata.num_output,
        **settings,
    )


class _SpanPromptHelper(PromptHelper):
    _spans: SpanCounter = PrivateAttr()

    def __init__(self, spans: SpanCounter, **settings: Any) -> None:
        PromptHelper.__init__(self, tokenizer=spans, **settings)
        self._spans = spans

    @classmethod
    def class_name(cls) -> str:
        return "VistPromptHelper"

    def get_text_splitter_given_prompt(
        self,
        prompt: BasePromptTemplate,
        num_chunks: int = 1,
        padding: int = DEFAULT_PADDING,
        llm: LLM | None = None,
        tools: list[BaseTool] | None = None,
    ) -> TokenTextSplitter:
        # The modes that refine an answer set 500 positions aside for it. It takes as many as an answer may take.
        padding = min(padding, self.num_output + DEFAULT_PADDING)
        plain = super().get_text_splitter_given_prompt(prompt, num_chunks, padding, llm, tools)
        return _SpanSplitter(
            self._spans,
            separator=plain.separator,
            chunk_size=plain.chunk_size,
            chunk_overlap=plain.chunk_overlap,
        )


class _SpanSplitter(TokenTextSplitter):
    _spans: SpanCounter = PrivateAttr()

    def __init__(self, spans: SpanCounter, **settings: Any) -> None:
        super().__init__(tokenizer=spans, **settings)
        self._spans = spans

    def _split(self, text: str, chunk_size: int) -> list[str]:
        if len(self._spans(text)) <= chunk_size:
            return [text]
        pieces: list[str] = []
        for part in self._spans.parts(text):
            if part.size and len(self._spans(part.text)) <= chunk_size:
                pieces.append(part.text)
            else:
                pieces += super()._split(strip_spans(part.text), chunk_size)
        return pieces
