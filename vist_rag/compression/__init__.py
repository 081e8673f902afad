"""Pages -> memory: vision tower, Perceiver Resampler, the latents that are kept."""

from transformers import AutoConfig, AutoModel

from vist_rag.compression.cache import LatentCache
from vist_rag.compression.compressor import PassageCompressor, VistCompressor, VistConfig
from vist_rag.compression.memory import VisualMemory
from vist_rag.compression.text import TextCompressor, TextCompressorConfig

AutoConfig.register(VistConfig.model_type, VistConfig)
AutoModel.register(VistConfig, VistCompressor)
AutoConfig.register(TextCompressorConfig.model_type, TextCompressorConfig)
AutoModel.register(TextCompressorConfig, TextCompressor)

__all__ = [
    "LatentCache",
    "PassageCompressor",
    "TextCompressor",
    "VistCompressor",
    "VistConfig",
    "VisualMemory",
]
