from __future__ import annotations

import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.support.causal import byte_level_tokenizer
from tests.support.tiny import tiny_tokenizer
from vist_rag.errors import ConfigError, InputError, ShapeError
from vist_rag.training.counts import TokenCounts, count_tokens
from vist_rag.training.objectives import (
    distillation_loss,
    frequency_mask,
    next_token_loss,
    pooled_words,
    pve_loss,
    reconstruction_loss,
    sample_rate,
    states_loss,
)

LOG_3 = math.log(3)
# Softmax of (log 3, 0) is (3/4, 1/4).
LIKELY, UNLIKELY = math.log(4 / 3), math.log(4)
CORPUS = ["the river", "The lake", "the the sea"]


def close(got: Tensor, wanted: float, tolerance: float = 1e-5) -> None:
    assert got.shape == ()
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(wanted, rel=tolerance, abs=1e-7)


def skewed(labels: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Labels with logits (log 3, 0) everywhere: a 0 costs log(4/3), a 1 costs log 4."""
    told = torch.tensor(labels)
    return torch.tensor([LOG_3, 0.0]).expand(*told.shape, 2).clone().requires_grad_(), told


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unread() -> Iterator[str]:
    raise AssertionError("the corpus was read")
    yield ""


# ------------------------------------------------------------------------------------- next token and reconstruction


@pytest.mark.parametrize("loss", [next_token_loss, reconstruction_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_cost_the_log_of_the_vocabulary(loss: Any, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 3, 7, dtype=dtype)
    close(loss(logits, torch.tensor([[0, 6, -100], [3, -100, -100]])), math.log(7), 1e-6)


def test_every_told_token_counts_the_same() -> None:
    logits, labels = skewed([[0, 0, 1], [-100, -100, 0]])
    close(next_token_loss(logits, labels), (3 * LIKELY + UNLIKELY) / 4)


def test_every_text_counts_the_same() -> None:
    logits, labels = skewed([[1, -100, -100], [0, 0, 0]])
    close(reconstruction_loss(logits, labels), (UNLIKELY + LIKELY) / 2)
    close(next_token_loss(logits, labels), (UNLIKELY + 3 * LIKELY) / 4)


def test_a_text_of_which_nothing_is_told_is_left_out() -> None:
    logits, labels = skewed([[1, 0], [-100, -100], [0, -100]])
    close(reconstruction_loss(logits, labels), ((UNLIKELY + LIKELY) / 2 + LIKELY) / 2)


@pytest.mark.parametrize("loss", [next_token_loss, reconstruction_loss])
def test_logits_stand_where_their_labels_stand(loss: Any) -> None:
    labels = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2]])
    assert loss(50.0 * torch.nn.functional.one_hot(labels, 4), labels) < 1e-6


@pytest.mark.parametrize("loss", [next_token_loss, reconstruction_loss])
def test_only_told_tokens_have_gradients(loss: Any) -> None:
    logits, labels = skewed([[-100, 0], [1, -100]])
    loss(logits, labels).backward()
    # (softmax - one-hot) / 2 tokens, or / 2 texts of 1 token.
    nothing = [0.0, 0.0]
    wanted = torch.tensor([[nothing, [-0.125, 0.125]], [[0.375, -0.375], nothing]])
    torch.testing.assert_close(logits.grad, wanted)


@pytest.mark.parametrize("loss", [next_token_loss, reconstruction_loss])
def test_nothing_told_costs_nothing_and_still_has_gradients(loss: Any) -> None:
    logits, labels = skewed([[-100, -100], [-100, -100]])
    told = loss(logits, labels)
    close(told, 0.0)
    told.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("loss", [next_token_loss, reconstruction_loss])
def test_labels_of_other_logits_are_refused(loss: Any) -> None:
    with pytest.raises(ShapeError, match=re.escape("labels must be [2, 3], got [2, 4]; ")):
        loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ShapeError, match=re.escape("logits must be [b, t, v], got [3, 5]; ")):
        loss(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))


# --------------------------------------------------------------------------------------------------------------- PVE


def test_pve_of_orthogonal_texts() -> None:
    pages = torch.eye(2, 3)
    # Own words: logits (1/T, 0), the first right. Each other's: the second.
    close(pve_loss(pages, pages, temperature=0.5), math.log1p(math.exp(-2)))
    close(pve_loss(pages, pages.flip(0), temperature=0.5), math.log1p(math.exp(2)))
    close(pve_loss(pages, pages.flip(0)), math.log1p(math.exp(1 / 0.07)))
    close(pve_loss(torch.eye(4), torch.eye(4), temperature=1.0), math.log1p(3 * math.exp(-1)))


def test_pve_goes_from_pages_to_words_only() -> None:
    pages, words = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # Neither page can tell the words apart; the first page is right for both words.
    close(pve_loss(pages, words, temperature=1.0), math.log(2))
    close(pve_loss(words, pages, temperature=1.0), (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2)


def test_pve_depends_on_directions_and_not_on_the_order_of_texts() -> None:
    pages, noise = torch.randn(2, 5, 8, generator=seeded())
    words = pages + noise
    wanted = pve_loss(pages, words).item()
    close(pve_loss(pages * torch.rand(5, 1, generator=seeded()), 7 * words), wanted)
    order = torch.tensor([3, 0, 4, 1, 2])
    close(pve_loss(pages[order], words[order]), wanted)
    assert pve_loss(pages[order], words) > wanted + 1
    close(pve_loss(pages[:1].expand(5, -1), words[:1].expand(5, -1)), math.log(5))


def test_pve_is_exact_in_half_precision_training() -> None:
    pages, words = torch.randn(2, 16, 64, generator=seeded())
    wanted = pve_loss(pages, words)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pve_loss(pages, words), wanted)


def test_pve_turns_pages_to_their_words() -> None:
    pages, words = torch.randn(2, 4, 8, generator=seeded())
    pages.requires_grad_()
    before = torch.cosine_similarity(pages, words).mean()
    pve_loss(pages, words).backward()
    assert pages.grad is not None
    assert torch.cosine_similarity(pages - 0.5 * pages.grad, words).mean() > before + 0.05


def test_pve_refuses_what_it_cannot_tell_apart() -> None:
    with pytest.raises(ShapeError, match=re.escape("words must be [3, 4], got [3, 5]; ")):
        pve_loss(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(ShapeError, match=re.escape("2 texts or more, got [1, 4]; ")):
        pve_loss(torch.ones(1, 4), torch.ones(1, 4))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="temperature must be above 0, got "):
            pve_loss(torch.ones(2, 4), torch.ones(2, 4), temperature=temperature)


def test_pooled_words_are_the_mean_of_what_is_kept() -> None:
    embeddings = torch.tensor([[0.0, 1.0], [10.0, 20.0], [4.0, -3.0]], dtype=torch.bfloat16)
    ids = torch.tensor([2, 1, 0, 2])
    pooled = pooled_words(embeddings, ids, torch.tensor([True, False, True, True]))
    torch.testing.assert_close(pooled, torch.tensor([8 / 3, -5 / 3]))  # float32, not rounded to bfloat16
    with pytest.raises(InputError, match="kept must be True for one token or more"):
        pooled_words(embeddings, ids, torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ShapeError, match=re.escape("kept must be [4], got [3]; ")):
        pooled_words(embeddings, ids, torch.ones(3, dtype=torch.bool))


# -------------------------------------------------------------------------------------------------------------- mask


@pytest.mark.parametrize("mode", ["random", "frequency"])
@pytest.mark.parametrize(
    ("tokens", "rate", "masked"),
    [(8, 0.5, 4), (7, 0.3, 2), (10, 0.26, 3), (9, 0.0, 0), (4, 1.0, 3), (1, 0.9, 0), (3, 0.1, 0)],
)
def test_as_many_tokens_are_masked_as_asked_but_never_all(mode: Any, tokens: int, rate: float, masked: int) -> None:
    ids = torch.arange(tokens) % 3
    for seed in range(5):
        kept = frequency_mask(ids, torch.tensor([0.0, 2.0, 9.0]), rate=rate, mode=mode, generator=seeded(seed))
        assert kept.shape == ids.shape
        assert kept.dtype == torch.bool
        assert int((~kept).sum()) == masked


def test_no_mask_keeps_all() -> None:
    assert frequency_mask(torch.arange(6), torch.zeros(6), rate=0.9, generator=seeded()).all()


def test_a_random_mask_takes_any_token_whatever_its_importance() -> None:
    ids, generator = torch.tensor([0, 0, 1, 1, 2, 2]), seeded()
    importance = torch.tensor([-5.0, 0.0, 5.0])
    kept = torch.stack(
        [frequency_mask(ids, importance, mode="random", generator=generator) for _ in range(2000)]
    ).float()
    # 4.5 standard deviations of a share of 2000.
    assert ((kept.mean(0) - 0.5).abs() < 0.05).all()
    # Two of the same token are not masked together: of 6 places, 3 kept, C(4, 1) / C(6, 3) hold both.
    assert (kept[:, 0] * kept[:, 1]).mean() == pytest.approx(0.2, abs=0.04)


def test_a_token_is_masked_in_proportion_to_how_often_it_occurs() -> None:
    counts = TokenCounts(torch.tensor([5, 2, 0]), samples=4)  # 1 + count: 6, 3, 1
    generator, draws = seeded(), 4000

    def kept(ids: list[int], rate: float) -> Tensor:
        some = [
            frequency_mask(torch.tensor(ids), counts.importance, rate=rate, mode="frequency", generator=generator)
            for _ in range(draws)
        ]
        return torch.stack(some).float().mean(0)

    # Masked first, of two: 6/7 and 1/7. Of three, two are masked: the third is kept where the first two come first,
    # 6/10 * 3/4 + 3/10 * 6/7 = 0.7071; the second where the others do, 6/10 * 1/4 + 1/10 * 6/9 = 0.2167.
    torch.testing.assert_close(kept([0, 2], 0.5), torch.tensor([1 / 7, 6 / 7]), atol=0.03, rtol=0)
    torch.testing.assert_close(kept([0, 1, 2], 0.67), torch.tensor([0.0762, 0.2167, 0.7071]), atol=0.03, rtol=0)


def test_common_tokens_of_a_corpus_are_masked_more_often() -> None:
    tokenizer = tiny_tokenizer()
    counts = count_tokens(["the river and the sea"] * 30 + ["the old bridge", "marie curie"], tokenizer)
    ids = tokenizer("marie and the old sea", return_tensors="pt", add_special_tokens=False).input_ids[0]
    generator, masked = seeded(), torch.zeros(len(ids))
    for _ in range(500):
        masked += ~frequency_mask(ids, counts.importance, mode="frequency", generator=generator)
    marie, conjunction, article, old, sea = masked.tolist()
    assert min(article, conjunction, sea) > 2 * max(marie, old) > 0
    assert article > conjunction


def test_one_seed_is_one_mask_and_the_number_of_samples_does_not_matter() -> None:
    ids, counts = torch.randint(50, (200,), generator=seeded()), torch.randint(1000, (50,), generator=seeded(1))

    def mask(samples: int, seed: int) -> Tensor:
        importance = TokenCounts(counts, samples).importance
        return frequency_mask(ids, importance, mode="frequency", generator=seeded(seed))

    assert torch.equal(mask(100, 7), mask(100, 7))
    assert torch.equal(mask(100, 7), mask(100_000, 7))
    assert not torch.equal(mask(100, 7), mask(100, 8))


@pytest.mark.parametrize(
    ("ids", "settings", "error", "message"),
    [
        ([0, 1], {"mode": "rare"}, ConfigError, "mode must be one of none, random, frequency, got 'rare'"),
        ([0, 1], {"rate": -0.1}, ConfigError, "rate must be in 0..1, got -0.1"),
        ([0, 1], {"rate": 1.1}, ConfigError, "rate must be in 0..1, got 1.1"),
        ([0, 1], {"rate": math.nan}, ConfigError, "rate must be in 0..1, got nan"),
        ([[0, 1]], {"mode": "random"}, ShapeError, "ids must be [t], got [1, 2]"),
        ([], {"mode": "random"}, InputError, "ids must hold one token or more"),
        ([0, 4], {"mode": "frequency"}, InputError, "ids must be in 0..3 (entries of importance), got 0..4"),
        ([0, -100], {"mode": "frequency"}, InputError, "ids must be in 0..3 (entries of importance), got -100..0"),
    ],
)
def test_masks_that_make_no_sense_are_refused(
    ids: list[Any], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        frequency_mask(torch.tensor(ids, dtype=torch.long), torch.zeros(4), generator=seeded(), **settings)


# ------------------------------------------------------------------------------------------------------------ counts


def counted(found: TokenCounts, tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Tokens that occur, with their numbers."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(found.counts))))
    return {token: n for token, n in zip(tokens, found.counts.tolist(), strict=True) if n}


def test_importance_of_a_counted_corpus() -> None:
    tokenizer = tiny_tokenizer()
    found = count_tokens(iter(CORPUS), tokenizer)
    assert counted(found, tokenizer) == {"the": 4, "river": 1, "lake": 1, "sea": 1}  # no [CLS]
    assert (found.samples, found.counts.dtype, len(found.counts)) == (3, torch.long, len(tokenizer))
    wanted = {"the": math.log(3 / 5), "river": math.log(3 / 2), "bridge": math.log(3), "[CLS]": math.log(3)}
    for token, importance in wanted.items():
        close(found.importance[tokenizer.convert_tokens_to_ids(token)], importance)


def test_all_of_a_long_corpus_is_counted() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4
    tokenizer(["the", "the sea"], padding=True, truncation=True, max_length=3)  # what it was last used for
    found = count_tokens(["the lake to the sea"] * 1500 + [""] * 1000 + ["sea " * 40], tokenizer)
    assert counted(found, tokenizer) == {"the": 3000, "lake": 1500, "to": 1500, "sea": 1540}
    assert found.samples == 2501


def test_tokens_that_were_added_are_counted() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<page>"])
    found = count_tokens(["the <page> the", "<page>"], tokenizer)
    assert len(found.counts) == len(tokenizer)
    assert counted(found, tokenizer) == {"the": 2, "<page>": 2}


def test_a_corpus_is_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "counts.safetensors"
    first = count_tokens(iter(CORPUS), tiny_tokenizer(), path=path, key="toy")
    used = tiny_tokenizer()
    used(["the", "the sea"], padding=True, truncation=True, max_length=2)  # decides nothing
    again = count_tokens(unread(), used, path=path, key="toy")
    assert torch.equal(again.counts, first.counts)
    assert again.samples == 3
    assert torch.equal(again.importance, first.importance)
    assert [file.name for file in path.parent.iterdir()] == ["counts.safetensors"]


def test_counts_of_another_corpus_are_not_used(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "counts.safetensors", tiny_tokenizer()
    count_tokens(CORPUS, tokenizer, path=path, key="toy")
    with pytest.raises(AssertionError, match="the corpus was read"):
        count_tokens(unread(), tokenizer, path=path, key="toy 2")
    before = path.read_bytes()
    with path.open("rb") as file:  # another process, about to read
        other = count_tokens(["sea"], tokenizer, path=path, key="toy 2")
        assert file.read() == before
    assert counted(other, tokenizer) == {"sea": 1}
    assert torch.equal(count_tokens(unread(), tokenizer, path=path, key="toy 2").counts, other.counts)


def test_counts_of_another_tokenizer_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "counts.safetensors"
    count_tokens(CORPUS, tiny_tokenizer(), path=path)
    larger = tiny_tokenizer()
    larger.add_tokens(["<page>"])
    cased = tiny_tokenizer()
    cased.backend_tokenizer.normalizer.lowercase = False  # the same vocabulary
    for tokenizer in (byte_level_tokenizer(), larger, cased):
        found = count_tokens(CORPUS, tokenizer, path=path)
        fresh = count_tokens(CORPUS, tokenizer)
        assert torch.equal(found.counts, fresh.counts)
    assert counted(found, cased)["[UNK]"] == 1  # "The"


@pytest.mark.parametrize("left", ["nothing", "header", "half", "zeros"])
def test_a_torn_file_is_counted_anew(tmp_path: Path, left: str) -> None:
    path, tokenizer = tmp_path / "counts.safetensors", tiny_tokenizer()
    first = count_tokens(CORPUS, tokenizer, path=path)
    whole = path.read_bytes()
    halves = {"nothing": b"", "header": whole[:50], "half": whole[:-9], "zeros": whole[:-400] + bytes(400)}
    path.write_bytes(halves[left])
    with pytest.warns(UserWarning, match=r"counts\.safetensors cannot be read .*; counting anew") as caught:
        again = count_tokens(iter(CORPUS), tokenizer, path=path)
    assert caught[0].filename == __file__
    assert torch.equal(again.counts, first.counts)
    assert torch.equal(count_tokens(unread(), tokenizer, path=path).counts, first.counts)


def test_a_file_that_cannot_be_written_whole_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokenizer = tmp_path / "counts.safetensors", tiny_tokenizer()
    first = count_tokens(CORPUS, tokenizer, path=path)

    def full(_: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            count_tokens(["sea"], tokenizer, path=path, key="other")
    assert [file.name for file in tmp_path.iterdir()] == ["counts.safetensors"]
    assert torch.equal(count_tokens(unread(), tokenizer, path=path).counts, first.counts)


def test_nothing_to_count_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "counts.safetensors"
    with pytest.raises(InputError, match="texts must hold at least one text"):
        count_tokens([], tiny_tokenizer(), path=path)
    with pytest.raises(InputError, match="got the string 'the river'"):
        count_tokens("the river", tiny_tokenizer(), path=path)
    assert not path.exists()


# ------------------------------------------------------------------------------------------------------ distillation


def test_divergence_from_a_known_teacher() -> None:
    student = torch.zeros(1, 2, 2, requires_grad=True)
    taught = torch.tensor([[[LOG_3, 0.0], [0.0, 9.0]]], requires_grad=True)
    told = torch.tensor([[True, False]])
    loss = distillation_loss(student, taught, told)
    # Teacher (3/4, 1/4), student (1/2, 1/2).
    close(loss, 0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[[-0.25, 0.25], [0.0, 0.0]]]))
    assert taught.grad is None


def test_divergence_is_a_mean_over_told_tokens() -> None:
    student, taught = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    taught[0, 0, 0] = taught[1, 1, 1] = LOG_3
    one = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(distillation_loss(student, taught, torch.ones(2, 2, dtype=torch.bool)), one / 2)
    close(distillation_loss(student, taught, torch.tensor([[True, False], [True, True]])), 2 * one / 3)


def test_divergence_ignores_what_does_not_change_a_distribution() -> None:
    student, taught = torch.randn(2, 2, 3, 5, generator=seeded())
    told = torch.tensor([[True, True, False], [False, True, True]])
    wanted = distillation_loss(student, taught, told).item()
    assert wanted > 0.1
    close(distillation_loss(student + 3, taught - 2, told), wanted)
    close(distillation_loss(taught + 1, taught, told), 0.0)
    assert distillation_loss(taught, student, told).item() != pytest.approx(wanted, rel=1e-3)


def test_a_temperature_divides_logits_and_its_square_multiplies_the_divergence() -> None:
    student, taught = torch.randn(2, 1, 3, 5, generator=seeded())
    told = torch.ones(1, 3, dtype=torch.bool)
    wanted = distillation_loss(student, taught, told).item()
    close(distillation_loss(2 * student, 2 * taught, told, temperature=2.0), 4 * wanted)


def test_no_token_to_distil_costs_nothing_and_still_has_gradients() -> None:
    student = torch.randn(1, 2, 3, generator=seeded()).requires_grad_()
    loss = distillation_loss(student, torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool))
    close(loss, 0.0)
    loss.backward()
    assert student.grad is not None
    assert not student.grad.any()


def test_teachers_of_other_tokens_are_refused() -> None:
    logits, told = torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ShapeError, match=re.escape("taught must be [1, 2, 3], got [1, 2, 4]; ")):
        distillation_loss(logits, torch.zeros(1, 2, 4), told)
    with pytest.raises(ShapeError, match=re.escape("told must be [1, 2], got [1, 3]; ")):
        distillation_loss(logits, logits, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"temperature must be above 0, got 0\.0"):
        distillation_loss(logits, logits, told, temperature=0.0)


def test_distance_of_states_is_a_share_of_the_variance_of_their_goals() -> None:
    # 1, 3, 5, 7: variance (9 + 1 + 1 + 9) / 3.
    goal = torch.tensor([[[1.0, 3.0], [5.0, 7.0], [99.0, -99.0]]], requires_grad=True)
    told = torch.tensor([[True, True, False]])
    states = [(goal + 1).detach().requires_grad_(), (goal - 2).detach().requires_grad_()]
    with torch.no_grad():
        states[0][0, 2] = 1e6
    loss = states_loss(states, [(goal, told)] * 2)
    close(loss, (1 + 4) / 2 / (20 / 3))
    loss.backward()
    # 2 layers, 4 numbers each, of variance 20/3: 2 * distance / (2 * 4 * 20/3).
    torch.testing.assert_close(states[0].grad, torch.tensor([[[0.0375, 0.0375], [0.0375, 0.0375], [0.0, 0.0]]]))
    torch.testing.assert_close(states[1].grad, torch.tensor([[[-0.075, -0.075], [-0.075, -0.075], [0.0, 0.0]]]))
    assert goal.grad is None


def test_layers_with_large_states_do_not_drown_the_others() -> None:
    own, goal = torch.randn(2, 1, 6, 4, generator=seeded())
    told = torch.ones(1, 6, dtype=torch.bool)
    wanted = states_loss([own], [(goal, told)]).item()
    close(states_loss([own, 1000 * own], [(goal, told), (1000 * goal, told)]), wanted)


@pytest.mark.filterwarnings("error")
def test_layers_without_goals_cost_nothing() -> None:
    own = torch.ones(1, 2, 3, requires_grad=True)
    none = torch.zeros(1, 2, dtype=torch.bool)
    loss = states_loss([own, own], [(torch.randn(1, 2, 3, generator=seeded()), none)] * 2)
    close(loss, 0.0)
    loss.backward()
    assert own.grad is not None
    assert not own.grad.any()


def test_goals_of_other_states_are_refused() -> None:
    own, told = torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ShapeError, match="goals must be one for each of 1 or more layers, got 2 for 1 layers"):
        states_loss([own], [(own, told)] * 2)
    with pytest.raises(ShapeError, match="got 0 for 0 layers"):
        states_loss([], [])
    with pytest.raises(ShapeError, match=re.escape("goal must be [1, 2, 3], got [1, 3, 3]; ")):
        states_loss([own], [(torch.ones(1, 3, 3), told)])
    with pytest.raises(ShapeError, match=re.escape("told must be [1, 2], got [2, 2]; ")):
        states_loss([own], [(own, torch.ones(2, 2, dtype=torch.bool))])


# ------------------------------------------------------------------------------------------------------------- rates


def test_rates_of_a_table_are_drawn_by_weight() -> None:
    rng = random.Random(0)
    drawn = Counter(sample_rate({0.25: 3.0, 0.5: 0.0, 1.0: 1.0}, rng) for _ in range(4000))
    assert set(drawn) == {0.25, 1.0}
    assert drawn[0.25] / 4000 == pytest.approx(0.75, abs=0.03)


def test_rates_between_bounds_are_uniform() -> None:
    rng = random.Random(0)
    drawn = sorted(sample_rate((0.2, 0.6), rng) for _ in range(4000))
    assert 0.2 <= drawn[0] < 0.202
    assert 0.598 < drawn[-1] <= 0.6
    for quarter in (1, 2, 3):
        assert drawn[quarter * 1000] == pytest.approx(0.2 + 0.1 * quarter, abs=0.02)
    assert sample_rate((0.5, 0.5), rng) == 0.5


def test_the_same_seed_draws_the_same_rates() -> None:
    for rates in ({0.25: 1.0, 0.5: 1.0, 1.0: 1.0}, (0.1, 1.0)):
        drawn = [[sample_rate(rates, rng) for _ in range(8)] for rng in (random.Random(3), random.Random(3))]
        assert drawn[0] == drawn[1]
        assert len(set(drawn[0])) > 1


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((0.0, 0.5), "rates must be in (0, 1], got 0.0"),
        ((0.5, 1.5), "rates must be in (0, 1], got 1.5"),
        ((0.5, math.nan), "rates must be in (0, 1], got nan"),
        ((0.6, 0.5), "rates must be the lowest and the highest, got 0.6 and 0.5"),
        ((0.5, 0.6, 0.7), "got 3 numbers"),
        ({0.0: 1.0, 0.5: 1.0}, "rates must be in (0, 1], got 0.0"),
        ({2.0: 1.0}, "rates must be in (0, 1], got 2.0"),
        ({0.5: -1.0, 1.0: 2.0}, "weights of rates must be 0 or more, and one above 0, got [-1.0, 2.0]"),
        ({0.5: 0.0}, "weights of rates must be 0 or more, and one above 0, got [0.0]"),
        ({0.5: math.nan}, "weights of rates must be"),
        ({0.5: math.inf}, "weights of rates must be"),
        ({}, "weights of rates must be"),
    ],
)
def test_rates_that_make_no_sense_are_refused(rates: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        sample_rate(rates, random.Random(0))
