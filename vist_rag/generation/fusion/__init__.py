"""How memory enters the generator."""

from vist_rag.generation.fusion.soft_prompt import SoftPromptFusion

__all__ = ["SoftPromptFusion"]
