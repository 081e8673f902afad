"""Ray workers for tests: light models, slow enough to be killed, and known by their process ids.

As ``python -m tests.support.bulk``, ``vist-rag`` with such workers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import WordEmbedder, word_embedder
from vist_rag import bulk
from vist_rag.bulk import Recipe
from vist_rag.errors import CheckpointError

PART_S = 0.5
"""What a part takes at least."""


class WatchedRecipe(Recipe):
    """Embeds words in the place of meaning; each worker leaves its process id in the folder of the checkpoint."""

    def load(self) -> tuple[Any, Any]:
        """The checkpoint's compressor, and the embedder of the tests."""
        if self.checkpoint is None:
            raise CheckpointError("no checkpoint, no memory")
        from vist_rag.checkpoint import load_compressor

        directory = Path(self.checkpoint)
        models = WordEmbedder(delay_s=PART_S), load_compressor(directory, device="cpu")
        (directory / f"{os.getpid()}.pid").touch()
        return models


def pids(checkpoint: Path) -> list[int]:
    """The workers that have loaded their models."""
    return [int(path.stem) for path in checkpoint.glob("*.pid")]


if __name__ == "__main__":
    from tests.support.bulk import WatchedRecipe as Watched  # by a name that a worker finds
    from vist_rag.cli import app

    with word_embedder(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "Recipe", Watched)
        app(sys.argv[1:], prog_name="vist-rag")
