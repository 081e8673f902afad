"""Text -> pages: pixels that a vision tower reads, and where each character is."""

from vist_rag.rendering.glyphs import GlyphAtlas
from vist_rag.rendering.renderer import Pages, Renderer

__all__ = ["GlyphAtlas", "Pages", "Renderer"]
