"""Pages -> memory: vision tower, Perceiver Resampler, the latents that are kept."""

from transformers import AutoConfig, AutoModel

from vist_rag.compression.compressor import VistCompressor, VistConfig
from vist_rag.compression.memory import VisualMemory

AutoConfig.register(VistConfig.model_type, VistConfig)
AutoModel.register(VistConfig, VistCompressor)

__all__ = ["VistCompressor", "VistConfig", "VisualMemory"]
