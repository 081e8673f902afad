"""Text -> pages: pixels that a vision tower reads, and where each character is."""

from vist_rag.rendering.glyphs import GlyphAtlas
from vist_rag.rendering.pages import Pages
from vist_rag.rendering.renderer import Renderer
from vist_rag.rendering.shaping import ShapedFont

__all__ = ["GlyphAtlas", "Pages", "Renderer", "ShapedFont"]
