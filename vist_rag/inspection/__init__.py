"""What stands behind an answer: its pages, where each latent looked, where the answer did; as a page of HTML, too."""

from vist_rag.inspection.answer import Inspection, PassageView, Word, inspect_answer
from vist_rag.inspection.memory import MemoryView, view_memory
from vist_rag.inspection.page import page_files, whole_page

__all__ = [
    "Inspection",
    "MemoryView",
    "PassageView",
    "Word",
    "inspect_answer",
    "page_files",
    "view_memory",
    "whole_page",
]
