from __future__ import annotations

import torch

from vist_rag.compression import VisualMemory
from vist_rag.generation import MemorySegment, Prompt, PromptTemplate, TextSegment
from vist_rag.types import Passage


def memory(n: int) -> VisualMemory:
    return VisualMemory(torch.zeros(n, 4), "abc")


def test_the_best_passage_stands_next_to_the_question() -> None:
    best, second = memory(3), memory(2)
    raw = [Passage("Raw one.", title="One"), Passage("Raw two.")]
    prompt = PromptTemplate(instruction="Read.").build("Why?", raw, [best, second])
    assert prompt.segments == (
        TextSegment("Read."),
        TextSegment("Document: "),
        MemorySegment(second),
        TextSegment("Document: "),
        MemorySegment(best),
        TextSegment("Document: Raw two.\n"),
        TextSegment("Document (Title: One): Raw one.\n"),
        TextSegment("Question: Why?\nAnswer:"),
    )
    assert prompt.memory_tokens == 5


def test_braces_in_a_passage_are_its_own() -> None:
    passage = Passage("f(x) = {x} and {title} and {0}", title="Sets {text} {question}")
    assert PromptTemplate().raw_text(passage) == (
        "Document (Title: Sets {text} {question}): f(x) = {x} and {title} and {0}\n"
    )
    question = PromptTemplate().build("What is {question} in {text}?", [], []).segments[-1]
    assert question == TextSegment("Question: What is {question} in {text}?\nAnswer:")


def test_a_prompt_of_text_alone_has_no_memory_tokens() -> None:
    assert Prompt((TextSegment("hello"),)).memory_tokens == 0
