"""Prompt -> answer: a causal LM that reads text and memory."""

from vist_rag.generation import prefix_bert as _prefix_bert  # registers the embedded generator's architecture
from vist_rag.generation.fusion import CrossAttentionFusion, SoftPromptFusion, load_fusion
from vist_rag.generation.generator import Generation, VistGenerator, best_device
from vist_rag.generation.prompt import MemorySegment, Message, Prompt, PromptTemplate, TemplateSegment, TextSegment
from vist_rag.generation.remote import RemoteGenerator
from vist_rag.generation.sampling import Sampling
from vist_rag.generation.spans import Span, make_ref, read_spans, strip_spans, write_span

__all__ = [
    "CrossAttentionFusion",
    "Generation",
    "MemorySegment",
    "Message",
    "Prompt",
    "PromptTemplate",
    "RemoteGenerator",
    "Sampling",
    "SoftPromptFusion",
    "Span",
    "TemplateSegment",
    "TextSegment",
    "VistGenerator",
    "best_device",
    "load_fusion",
    "make_ref",
    "read_spans",
    "strip_spans",
    "write_span",
]
del _prefix_bert
