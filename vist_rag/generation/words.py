"""A model's token embeddings, as large as it reads them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


@torch.no_grad()
def embedding_scale(model: Any) -> Tensor:
    """How many times larger a model reads its token embeddings than it stores them: Gemma's ``sqrt(d_llm)``, mostly 1.

    Measured, because families keep the factor in different places. One that a model applies to ``inputs_embeds``, too,
    does not count: a soft prompt goes through it as words do.

    Returns:
        float32, a scalar on the model's device.
    """
    table = model.get_input_embeddings()
    stored = cast(Tensor, table.weight)[:64]
    read = table(torch.arange(len(stored), device=stored.device)).float().norm()
    own = stored.float().norm()
    return torch.where(own > 0, read / own, 1.0)


def word_embeddings(model: Any) -> Tensor:
    """What a model reads of each of its tokens, float ``[v, d_llm]``: its table, or a larger copy of that."""
    table = cast(Tensor, model.get_input_embeddings().weight)
    scale = embedding_scale(model)
    return table if abs(float(scale) - 1) < 1e-3 else (table.detach() * scale).to(table.dtype)
