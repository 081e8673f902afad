"""Table 1 of the paper beside our count, and the shapes of the models that it is about.

Source: "Vision-centric Token Compression in Large Language Model", arXiv:2502.00791, Table 1 (forward pass, one input).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PreTrainedConfig, RobertaConfig

from vist_rag.config import ResamplerConfig
from vist_rag.errors import ConfigError
from vist_rag.evaluation.costs import TOKENS_PER_PAGE, Costs, count_costs
from vist_rag.evaluation.meters import Part


def _tinyllama() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )


def _vit_l_14() -> PreTrainedConfig:
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )


def _roberta_large() -> PreTrainedConfig:
    return RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        max_position_embeddings=514,
        type_vocab_size=1,
    )


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "tinyllama-1.1b": _tinyllama,
    "vit-l-14": _vit_l_14,
    "roberta-large": _roberta_large,
}
"""Models whose sizes are known here, so that counting them needs no download."""

_HUB_IDS = {
    "TinyLlama/TinyLlama_v1.1": "tinyllama-1.1b",
    "openai/clip-vit-large-patch14": "vit-l-14",
    "FacebookAI/roberta-large": "roberta-large",
}


def shape(name: str, what: str = "model") -> PreTrainedConfig:
    """The config of a named shape, of a local directory, or of a hub id.

    Args:
        name: A key of ``SHAPES``, a directory with a ``config.json``, or a hub id (its config alone is downloaded).
        what: What it is for, for the error.
    Raises:
        ConfigError: If it is none of them.
    """
    known = _HUB_IDS.get(name, name)
    if known in SHAPES:
        return SHAPES[known]()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub, a torn file and an unknown architecture each raise a class of their own
        raise ConfigError(
            f"{what} must be one of {', '.join(SHAPES)}, a directory with a config.json, or a hub id, got {name!r} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); check the name."
        ) from error
    return config


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One row of the paper's Table 1.

    Attributes:
        method: ``TinyLlama``, ``VIST`` or ``CEPE*``.
        encoded_tokens: ``T_e``.
        text_tokens: ``T_d``.
        tflops: TFLOPs of the forward pass.
        gigabytes: Memory.
    """

    method: str
    encoded_tokens: int
    text_tokens: int
    tflops: float
    gigabytes: float


TABLE_1 = (
    PaperRow("TinyLlama", 0, 4096, 8.47, 5.46),
    PaperRow("VIST", 2048, 2048, 7.72, 4.59),
    PaperRow("CEPE*", 2048, 2048, 8.26, 4.80),
    PaperRow("VIST", 6144, 2048, 11.65, 4.94),
    PaperRow("CEPE*", 6144, 2048, 13.27, 7.74),
    PaperRow("VIST", 14336, 2048, 19.52, 6.75),
    PaperRow("CEPE*", 14336, 2048, 23.30, 13.59),
)

RESAMPLER = ResamplerConfig(latents_per_page=64, width=1024, layers=1, heads=16)
"""As wide as the tower. The paper does not say how many layers; one is what its figures have room for."""

_SCORES, _ATTENTION = ("score_flops",), ("score_flops", "attention_linear_flops")
_LEFT_OUT: dict[str, dict[str, tuple[str, ...]]] = {
    "TinyLlama": {"llm": _SCORES},
    "VIST": {"tower": _ATTENTION, "resampler": _ATTENTION},
    "CEPE*": {},
}

REASONS = {
    "TinyLlama": (
        "The paper's figure is that of the linear layers alone, head included: two operations a weight and token. "
        "Attention scores, which its other rows hold, are left out of this one."
    ),
    "VIST": (
        "The paper's three figures rise by 140 GFLOPs an image, less than the tower alone takes (162). They fit if "
        "attention inside the tower and the resampler is left out: a counter that looks at linear layers does not see "
        "the packed projections and the scores of torch.nn.MultiheadAttention, which OpenCLIP uses."
    ),
    "CEPE*": (
        "The same parts, all of them whole: text encoder, cross-attention with as many key as query heads, TinyLlama "
        "with its scores. About 40 MFLOPs of each encoded token stay unexplained."
    ),
}
"""Why a count differs from the paper's. What the paper's counter left out is an inference from its figures."""

MEMORY_REASON = (
    "Ours is fp16 weights, keys and values, and the peak of what one part holds, with attention scores kept and logits "
    "of every position. The paper does not say what its gigabytes hold, nor how it attends, so they need not agree."
)


def compare_with_paper(advance: Callable[[int], None] = lambda _: None) -> list[dict[str, Any]]:
    """Each row of Table 1 beside our count of the same input.

    ``ours`` is complete. ``reconciled`` leaves out what we infer that the paper's counter did not see (``left_out``).

    Args:
        advance: Called with 1 after each row.
    Returns:
        A row each: TFLOPs and gigabytes of the paper and ours, differences in per cent, what was left out, and why.
    """
    return list(_compared(advance))


def _compared(advance: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    for row in TABLE_1:
        costs = _count(row)
        left_out = {
            f"{name}.{field}": getattr(part, field)
            for name, fields in _LEFT_OUT[row.method].items()
            if (part := costs.part(name)) is not None
            for field in fields
        }
        reconciled = costs.flops - sum(left_out.values())
        advance(1)
        yield {
            "method": row.method,
            "encoded_tokens": row.encoded_tokens,
            "text_tokens": row.text_tokens,
            "paper_tflops": row.tflops,
            "ours_tflops": round(costs.flops / 1e12, 3),
            "ours_percent": _percent(costs.flops / 1e12, row.tflops),
            "reconciled_tflops": round(reconciled / 1e12, 3),
            "reconciled_percent": _percent(reconciled / 1e12, row.tflops),
            "left_out_tflops": {name: round(n / 1e12, 4) for name, n in left_out.items()},
            "parts_tflops": {part.name: round(part.flops / 1e12, 4) for part in costs.parts},
            "split_tflops": {part.name: _split(part) for part in costs.parts if part.flops},
            "reason": REASONS[row.method],
            "paper_gb": row.gigabytes,
            "ours_gb": round(costs.total_bytes / 1e9, 2),
            "ours_gb_percent": _percent(costs.total_bytes / 1e9, row.gigabytes),
            "ours_gib": round(costs.total_bytes / 2**30, 2),
            "ours_gib_percent": _percent(costs.total_bytes / 2**30, row.gigabytes),
            "weights_gb": round(costs.weight_bytes / 1e9, 2),
            "kv_gb": round(costs.kv_bytes / 1e9, 2),
            "activations_gb": round(costs.activation_bytes / 1e9, 2),
            "peak_part": max(costs.parts, key=lambda part: part.activation_bytes).name,
        }


def _count(row: PaperRow) -> Costs:
    encoders = {"VIST": _vit_l_14, "CEPE*": _roberta_large}
    return count_costs(
        encoders[row.method]() if row.encoded_tokens else None,
        _tinyllama(),
        encoded_tokens=row.encoded_tokens,
        text_tokens=row.text_tokens,
        resampler=RESAMPLER,
        fusion="cross_attention",
        attention="eager",
        all_logits=True,
    )


def _split(part: Part) -> dict[str, float]:
    """TFLOPs of a part: of attention's linear layers, of its scores and what these weigh, and of all else."""
    kinds = {"projections": part.attention_linear_flops, "scores": part.score_flops}
    kinds["other"] = part.flops - sum(kinds.values())
    return {name: round(n / 1e12, 6) for name, n in kinds.items()}


def slopes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What one more image of VIST takes, and one more token of CEPE*, between the shortest and the longest row.

    Args:
        rows: Of :func:`compare_with_paper`.
    Returns:
        A slope for each method, in GFLOPs: ``paper`` and how much its rounding may hide (``paper_error``); ``ours`` by
        part and kind; ``left_out`` names those that, as we infer, the paper's counter did not see. Then ``paper_base``
        and ``ours_base``: what is left where nothing is encoded.
    """
    found = []
    for method, unit, per_token in (("VIST", "image", 1 / TOKENS_PER_PAGE), ("CEPE*", "token", Fraction(1))):
        short, *_, long = [row for row in rows if row["method"] == method]
        units = [float(row["encoded_tokens"] * per_token) for row in (short, long)]
        more = units[1] - units[0]

        def slope(low: float, high: float, more: float = more) -> float:
            return 1000 * (high - low) / more

        ours = {
            f"{part}.{kind}": slope(tflops, long["split_tflops"][part][kind])
            for part, kinds in short["split_tflops"].items()
            for kind, tflops in kinds.items()
        }
        seen = {name: gflops for name, gflops in ours.items() if abs(gflops) > 1e-6}
        paper = slope(short["paper_tflops"], long["paper_tflops"])
        left_out = [
            f"{part}.{'scores' if field == 'score_flops' else 'projections'}"
            for part, fields in _LEFT_OUT[method].items()
            for field in fields
        ]
        found.append(
            {
                "method": method,
                "unit": unit,
                "paper": round(paper, 3),
                "paper_error": round(10 / more, 3),  # two figures, each right to 0.005 TFLOPs
                "ours": {name: round(gflops, 3) for name, gflops in seen.items()},
                "left_out": left_out,
                "paper_base": round(1000 * short["paper_tflops"] - units[0] * paper, 1),
                "ours_base": round(1000 * short["ours_tflops"] - units[0] * sum(seen.values()), 1),
            }
        )
    return found


def _percent(ours: float, paper: float) -> float:
    return round(100 * (ours / paper - 1), 2)
