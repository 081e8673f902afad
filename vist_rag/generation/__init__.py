"""Prompt -> answer: a causal LM that reads text and memory."""

from vist_rag.generation import prefix_bert as _prefix_bert  # registers the embedded generator's architecture
from vist_rag.generation.fusion import SoftPromptFusion
from vist_rag.generation.generator import Generation, VistGenerator, best_device
from vist_rag.generation.prompt import MemorySegment, Prompt, PromptTemplate, TextSegment

__all__ = [
    "Generation",
    "MemorySegment",
    "Prompt",
    "PromptTemplate",
    "SoftPromptFusion",
    "TextSegment",
    "VistGenerator",
    "best_device",
]
del _prefix_bert
