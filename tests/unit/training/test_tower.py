from __future__ import annotations

import pytest
import torch

from tests.support.tiny import ATLAS, TOWER, tiny_tokenizer
from vist_rag.compression.vision import VisionTower, tower_config
from vist_rag.config import RendererConfig
from vist_rag.rendering import GlyphAtlas, Renderer
from vist_rag.training.tower import CHARACTERS, TowerReading, reading_batch, sinusoids

TEXTS = ["The old bridge (1867), by Marie Curie.", "in é 二 lake", "", "river river"]
NONE, OTHER = 95, 96


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(GlyphAtlas.load(ATLAS), RendererConfig(channels=1))


def shown(text: str, patch: int, atlas: GlyphAtlas) -> list[int]:
    """Characters whose boxes touch a patch, by adding up advances."""
    found, x = [], 0
    for i, character in enumerate(text):
        end = x + int(atlas.advances[atlas.lookup(torch.tensor([ord(character)]).numpy())[0]])
        if x < (patch + 1) * 14 and end > patch * 14:
            found.append(i)
        x = end
    return found


def test_targets_are_what_each_patch_shows(renderer: Renderer) -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    batch = reading_batch(TEXTS, renderer, tokenizer)
    assert isinstance(renderer.atlas, GlyphAtlas)
    named = 0
    for page, text in enumerate(TEXTS):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        for patch in range(int(batch["patch_mask"][page].sum())):
            characters = shown(text, patch, renderer.atlas)
            classes = [ord(text[i]) - 32 if " " <= text[i] <= "~" else OTHER for i in characters][:CHARACTERS]
            assert batch["characters"][page, patch].tolist() == classes + [NONE] * (CHARACTERS - len(classes))
            # Left edge: the piece that stands there, or follows; right edge: the piece that stands there, or precedes.
            left = [id_ for id_, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if end > characters[0]]
            right = [id_ for id_, (at, _) in zip(encoding.ids, encoding.offsets, strict=True) if at <= characters[-1]]
            assert batch["words"][page, patch].tolist() == [left[0], right[-1]]
            named += 1
    assert named > 20
    assert batch["patch_mask"].sum() == named
    assert (batch["characters"][~batch["patch_mask"]] == NONE).all()


def test_a_second_page_goes_on_where_the_first_ends(renderer: Renderer) -> None:
    text = "the river runs from a lake to the sea " * 30
    batch = reading_batch([text], renderer, tiny_tokenizer().backend_tokenizer)
    assert len(batch["patch_mask"]) == 2
    first = "".join(chr(32 + int(c)) for c in batch["characters"][1, 0] if c < NONE)
    pages = renderer.render([text])
    begin = int(pages.char_spans[1, 0, 0])
    assert text[begin:].startswith(first)
    assert text[begin - 1] == " "


def test_positions_tell_one_patch_from_the_next() -> None:
    positions = sinusoids(256, 32)
    assert positions.shape == (256, 32)
    assert positions[0, :4].tolist() == [0, 0.5, 0, 0.5]
    distances = torch.cdist(positions, positions) + torch.eye(256) * 9
    assert distances.min() > 0.1
    # The step from one patch to the next is a rotation, the same everywhere.
    step = torch.linalg.lstsq(positions[:-1].double(), positions[1:].double()).solution
    torch.testing.assert_close(positions[:-1].double() @ step, positions[1:].double(), atol=1e-4, rtol=0)


def test_a_tower_learns_to_name_characters_and_words(renderer: Renderer) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = TowerReading(VisionTower.from_config(tower_config(TOWER)), torch.randn(len(tokenizer), 16), fresh=True)
    batch = reading_batch(["the river runs", "a lake by the sea"], renderer, tokenizer.backend_tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = {name: float(value.detach()) for name, value in model.eval()(**batch).items()}
    model.train()
    for _ in range(30):
        model(**batch)["loss"].backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "mask_token" not in name)
        optimizer.step()
        optimizer.zero_grad()
    last = {name: float(value.detach()) for name, value in model.eval()(**batch).items()}
    assert last["loss"] < 0.6 * first["loss"]
    assert last["character_accuracy"] > max(0.6, first["character_accuracy"])
    assert last["word_accuracy"] > first["word_accuracy"]
