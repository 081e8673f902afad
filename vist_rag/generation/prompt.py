"""What the generator is asked: a list of segments, text or memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vist_rag.compression import VisualMemory
from vist_rag.types import Passage


@dataclass(frozen=True, slots=True)
class TextSegment:
    """Text that the generator reads as tokens. Special tokens in it are plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class MemorySegment:
    """A passage that the generator reads as memory."""

    memory: VisualMemory


@dataclass(frozen=True, slots=True)
class TemplateSegment:
    """Text of the generator's own chat template: special tokens in it count. Nothing that a user wrote belongs here."""

    text: str


Segment = TextSegment | MemorySegment | TemplateSegment


@dataclass(frozen=True, slots=True)
class Message:
    """What one side of a conversation said.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        segments: What was said, in reading order.
    """

    role: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Segments in reading order.

    Attributes:
        segments: Text, memory, and the chat template's own text.
        framed: Whether the chat template is among the segments (``VistGenerator.converse``). Else the generator puts it
            around the whole of them, as one message of the user.
    """

    segments: tuple[Segment, ...]
    framed: bool = False

    @property
    def memory_tokens(self) -> int:
        """Latents in the prompt, boundary embeddings not counted."""
        return sum(len(s.memory) for s in self.segments if isinstance(s, MemorySegment))


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """How passages and a question become a prompt. Fields are format strings.

    Attributes:
        instruction: Opens the prompt.
        raw: A passage read as text; knows ``{title}`` and ``{text}``.
        untitled: The same for a passage without a title.
        memory: Stands before a passage read as memory (its title is in the memory).
        question: Closes the prompt; knows ``{question}``.
    """

    instruction: str = ""
    raw: str = "Document (Title: {title}): {text}\n"
    untitled: str = "Document: {text}\n"
    memory: str = "Document: "
    question: str = "Question: {question}\nAnswer:"

    def raw_text(self, passage: Passage) -> str:
        """A passage as the generator reads it raw."""
        # In one go, and not by str.format: braces in a title or a text are its own.
        form = self.raw if passage.title else self.untitled
        return re.sub(r"\{(title|text)\}", lambda field: str(getattr(passage, field[1])), form)

    def build(self, question: str, raw: Sequence[Passage], memories: Sequence[VisualMemory]) -> Prompt:
        """A prompt: memories first, then raw passages with the best last, next to the question.

        Args:
            question: What is asked.
            raw: Passages read as text, best first.
            memories: Memories, best first.
        """
        segments: list[Segment] = [TextSegment(self.instruction)] if self.instruction else []
        for memory in reversed(memories):
            segments += [TextSegment(self.memory), MemorySegment(memory)]
        segments += [TextSegment(self.raw_text(p)) for p in reversed(raw)]
        return Prompt((*segments, TextSegment(self.question.replace("{question}", question))))
