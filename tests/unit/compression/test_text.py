"""Compressors that read tokens: against the tokenizer's own ids, the encoder's own states, and windows by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from tests.support.tiny import BERT_SIZES, WORDS, tiny_generator, tiny_tokenizer
from vist_rag.checkpoint import load_compressor
from vist_rag.compression import TextCompressor, TextCompressorConfig
from vist_rag.compression.text import DIGITS, TextTower, TokenRenderer, read_ids, write_ids
from vist_rag.config import FusionConfig, ResamplerConfig
from vist_rag.errors import CheckpointError, ConfigError, InputError
from vist_rag.generation import MemorySegment, Prompt, SoftPromptFusion, TextSegment
from vist_rag.pipeline import compress
from vist_rag.types import Passage

SHORT = "the old bridge was built in 1867"
LONG = f"{WORDS} " * 4  # several pages
TEXTS = ["", "a", SHORT, LONG, " \n\t ", "  the river runs, 你好 Ünïcödé ½ 😀 ", "the \ud800 sea"]
BEGIN = 2
KINDS: dict[str, dict[str, Any]] = {
    "mean_pool": {"window": 3, "pooled": True, "sizes": {"tower_layers": (0,), "salience": True}},
    "flat": {"window": 1, "pooled": True, "sizes": {"tower_layers": (0, -1)}},
    "perceiver": {"window": 3, "pooled": False, "sizes": {"tower_layers": (0, -1), "salience": True}},
}
LATENTS = 8


def core() -> Tokenizer:
    return tiny_tokenizer().backend_tokenizer


def tokens_of(text: str) -> list[int]:
    """The tokenizer's own ids, without anything put before them."""
    return list(core().encode(text.replace("\ud800", "?"), add_special_tokens=False).ids)


def bert(**sizes: Any) -> BertModel:
    torch.manual_seed(3)
    config = BertConfig(vocab_size=core().get_vocab_size(), **BERT_SIZES | sizes)
    model = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: at 1 and 0 they would hide what is left out
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def make(kind: str, tokenizer: Tokenizer | None = None, **options: Any) -> TextCompressor:
    plan = KINDS[kind]
    encoder: Any = bert()
    if kind == "mean_pool":
        encoder = encoder.get_input_embeddings().weight.detach()
    torch.manual_seed(0)
    sizes = {"latents_per_page": LATENTS, "width": 16, "heads": 2, "layers": 1} | plan["sizes"]
    arguments = {
        "begin_token_id": BEGIN,
        "page_tokens": LATENTS * plan["window"],
        "pooled": plan["pooled"],
        "resampler": ResamplerConfig(**sizes | options.pop("sizes", {})),
    }
    return TextCompressor.build(encoder, tokenizer or core(), **arguments | options).eval()


@pytest.fixture(params=KINDS, scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def compressor(kind: str) -> TextCompressor:
    return make(kind)


# ---------------------------------------------------------------------------------------------------- ids as numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_token_ids_survive_half_precision(dtype: torch.dtype) -> None:
    edges = [-1, 0, 1, 126, 127, 128, 129, 255, 256, 257, 16383, 16384, 65535, 65536, 128255, 262143, 2_000_000]
    sample = torch.randint(0, 2_000_001, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor(edges + sample + list(range(0, 2_000_000, 1009)))
    ids = ids[: len(ids) // 3 * 3].view(-1, 3)
    written = write_ids(ids, dtype)
    assert written.dtype == dtype
    assert written.shape == (len(ids), 3 * DIGITS)
    assert torch.equal(read_ids(written), ids)


def test_an_id_is_written_in_digits_of_base_128_and_none_is_zero() -> None:
    written = write_ids(torch.tensor([[-1, 0, 127, 128 * 128 + 2 * 128 + 3 - 1]]), torch.float32)
    assert written.tolist() == [[0, 0, 0, 1, 0, 0, 0, 1, 0, 3, 2, 1]]
    assert read_ids(torch.zeros(2, 2 * DIGITS)).tolist() == [[-1, -1], [-1, -1]]


# ------------------------------------------------------------------------------------------------------------ renderer


def render(texts: list[str], page_tokens: int = 8) -> Any:
    return TokenRenderer(core(), page_tokens, torch.device("cpu")).render(texts)


@pytest.mark.parametrize("page_tokens", [1, 5, 8, 500])
def test_pages_hold_the_tokens_of_each_text_in_order(page_tokens: int) -> None:
    pages = render(TEXTS, page_tokens)
    assert pages.pixel_values.dtype == torch.long
    assert pages.pixel_values.shape == pages.patch_mask.shape == (len(pages), page_tokens)
    assert pages.char_spans.shape == (len(pages), page_tokens, 2)
    assert pages.text_ids.tolist() == sorted(pages.text_ids.tolist())
    assert pages.coverage.tolist() == [1.0] * len(TEXTS)
    for i, text in enumerate(TEXTS):
        own, ids = pages.text_ids == i, tokens_of(text)
        assert int(own.sum()) == max(1, -(-len(ids) // page_tokens))
        mask = pages.patch_mask[own]
        assert pages.pixel_values[own][mask].tolist() == ids
        used = mask.sum(1)
        assert (used[:-1] == page_tokens).all()  # only the last page may have room
        assert torch.equal(mask, torch.arange(page_tokens) < used[:, None])


@pytest.mark.parametrize("page_tokens", [1, 5, 500])
def test_spans_cover_every_character_once_and_in_order(page_tokens: int) -> None:
    pages = render(TEXTS, page_tokens)
    for i, text in enumerate(TEXTS):
        own = pages.text_ids == i
        spans = pages.char_spans[own][pages.patch_mask[own]].tolist()
        offsets = core().encode(text.replace("\ud800", "?"), add_special_tokens=False).offsets
        assert [character for start, end in spans for character in range(start, end)] == (
            list(range(len(text))) if offsets else []
        )
        for (start, end), (first, behind) in zip(spans, offsets, strict=True):
            assert start <= first < behind <= end
    assert not pages.char_spans[~pages.patch_mask].any()


def test_a_span_reaches_up_to_the_next_token() -> None:
    pages = render(["  the sea, ", "the 😀 sea", "a\ud800b"])
    spans = [page[mask].tolist() for page, mask in zip(pages.char_spans, pages.patch_mask, strict=True)]
    assert spans == [[[0, 6], [6, 9], [9, 11]], [[0, 4], [4, 6], [6, 9]], [[0, 1], [1, 2], [2, 3]]]


def test_a_text_without_tokens_is_one_blank_page() -> None:
    pages = render(["", " \n\t ", "the"])
    assert pages.text_ids.tolist() == [0, 1, 2]
    assert pages.patch_mask.sum(1).tolist() == [0, 0, 1]
    assert not pages.char_spans[:2].any()


def test_what_is_no_text_is_refused(compressor: TextCompressor) -> None:
    with pytest.raises(InputError, match="got one string; wrap it"):
        compressor.encode("not a list")
    with pytest.raises(InputError, match="texts must be strings, got bytes at 1"):
        render(["fine", b"not fine"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="texts must be strings, got NoneType"):
        compressor.encode([None])  # type: ignore[list-item]
    with pytest.raises(InputError, match="got one string; wrap it"):
        render("not a list")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- tower


def page_of_ids(*lengths: int, size: int = 12) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, core().get_vocab_size(), (len(lengths), size), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask


@torch.no_grad()
def test_the_tower_gives_the_encoders_own_states() -> None:
    model, lengths = bert(), (5, 9, 1)
    ids, mask = page_of_ids(*lengths)
    hidden = TextTower(model, (1, 1), BEGIN)(ids, mask)
    assert len(hidden) == 1 + BERT_SIZES["num_hidden_layers"]
    assert all(states.shape == (3, 9, 32) for states in hidden)  # up to the longest page of the batch
    for page, length in enumerate(lengths):
        begun = torch.cat((torch.tensor([BEGIN]), ids[page, :length]))[None]
        own = model(input_ids=begun, output_hidden_states=True)  # alone, and without a mask
        words = model.embeddings.word_embeddings.weight[ids[page, :length]]
        assert torch.equal(hidden[0][page, :length], words)
        for ours, theirs in zip(hidden[1:], own.hidden_states[1:], strict=True):
            torch.testing.assert_close(ours[page, :length], theirs[0, 1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden[-1][page, :length], own.last_hidden_state[0, 1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_stands_behind_a_page_changes_nothing() -> None:
    tower = TextTower(bert(), (1, 1), BEGIN)
    ids, mask = page_of_ids(5, 9)
    for ours, theirs in zip(tower(ids, mask), tower(ids.masked_fill(~mask, 7), mask), strict=True):
        assert torch.equal(ours[mask[:, :9]], theirs[mask[:, :9]])
    changed = ids.clone()
    changed[0, 4] = 7 if int(ids[0, 4]) != 7 else 8
    moved = (tower(ids, mask)[-1] - tower(changed, mask)[-1]).abs().amax(-1)
    assert (moved[0, :5] > 1e-5).all()  # tokens of a page see each other
    assert not moved[1].any()


@torch.no_grad()
def test_the_begin_token_is_read() -> None:
    ids, mask = page_of_ids(5)
    one, other = (TextTower(bert(), (1, 1), begin)(ids, mask)[-1] for begin in (BEGIN, BEGIN + 1))
    assert (one - other)[0, :5].abs().max() > 1e-4


def test_embeddings_alone_are_looked_up() -> None:
    tower = TextTower(None, (core().get_vocab_size(), 6), BEGIN)
    ids, mask = page_of_ids(3, 4)
    (words,) = tower(ids, mask)
    assert tower.width == 6
    assert torch.equal(words, tower.words.weight[ids[:, :4]])  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------- compressor


def shown_by(memory: Any, window: int) -> list[list[int]]:
    return read_ids(memory.latents[:, -window * DIGITS :]).tolist()


def windows_of(text: str, window: int) -> list[list[int]]:
    """Ids in windows, by hand: each page begins a window of its own, and the last of a page is filled up with -1."""
    ids, size, windows = tokens_of(text), LATENTS * window, []
    for begin in range(0, max(1, len(ids)), size):
        page = ids[begin : min(begin + size, len(ids))]
        page = page + [-1] * (max(1, -(-len(page) // window)) * window - len(page))
        windows += [page[i : i + window] for i in range(0, len(page), window)]
    return windows


def test_sizes_are_those_of_the_settings(compressor: TextCompressor, kind: str) -> None:
    width = {"mean_pool": 1 + 16 + 9, "flat": 16 + 3, "perceiver": 1 + 16 + 9}[kind]
    assert compressor.window == KINDS[kind]["window"]
    assert compressor.memory_width == width
    assert {memory.latents.shape[1] for memory in compressor.encode(TEXTS)} == {width}


def test_number_of_latents_is_known_before_encoding(compressor: TextCompressor) -> None:
    texts = [*TEXTS, *(" ".join(["river"] * n) for n in (1, 2, 3, 4, 7, 8, 9, 23, 24, 25, 48, 49))]
    counted = [compressor.count_latents(text) for text in texts]
    assert counted == [len(memory) for memory in compressor.encode(texts)]
    assert counted == [len(windows_of(text, compressor.window)) for text in texts]


def test_a_batch_is_read_as_one_by_one(compressor: TextCompressor) -> None:
    together = compressor.encode(TEXTS, batch_size=3)
    for text, memory in zip(TEXTS, together, strict=True):
        alone = compressor.encode([text])[0]
        assert memory.fingerprint == alone.fingerprint == compressor.fingerprint
        assert torch.isfinite(memory.latents).all()
        torch.testing.assert_close(memory.latents, alone.latents, atol=1e-5, rtol=1e-5)


def test_latents_end_with_the_ids_of_their_tokens(compressor: TextCompressor) -> None:
    window = compressor.window
    for text, memory in zip(TEXTS, compressor.encode(TEXTS), strict=True):
        assert shown_by(memory, window) == windows_of(text, window)
    assert len(windows_of(LONG, window)) > 2 * LATENTS  # else no page ends within a text


def test_ids_are_exact_in_an_index_and_in_bf16(kind: str) -> None:
    compressor = make(kind)
    stored = compress(compressor, [Passage(LONG).content, Passage(SHORT, title="the sea").content])
    assert {row.dtype.name for row in stored.values()} == {"float16"}
    window = compressor.window
    for text in (LONG, f"the sea: {SHORT}"):
        memory = compressor.memory(torch.from_numpy(stored[text]).float())
        assert shown_by(memory, window) == windows_of(text, window)
    half = compressor.to(torch.bfloat16).encode([LONG])[0]
    assert shown_by(half, window) == windows_of(LONG, window)


@torch.no_grad()
def test_a_pooled_latent_is_its_own_window_projected() -> None:
    compressor = make("mean_pool")
    words = bert().embeddings.word_embeddings.weight
    ids = tokens_of(SHORT)
    assert len(ids) % 3 == 1  # the last window holds one token
    means = torch.stack([words[ids[i : i + 3]].mean(0) for i in range(0, len(ids), 3)])
    latents = compressor.encode([SHORT])[0].latents
    torch.testing.assert_close(latents[:, : -3 * DIGITS], compressor.resampler.project(means), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_latent_a_token_is_what_the_encoder_says_of_it() -> None:
    compressor, model = make("flat"), bert()
    ids = tokens_of("the old bridge was")
    read = model(input_ids=torch.tensor([[BEGIN, *ids]])).last_hidden_state[0, 1:]
    features = torch.cat((model.embeddings.word_embeddings.weight[ids], read), dim=-1)
    latents = compressor.encode(["the old bridge was"])[0].latents
    torch.testing.assert_close(latents[:, :-DIGITS], compressor.resampler.project(features), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_resampled_latent_is_what_the_perceiver_makes_of_the_encoders_states() -> None:
    compressor, model = make("perceiver"), bert()
    ids = tokens_of(SHORT)
    read = model(input_ids=torch.tensor([[BEGIN, *ids]])).last_hidden_state[:, 1:]
    features = torch.cat((model.embeddings.word_embeddings.weight[ids][None], read), dim=-1)
    expected, standing = compressor.resampler(features, torch.ones(1, len(ids), dtype=torch.bool))
    assert standing.all()
    latents = compressor.encode([SHORT])[0].latents
    torch.testing.assert_close(latents[:, : -3 * DIGITS], expected[0], atol=1e-5, rtol=1e-5)


def test_pages_of_a_text_are_read_by_themselves(compressor: TextCompressor) -> None:
    words = LONG.split()
    changed = " ".join([*words[:-1], "river"])
    one, other = compressor.encode([LONG, changed])
    assert torch.equal(one.latents[:LATENTS], other.latents[:LATENTS])
    assert not torch.equal(one.latents[-1], other.latents[-1])


def test_only_the_resampler_learns(kind: str) -> None:
    compressor = make(kind).train()
    assert compressor.resampler.training
    assert not any(module.training for module in compressor.tower.modules())
    pages = compressor.renderer.render([SHORT])
    latents, _ = compressor(pages.pixel_values, pages.patch_mask)
    (latents * torch.randn_like(latents)).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in compressor.tower.parameters())
    assert all(p.grad is not None and p.grad.any() for p in compressor.resampler.parameters())


# --------------------------------------------------------------------------------------------------------- fingerprint


def swapped() -> Tokenizer:
    """The same words, two of them with each other's id: as many bytes, another vocabulary."""
    state = json.loads(core().to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["bridge"], vocabulary["question"] = vocabulary["question"], vocabulary["bridge"]
    return Tokenizer.from_str(json.dumps(state))


def test_fingerprint_is_that_of_weights_vocabulary_and_settings(kind: str) -> None:
    same = make(kind)
    assert make(kind).fingerprint == same.fingerprint
    others = {
        "vocabulary": make(kind, swapped()),
        "page": make(kind, page_tokens=same.config.page_tokens * 2),
        "begin": make(kind, begin_token_id=BEGIN + 1),
    }
    for part in ("resampler", "tower"):
        others[part] = make(kind)
        with torch.no_grad():
            next(getattr(others[part], part).parameters()).view(-1)[0] += 0.5
    if kind != "mean_pool":
        others["layers"] = make(kind, sizes={"tower_layers": (-1, 0)})
    if kind == "perceiver":
        others["heads"] = make(kind, sizes={"heads": 4})
    prints = {name: other.fingerprint for name, other in others.items()}
    assert len({same.fingerprint, *prints.values()}) == 1 + len(prints), prints


def test_fingerprint_covers_how_the_encoder_reads_its_weights() -> None:
    compressor = make("flat")
    fields = compressor.config.to_dict()
    fields["encoder"] = {**fields["encoder"], "num_attention_heads": 4}
    other = TextCompressor(TextCompressorConfig(**fields))
    other.load_state_dict(compressor.state_dict())
    assert other.fingerprint != compressor.fingerprint


def test_fingerprint_is_one_in_float32_and_bf16(kind: str) -> None:
    assert make(kind).to(torch.bfloat16).fingerprint == make(kind).fingerprint


def test_other_weights_bring_their_own_fingerprint_and_vocabulary(kind: str) -> None:
    compressor, other = make(kind), make(kind, swapped())
    before, memory = compressor.fingerprint, compressor.encode(["the bridge"])[0]
    compressor.load_state_dict(other.state_dict())
    assert compressor.fingerprint == other.fingerprint != before
    after = compressor.encode(["the bridge"])[0]
    assert torch.equal(after.latents, other.encode(["the bridge"])[0].latents)
    assert not torch.equal(after.latents, memory.latents)


def test_training_renews_the_fingerprint(compressor: TextCompressor, kind: str) -> None:
    learning = make(kind)
    before = learning.fingerprint
    learning.train()
    with torch.no_grad():
        next(learning.resampler.parameters()).add_(0.5)
    assert learning.eval().fingerprint != before == compressor.fingerprint


# -------------------------------------------------------------------------------------------------- saving and loading


def test_a_saved_compressor_is_the_same_compressor(tmp_path: Path, kind: str) -> None:
    compressor = make(kind)
    compressor.save_pretrained(tmp_path / "compressor")
    loaded = load_compressor(tmp_path, device="cpu")
    assert isinstance(loaded, TextCompressor)
    assert loaded.fingerprint == compressor.fingerprint
    assert loaded.memory_width == compressor.memory_width
    assert loaded.resampler_config == compressor.resampler_config
    for ours, theirs in zip(compressor.encode(TEXTS), loaded.encode(TEXTS), strict=True):
        assert torch.equal(ours.latents, theirs.latents)
    loaded.save_pretrained(tmp_path / "again" / "compressor")
    assert load_compressor(tmp_path / "again", device="cpu").fingerprint == compressor.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_latents_must_divide_the_page(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"latents_per_page must divide page_tokens \(25\), got 8"):
        make(kind, page_tokens=25)


def test_a_page_must_fit_the_encoder() -> None:
    sizes = ResamplerConfig(latents_per_page=1, width=16, heads=2, layers=1)
    with pytest.raises(ConfigError, match=r"page_tokens must be 15 or less \(the encoder's context\), got 16"):
        TextCompressor.build(bert(max_position_embeddings=16), core(), page_tokens=16, resampler=sizes)
    longest = TextCompressor.build(bert(max_position_embeddings=16), core(), page_tokens=15, resampler=sizes)
    assert len(longest.encode(["river " * 31])[0]) == 3  # full pages can be read


def test_build_takes_every_weight_of_the_encoder_and_needs_them_all() -> None:
    with_pooler = BertModel(bert().config).eval()
    sizes = ResamplerConfig(latents_per_page=1, width=16, heads=2, layers=1)
    state = TextCompressor.build(with_pooler, core(), resampler=sizes).tower.state_dict()
    theirs = with_pooler.state_dict()
    assert {f"model.{name}" for name in theirs if not name.startswith("pooler.")} == state.keys()
    assert all(torch.equal(tensor, theirs[name.removeprefix("model.")]) for name, tensor in state.items())
    with pytest.raises(CheckpointError, match=r"encoder must bring all its weights, got none for embeddings\."):
        TextCompressor.build(BertForMaskedLM(bert().config), core(), resampler=sizes)


@pytest.mark.parametrize("given", ["nothing", "both", "no vocabulary"])
def test_a_config_names_one_source_of_features_and_a_vocabulary(given: str) -> None:
    fields: dict[str, Any] = {
        "nothing": {"vocabulary": 9},
        "both": {"vocabulary": 9, "encoder": bert().config.to_dict(), "embeddings": {"tokens": 9, "width": 4}},
        "no vocabulary": {"embeddings": {"tokens": 9, "width": 4}},
    }[given]
    with pytest.raises(ConfigError, match=r"an encoder or embeddings, and a vocabulary; .*TextCompressor\.build"):
        TextCompressor(TextCompressorConfig(**fields))


# --------------------------------------------------------------------------------- what a fusion reads of known tokens


def fusion_of(width: int, window: int) -> SoftPromptFusion:
    torch.manual_seed(5)
    config = FusionConfig(width, 32, hidden_width=8, spelling_width=window * DIGITS, tokens=window)
    return SoftPromptFusion(config).eval()


def test_a_latent_shows_exactly_its_tokens(compressor: TextCompressor) -> None:
    generator, window = tiny_generator(), compressor.window
    fusion = fusion_of(compressor.memory_width, window)
    for text, memory in zip(TEXTS, compressor.encode(TEXTS), strict=True):
        shown = fusion.shown(generator, memory.latents, memory.places)
        expected, ids = windows_of(text, window), tokens_of(text)
        most = max(1, max(sum(token >= 0 for token in row) for row in expected))
        assert shown.dtype == torch.long
        assert shown.tolist() == [row[:most] for row in expected]
        for size in {1, -(-len(memory) // 2), len(memory)}:
            coarse = memory.coarsen(size)
            shown = fusion.shown(generator, coarse.latents, coarse.places)
            assert len(shown) == size
            assert shown[shown >= 0].tolist() == ids  # all of them, in their order
            for place, row in enumerate(shown.tolist()):
                own = [token for at, some in zip(coarse.places, expected, strict=True) if at == place for token in some]
                assert [token for token in row if token >= 0] == [token for token in own if token >= 0]


def test_a_latent_shows_however_many_tokens_it_has() -> None:
    ids = torch.arange(2 * 40).view(2, -1) + 200
    latents = torch.cat((torch.randn(2, 4), write_ids(ids, torch.float32)), dim=1)
    fusion = fusion_of(latents.shape[1], 40)
    assert torch.equal(fusion.shown(tiny_generator(), latents, torch.arange(2)), ids)
    assert torch.equal(fusion.shown(tiny_generator(), latents, torch.zeros(2, dtype=torch.long)), ids.view(1, -1))


@torch.no_grad()
def test_a_soft_prompt_is_the_projection_and_the_mean_of_the_words() -> None:
    generator, compressor = tiny_generator(), make("mean_pool")
    fusion, words = fusion_of(compressor.memory_width, 3), generator.model.get_input_embeddings().weight
    memory = compressor.encode([SHORT])[0]
    soft, shown = fusion.read(generator, memory.latents)
    ids, centre = tokens_of(SHORT), words.mean(0)
    named = [torch.stack([words[i] - centre for i in ids[j : j + 3]]).mean(0) for j in range(0, len(ids), 3)]
    expected = fusion.projector(memory.latents[:, : -3 * DIGITS]) + torch.stack(named)
    assert torch.equal(soft[[0, -1]], fusion.boundaries)
    torch.testing.assert_close(soft[1:-1], expected, atol=1e-5, rtol=1e-5)
    assert (shown[[0, -1]] == -1).all()
    # A latent of a blank page shows nothing, and is the projection alone.
    blank = compressor.encode([""])[0].latents
    soft, shown = fusion.read(generator, blank)
    assert (shown == -1).all()
    torch.testing.assert_close(soft[1:-1], fusion.projector(blank[:, : -3 * DIGITS]), atol=1e-5, rtol=1e-5)


def test_ids_are_for_showing_and_the_projector_does_not_read_them() -> None:
    fusion = fusion_of(16 + DIGITS, 1)
    latents = torch.randn(3, 16 + DIGITS)
    changed = torch.cat((latents[:, :16], write_ids(torch.tensor([[5], [6], [7]]), torch.float32)), dim=1)
    assert torch.equal(fusion.meaning(latents), fusion.meaning(changed))
    assert fusion.speller is None


def test_a_generator_reads_and_can_copy_the_tokens_of_a_memory(tmp_path: Path) -> None:
    compressor, generator = make("perceiver"), tiny_generator()
    fusion = fusion_of(compressor.memory_width, 3)
    fusion.bind(compressor.fingerprint)
    fusion.save_pretrained(tmp_path)
    generator.fusion = SoftPromptFusion.from_pretrained(tmp_path).eval()
    assert generator.fusion.config == fusion.config
    assert generator.fusion.config.tokens == 3
    prompt = Prompt((MemorySegment(compressor.encode([SHORT])[0]), TextSegment("question when")))
    with generator.fusion.condition(generator, [prompt]) as inputs:
        shown = inputs["shown"][0]
    assert generator.tokenizer.decode(shown[shown >= 0]) == f"[CLS] {SHORT} question when"
    assert generator.generate([prompt], max_new_tokens=3)[0].prompt_tokens == len(shown)


def test_tokens_and_spelling_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="tokens must be 0, or 1 or more without spelling, got 3"):
        FusionConfig(16, 32, tokens=3, spelling_width=9, spelling=20)
    with pytest.raises(ConfigError, match="spelling_width must be 3 numbers for each of the 3 tokens, got 0"):
        FusionConfig(16, 32, tokens=3)
    with pytest.raises(ConfigError, match="tokens must be 0, or 1 or more without spelling, got -1"):
        FusionConfig(16, 32, tokens=-1)
    assert isinstance(SoftPromptFusion(FusionConfig(16, 32, tokens=1, spelling_width=3)).projector[1], nn.Linear)
