"""Latents that are at hand."""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor

from vist_rag.errors import ConfigError


class LatentCache:
    """Latents at hand, the least recently read leaving first. Thread-safe.

    Args:
        max_bytes: What they may take together.
    Raises:
        ConfigError: If that is below 0.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ConfigError(f"cache_bytes must be 0 or more, got {max_bytes}.")
        self._max, self._bytes = max_bytes, 0
        self._held: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Tensor | None:
        """The latents under a key; None where there are none (any more)."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: bytes, latents: Tensor) -> None:
        """Keep latents; what does not fit goes."""
        size = latents.numel() * latents.element_size()
        with self._lock:
            if (old := self._held.pop(key, None)) is not None:
                self._bytes -= old.numel() * old.element_size()
            self._held[key] = latents
            self._bytes += size
            while self._bytes > self._max:
                _, gone = self._held.popitem(last=False)
                self._bytes -= gone.numel() * gone.element_size()
