"""Teach a vision tower to read: characters first, then the words that they spell.

VIST takes CLIP, which has learned to read from pictures with captions. A tower of a few million weights has to be
taught: its first layer names the characters of each patch, its last layer the word pieces that the patch shows. Both
heads are thrown away afterwards and the tower is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from vist_rag.compression.vision import VisionTower
from vist_rag.rendering import Pages, Renderer

CHARACTERS = 4
"""Characters named for each patch, from the first one that it shows."""
WORD_SCALE = 30.0
_NONE, _OTHER = 95, 96  # after the 95 printable ASCII characters


class TowerReading(nn.Module):
    """A tower with the two heads that teach it.

    Args:
        tower: What is taught.
        word_embeddings: Embeddings of the word pieces, float ``[v, e]``; frozen: the head must land near the
            piece's own embedding, among all pieces of the batch.
        character_layer: Hidden state that names the characters.
        fresh: Whether the tower has learned nothing yet: its positions then start as sinusoids.
    """

    word_embeddings: Tensor

    def __init__(
        self, tower: VisionTower, word_embeddings: Tensor, *, character_layer: int = 1, fresh: bool = False
    ) -> None:
        super().__init__()
        self.tower = tower
        self.character_layer = character_layer
        self.characters = nn.Sequential(nn.LayerNorm(tower.width), nn.Linear(tower.width, CHARACTERS * (_OTHER + 1)))
        self.words = nn.Linear(tower.width, 2 * word_embeddings.shape[1])
        # Embeddings of one model share a common direction; without it, and at this scale, the softmax can be sharp.
        centred = word_embeddings - word_embeddings.mean(0)
        self.register_buffer("word_embeddings", F.normalize(centred, dim=-1) * WORD_SCALE, persistent=False)
        position_embeddings = getattr(tower.model.embeddings, "position_embeddings", None)
        if fresh and isinstance(position_embeddings, nn.Parameter):
            # Sinusoids make "the patch before this one" a linear map from the first step on.
            with torch.no_grad():
                position_embeddings[0, 1:] = sinusoids(position_embeddings.shape[1] - 1, tower.width)

    def forward(self, pixel_values: Tensor, patch_mask: Tensor, characters: Tensor, words: Tensor) -> dict[str, Tensor]:
        """Loss and accuracies of one batch.

        Args:
            pixel_values: float ``[p, c, size, size]``.
            patch_mask: bool ``[p, s]``.
            characters: Class of each character, int64 ``[p, s, CHARACTERS]``.
            words: Word piece at the left and the right edge of each patch, int64 ``[p, s, 2]``.
        """
        return self.judge(self.tower(pixel_values, patch_mask), patch_mask, characters, words)

    def judge(self, hidden: list[Tensor], patch_mask: Tensor, characters: Tensor, words: Tensor) -> dict[str, Tensor]:
        """What ``forward`` gives, for hidden states that the tower has computed already."""
        length = hidden[-1].shape[1]
        mask = patch_mask[:, :length]
        logits = self.characters(hidden[self.character_layer][mask]).unflatten(-1, (CHARACTERS, -1))
        character_targets = characters[:, :length][mask]
        character_loss = F.cross_entropy(logits.flatten(0, 1), character_targets.flatten())

        targets = words[:, :length][mask]  # [m, 2]
        pieces, targets = targets.unique(return_inverse=True)
        guesses = F.normalize(self.words(hidden[-1][mask]).unflatten(-1, (2, -1)), dim=-1)
        half = torch.rand(len(guesses), device=guesses.device) < 0.5 if self.training else slice(None)
        word_logits = guesses[half].flatten(0, 1) @ self.word_embeddings[pieces].T
        word_targets = targets[half].flatten()
        word_loss = F.cross_entropy(word_logits, word_targets)
        return {
            "loss": character_loss + word_loss,
            "character_accuracy": (logits.argmax(-1) == character_targets).float().mean().detach(),
            "word_accuracy": (word_logits.argmax(-1) == word_targets).float().mean().detach(),
        }


def sinusoids(length: int, width: int) -> Tensor:
    """Positions as sines and cosines, float ``[length, width]``, of about the size of a patch embedding."""
    angles = torch.arange(length)[:, None] * torch.exp(-torch.arange(0, width, 2) / width * np.log(1000.0))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1) * 0.5


def reading_batch(texts: Sequence[str], renderer: Renderer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Pages of the texts, with what each patch shows."""
    pages = renderer.render(texts)
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return {
        "pixel_values": pages.pixel_values,
        "patch_mask": pages.patch_mask,
        **patch_targets(texts, pages, encodings),
    }


def patch_targets(texts: Sequence[str], pages: Pages, encodings: Sequence[Any]) -> dict[str, Tensor]:
    """What each patch shows: ``characters`` and ``words`` as ``TowerReading.forward`` takes them."""
    characters = np.full((*pages.patch_mask.shape, CHARACTERS), _NONE, np.int64)
    words = np.zeros((*pages.patch_mask.shape, 2), np.int64)
    for page, (text_id, spans) in enumerate(zip(pages.text_ids.tolist(), pages.char_spans.numpy(), strict=True)):
        text = texts[text_id]
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
        if not len(codes):
            continue
        classes = np.where((codes >= 32) & (codes < 127), codes - 32, _OTHER)
        classes = np.append(classes, np.full(CHARACTERS, _NONE))
        where = spans[:, :1] + np.arange(CHARACTERS)
        characters[page] = np.where(where < spans[:, 1:], classes[where.clip(max=len(classes) - 1)], _NONE)
        left, right = _piece_of_character(encodings[text_id], len(codes))
        words[page, :, 0] = left[spans[:, 0].clip(max=len(codes) - 1)]
        words[page, :, 1] = right[(spans[:, 1] - 1).clip(0, len(codes) - 1)]
    return {"characters": torch.from_numpy(characters), "words": torch.from_numpy(words)}


def _piece_of_character(encoding: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The word piece of each character, int64 ``[length]``, twice: between pieces the next one, and the last one."""
    nearest = np.zeros(length, np.int64)
    owner = np.full(length, -1)
    for i, (start, end) in enumerate(encoding.offsets):
        owner[start:end] = i
    ids = np.array(encoding.ids or [0], np.int64)
    last = np.maximum.accumulate(owner)
    following = np.where(owner >= 0, owner, np.minimum(last + 1, len(ids) - 1))
    nearest = ids[following.clip(0)]
    return nearest, ids[last.clip(0)]
