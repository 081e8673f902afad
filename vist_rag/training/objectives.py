"""Training objectives as functions of tensors: next token, reconstruction, PVE and its mask, distillation."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from vist_rag.errors import ConfigError, InputError, ShapeError
from vist_rag.training.counts import TokenCounts

IGNORED = -100
"""Label of a place where no token is to be told."""

MaskMode = Literal["none", "random", "frequency"]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens that are to be told, in nats and float32; every token counts the same.

    Args:
        logits: Float ``[b, t, v]``; those at a place are of the label at that place, so nothing is shifted here.
        labels: int64 ``[b, t]``; -100 where nothing is to be told.
    Returns:
        A scalar; 0, with gradients of 0, where nothing is to be told.
    Raises:
        ShapeError: If the labels do not belong to the logits.
    """
    losses, told = _token_losses(logits, labels)
    return losses.sum() / told.sum().clamp(min=1)


def reconstruction_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over texts of the mean cross-entropy of a text's tokens, in nats and float32; every text counts the same.

    Otherwise the long texts would decide what a compressor keeps. A text of which nothing is to be told is left out.

    Args:
        logits: Float ``[b, t, v]``, a row for each text, aligned with the labels.
        labels: int64 ``[b, t]``; -100 where nothing is to be told.
    Returns:
        A scalar; 0, with gradients of 0, where nothing is to be told.
    Raises:
        ShapeError: If the labels do not belong to the logits.
    """
    losses, told = _token_losses(logits, labels)
    tokens = told.sum(1)
    texts = (tokens > 0).sum()
    return (losses / tokens[told.nonzero()[:, 0]] / texts).sum()


def _token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each token that is to be told, row after row, float32 ``[m]``, and which these are, bool ``[b, t]``."""
    if logits.dim() != 3:
        raise ShapeError(f"logits must be [b, t, v], got {list(logits.shape)}; give one row for each text.")
    _require_shape("labels", labels, logits.shape[:2], "give one label for each place of the logits")
    told = labels != IGNORED
    return F.cross_entropy(logits[told].float(), labels[told], reduction="none"), told


def pve_loss(pages: Tensor, words: Tensor, *, temperature: float = 0.07) -> Tensor:
    """InfoNCE from pages to words, in nats and float32: each text's pages must find its words among those of the batch.

    One way only: words need not find their pages. Similarity is the cosine. The words are no goal where they learn too,
    so give embeddings that do not.

    Args:
        pages: Of each text, the mean of its pages' summary latents, float ``[b, d]``.
        words: Of each text, the mean of its tokens' embeddings (``pooled_words``), float ``[b, d]``.
        temperature: What similarities are divided by, above 0.
    Returns:
        A scalar; ``log b`` where all texts look the same.
    Raises:
        ShapeError: If the shapes differ, or there are fewer than two texts.
        ConfigError: If the temperature is not above 0.
    Source: VIST, arXiv:2502.00791, section 3.4.
    """
    if pages.dim() != 2 or len(pages) < 2:
        raise ShapeError(f"pages must be [b, d] of 2 texts or more, got {list(pages.shape)}; raise the batch size.")
    _require_shape("words", words, pages.shape, "give words of the same texts, projected to the same width")
    _require_above_zero("temperature", temperature)
    with torch.autocast(pages.device.type, enabled=False):  # it would multiply in half precision
        cosines = F.normalize(pages.float(), dim=-1) @ F.normalize(words.float(), dim=-1).T  # [b, b]
        return F.cross_entropy(cosines / temperature, torch.arange(len(pages), device=pages.device))


def frequency_mask(
    ids: Tensor,
    importance: Tensor,
    *,
    rate: float = 0.5,
    mode: MaskMode = "none",
    generator: torch.Generator,
) -> Tensor:
    """Which tokens of a text are kept, so that what is left of it is mostly what it is about.

    ``random`` and ``frequency`` mask ``round(rate * t)`` tokens, but never all. ``frequency`` draws them one after the
    other without replacement, each time token i of those that are left with a chance proportional to ``exp(-s_i)``. As
    ``exp(-s) = (1 + count) / |S|``, that is a draw in proportion to how often the token occurs: the paper's importance
    decides, ``|S|`` cancels, and there is nothing to tune. The m highest of ``-s_i`` plus Gumbel noise are such a draw,
    made at once. To mask each token with a chance of its own would leave the number to chance; to mask the m least
    important would mask the same tokens of a text each time.

    Args:
        ids: Tokens of one text, int64 ``[t]``.
        importance: Of each entry of the vocabulary, float ``[v]`` (``TokenCounts.importance``); only for ``frequency``.
        rate: Share of the tokens that is masked, in 0..1.
        mode: ``none`` keeps all, ``random`` masks any, ``frequency`` the less important ones more likely.
        generator: Decides everything that is random: the same seed masks the same tokens.
    Returns:
        bool ``[t]``, True where a token is kept; at least one is.
    Raises:
        ShapeError: If ids are not ``[t]``.
        InputError: If there are no ids, or one that importance has no entry for.
        ConfigError: If rate or mode is none of those above.
    Source: VIST, arXiv:2502.00791, section 3.4, which says "more likely" but not how; Gumbel-top-k: Kool et al.,
        arXiv:1903.06059, section 2.3.
    """
    if mode not in get_args(MaskMode):
        raise ConfigError(f"mode must be one of {', '.join(get_args(MaskMode))}, got {mode!r}; correct it.")
    if not 0 <= rate <= 1:
        raise ConfigError(f"rate must be in 0..1, got {rate}; give the share of tokens to mask.")
    if ids.dim() != 1:
        raise ShapeError(f"ids must be [t], got {list(ids.shape)}; mask one text at a time.")
    if not len(ids):
        raise InputError("ids must hold one token or more, got none; leave out texts that are empty.")
    kept = torch.ones_like(ids, dtype=torch.bool)
    if mode == "none":
        return kept
    # -log of an exponential variable is a Gumbel variable.
    scores = -torch.empty(len(ids), device=generator.device).exponential_(generator=generator).log().to(ids.device)
    if mode == "frequency":
        if int(ids.min()) < 0 or int(ids.max()) >= len(importance):
            raise InputError(
                f"ids must be in 0..{len(importance) - 1} (entries of importance), got {int(ids.min())}.."
                f"{int(ids.max())}; count with the tokenizer that made them, and leave out padding."
            )
        scores = scores - importance[ids].to(scores)
    kept[scores.topk(min(round(rate * len(ids)), len(ids) - 1)).indices] = False
    return kept


def pooled_words(embeddings: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
    """Mean of the embeddings of a text's kept tokens, float32 ``[d]``: what ``pve_loss`` calls its words.

    Args:
        embeddings: The generator's own, float ``[v, d]``.
        ids: Tokens of one text, int64 ``[t]``.
        kept: ``frequency_mask`` of them, bool ``[t]``.
    Raises:
        ShapeError: If ``kept`` does not belong to the ids.
        InputError: If no token is kept.
    """
    _require_shape("kept", kept, ids.shape, "give the mask of these ids")
    if not bool(kept.any()):
        raise InputError("kept must be True for one token or more, got none; leave out texts that are empty.")
    return embeddings[ids[kept]].float().mean(0)


@dataclass(frozen=True, eq=False)
class Pve:
    """How memory is drawn towards the words of its text as a whole (``pve_loss``).

    Attributes:
        importance: Of each of the generator's tokens, float ``[v]``.
        weight: Of this loss beside the others.
        mask: Which words are masked: ``none``, ``random`` or ``frequency``.
        rate: Share of the words that are masked.
        temperature: Of the contrast.
    """

    importance: Tensor
    weight: float = 1.0
    mask: MaskMode = "frequency"
    rate: float = 0.5
    temperature: float = 0.07

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None, counts: TokenCounts | None) -> Pve | None:
        """What a stage's ``[pve]`` asks for; None where it has none."""
        return None if settings is None or counts is None else cls(counts.importance, **settings)

    def kept(self, ids: Tensor, rng: random.Random) -> Tensor:
        """Which words of a text are not masked: int64 ``[t]`` -> bool ``[t]``."""
        source = torch.Generator().manual_seed(rng.getrandbits(62))
        return frequency_mask(ids, self.importance, rate=self.rate, mode=self.mask, generator=source)

    def loss(self, meanings: Sequence[Tensor], words: Sequence[Tensor]) -> Tensor:
        """The weighted loss of texts: what their latents mean, float ``[n, d]``, and their pooled words, ``[d]``."""
        pages = torch.stack([meaning.mean(0) for meaning in meanings])
        return self.weight * pve_loss(pages, torch.stack(list(words)), temperature=self.temperature)


def distillation_loss(logits: Tensor, taught: Tensor, told: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of KL(teacher || student), in nats and float32, times the temperature squared.

    The factor keeps gradients about as large at every temperature. None reach the teacher.

    Args:
        logits: The student's, float ``[b, t, v]``.
        taught: The teacher's for the same tokens, float ``[b, t, v]``.
        told: Which tokens count, bool ``[b, t]``.
        temperature: What both logits are divided by, above 0.
    Returns:
        A scalar; 0, with gradients of 0, where no token counts.
    Raises:
        ShapeError: If the shapes do not belong together.
        ConfigError: If the temperature is not above 0.
    Source: Hinton et al., arXiv:1503.02531, section 2.
    """
    _require_shape("taught", taught, logits.shape, "give the teacher's logits for the student's vocabulary and tokens")
    _require_shape("told", told, logits.shape[:-1], "give one truth value for each place of the logits")
    _require_above_zero("temperature", temperature)
    student = (logits[told].float() / temperature).log_softmax(-1)
    teacher = (taught[told].detach().float() / temperature).log_softmax(-1)
    apart = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return apart / told.sum().clamp(min=1) * temperature**2


def states_loss(states: Sequence[Tensor], goals: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """How far hidden states are from those that they should be, as a share of how much these differ among themselves.

    Of each layer the mean squared distance, divided by the variance of the goal, both where there is one; then the mean
    over layers, so that layers with large states do not drown the others. No gradients reach the goals.

    Args:
        states: The student's, one ``[b, t, d]`` float tensor a layer.
        goals: Of each layer, the states that there should be, float ``[b, t, d]``, and where, bool ``[b, t]``.
    Returns:
        A scalar, float32; about 1 where every state is the mean of all goals. A layer without a goal counts as 0.
    Raises:
        ShapeError: If there are no layers, or the shapes do not belong together.
    """
    if not states or len(states) != len(goals):
        raise ShapeError(f"goals must be one for each of 1 or more layers, got {len(goals)} for {len(states)} layers.")
    layers = []
    for own, (goal, told) in zip(states, goals, strict=True):
        _require_shape("goal", goal, own.shape, "give goals for the student's own positions and width")
        _require_shape("told", told, own.shape[:-1], "give one truth value for each position")
        wanted = goal[told].detach().float()
        distances = (own[told].float() - wanted).square()
        layers.append(distances.mean() / wanted.var() if len(wanted) else distances.sum())
    return torch.stack(layers).mean()


def sample_rate(rates: Mapping[float, float] | tuple[float, float], rng: random.Random) -> float:
    """The share of a memory's latents for one step of elastic training, so that every size is practised.

    Args:
        rates: Shares, each with its weight, or the lowest and the highest share, between which all are as likely.
        rng: Decides.
    Returns:
        A share in (0, 1].
    Raises:
        ConfigError: If a share is not in (0, 1], the lowest is above the highest, a weight is below 0 or all are 0.
    """
    if not isinstance(rates, Mapping) and len(rates) != 2:
        raise ConfigError(f"rates must be a table or 2 bounds, got {len(rates)} numbers; give the lowest and highest.")
    if wrong := [rate for rate in rates if not 0 < rate <= 1]:
        raise ConfigError(f"rates must be in (0, 1], got {wrong[0]}; give shares of a memory's latents.")
    if isinstance(rates, Mapping):
        weights = list(rates.values())
        if not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < float("inf"):
            raise ConfigError(f"weights of rates must be 0 or more, and one above 0, got {weights}; correct them.")
        return rng.choices(list(rates), weights)[0]
    low, high = rates
    if low > high:
        raise ConfigError(f"rates must be the lowest and the highest, got {low} and {high}; swap them.")
    return rng.uniform(low, high)


def _require_shape(name: str, tensor: Tensor, shape: Sequence[int], remedy: str) -> None:
    if tensor.shape != torch.Size(shape):
        raise ShapeError(f"{name} must be {list(shape)}, got {list(tensor.shape)}; {remedy}.")


def _require_above_zero(name: str, got: float) -> None:
    if not got > 0:
        raise ConfigError(f"{name} must be above 0, got {got}; raise it.")
