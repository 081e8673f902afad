"""How long an answer takes, stage by stage, on this machine: nothing is estimated, everything is run and timed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from vist_rag.compression import PassageCompressor, VisualMemory
from vist_rag.errors import ConfigError, InputError
from vist_rag.generation import Prompt, PromptTemplate, VistGenerator
from vist_rag.types import Passage

STAGES = ("render", "tower", "resampler", "fusion", "prefill", "decode")
FIRST_TOKEN = ("raw", "memory_made_now", "memory_ready")
FORMAT = "vist-rag-latency/1"
WARM_UP = 2
"""Runs before the first that counts: allocators, kernels and the glyph atlas are warm then."""

_QUESTION = "Which month does the keeper write down in red ink?"
_SENTENCES = (
    "The lighthouse on the northern cape was lit for the first time in the spring of a year that nobody wrote down.",
    "Its keeper counted the ships that passed, and at the end of each month she added them up in a green ledger.",
    "In winter the road to the harbour was closed, so that flour, lamp oil and letters came by boat or not at all.",
    "A baker from the village learned to read the signals, and she told the fishermen when the wind would turn.",
    "Two of the older boats were painted blue, because that was the only colour that the chandler still had in store.",
    "When the lens was cleaned, somebody had to hold the ladder, and that was usually the youngest of the family.",
    "The ledger shows that most ships passed in September, which is the one month that the keeper writes in red ink.",
    "Later the lamp was replaced by an electric one, and the road was widened, and the ledger went to a museum.",
)


def sample_passages(k: int, words: int) -> list[Passage]:
    """``k`` passages of ``words`` words, always the same ones, written for this purpose.

    Raises:
        ConfigError: If either is less than 1.
    """
    for name, got in (("k", k), ("words", words)):
        if got < 1:
            raise ConfigError(f"{name} must be 1 or more, got {got}.")
    told = " ".join(_SENTENCES).split()
    passages = []
    for i in range(k):
        start = i * len(told) // k  # each begins elsewhere, so that no two are the same
        text = " ".join(told[(start + j) % len(told)] for j in range(words))
        passages.append(Passage(text, id=f"sample-{i}"))
    return passages


def measure_latency(
    compressor: PassageCompressor,
    generator: VistGenerator,
    template: PromptTemplate | None = None,
    *,
    passages: Sequence[Passage],
    k: int | None = None,
    repeats: int = 20,
    decoded_tokens: int = 4,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Time each stage, and the time to the first token, for one question about some passages.

    Time to first token is that of the library's own ``generate``, from passages as text (``raw``), from passages that
    are rendered and encoded first (``memory_made_now``), and from memories that were kept (``memory_ready``).

    Args:
        compressor: Makes the memories.
        generator: Reads them.
        template: The prompt.
        passages: What is read.
        k: The first so many of them; None means all.
        repeats: Timed runs of each; the median and the quartiles are given.
        decoded_tokens: Tokens over which the time of one decoded token is averaged, in each run.
        advance: Called with 1 after each run, the ``WARM_UP`` ones included.
    Returns:
        ``stages_ms`` and ``first_token_ms``: name to median, 25 % and 75 % quantile, None where raw text does not fit;
        ``throughput_tokens_per_s``: tokens of the passages as text and of the rest of the prompt, over the time to the
        first token; token counts; ``peak_memory``.
    Raises:
        ConfigError: If ``k`` or ``repeats`` is out of range.
        InputError: If the prompt with memories does not fit the generator's context.
    """
    k = len(passages) if k is None else k
    if not 1 <= k <= len(passages):
        raise ConfigError(f"k must be in 1..{len(passages)} (passages given), got {k}.")
    for name, got in (("repeats", repeats), ("decoded_tokens", decoded_tokens)):
        if got < 1:
            raise ConfigError(f"{name} must be 1 or more, got {got}.")
    read = list(passages[:k])
    runs = _Runs(compressor, generator, template or PromptTemplate(), read, decoded_tokens)
    if generator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(generator.device)
    for turn in range(WARM_UP + repeats):
        runs.once(keep=turn >= WARM_UP)
        advance(1)
    first = {name: _quantiles(runs.times[name]) if name in runs.times else None for name in FIRST_TOKEN}
    tokens = runs.origin_tokens + runs.text_tokens
    return {
        "passages": k,
        "repeats": repeats,
        "device": str(generator.device),
        "dtype": str(generator.model.dtype).removeprefix("torch."),
        "pages": runs.pages,
        "latents": sum(len(memory) for memory in runs.memories),
        "origin_tokens": runs.origin_tokens,
        "text_tokens": runs.text_tokens,
        "prompt_tokens": {"raw": runs.raw_tokens, "memory": runs.memory_tokens},
        "stages_ms": {name: _quantiles(runs.times[name]) for name in STAGES},
        "first_token_ms": first,
        "throughput_tokens_per_s": {
            name: None if value is None else round(1000 * tokens / value["median"], 1) for name, value in first.items()
        },
        "peak_memory": peak_memory(generator.device),
    }


def points_of(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Time to the first token against the number of passages, as ``vist-rag report`` draws it."""
    return [
        {
            "method": method,
            "k": report["passages"],
            "ttft_ms": took["median"],
            "ttft_ms_quartiles": [took["q25"], took["q75"]],
        }
        for report in reports
        for method, took in report["first_token_ms"].items()
        if took is not None
    ]


class _Runs:
    """The stages of one question, and the milliseconds that they took."""

    def __init__(
        self,
        compressor: PassageCompressor,
        generator: VistGenerator,
        template: PromptTemplate,
        passages: Sequence[Passage],
        decoded_tokens: int,
    ) -> None:
        self.times: dict[str, list[float]] = {}
        self.compressor, self.generator, self.template = compressor.eval(), generator, template
        self.texts = [p.content for p in passages]
        self.pages = len(compressor.renderer.render(self.texts))
        self.memories: list[VisualMemory] = compressor.encode(self.texts)
        self.raw_prompt = template.build(_QUESTION, passages, [])
        self.memory_prompt = template.build(_QUESTION, [], self.memories)
        self.raw_tokens = generator.prompt_length(self.raw_prompt)
        self.memory_tokens = generator.prompt_length(self.memory_prompt)
        self.origin_tokens = sum(generator.count_tokens(template.raw_text(p)) for p in passages)
        self.text_tokens = generator.prompt_length(template.build(_QUESTION, [], []))
        limit = generator.context_tokens or sys.maxsize
        if self.memory_tokens >= limit:
            raise InputError(
                f"the prompt with memories must fit {limit - 1} positions (the generator's context less one), got "
                f"{self.memory_tokens}; lower k or the length of the passages."
            )
        self.raw_fits = self.raw_tokens < limit
        self.decoded_tokens = min(decoded_tokens, limit - self.memory_tokens)

    @torch.no_grad()
    def once(self, *, keep: bool) -> None:
        """Every stage once, then each way to the first token."""
        took = self._stages()
        if self.raw_fits:
            took["raw"] = self._took(lambda: self._first_token(self.raw_prompt))[1]
        took["memory_made_now"] = self._took(
            lambda: self._first_token(self.template.build(_QUESTION, [], self.compressor.encode(self.texts)))
        )[1]
        took["memory_ready"] = self._took(lambda: self._first_token(self.memory_prompt))[1]
        if keep:
            for name, ms in took.items():
                self.times.setdefault(name, []).append(ms)

    def _stages(self) -> dict[str, float]:
        compressor, generator, took = self.compressor, self.generator, {}
        pages, took["render"] = self._took(lambda: compressor.renderer.render(self.texts))
        mask = pages.patch_mask
        features, took["tower"] = self._took(lambda: compressor.features(pages.pixel_values, mask))
        _, took["resampler"] = self._took(lambda: compressor.resampler(features, mask[:, : features.shape[1]]))
        inputs, took["fusion"] = self._took(self._condition)
        output, took["prefill"] = self._took(lambda: generator.model(**inputs, use_cache=True, logits_to_keep=1))
        _, ms = self._took(lambda: self._decode(output, inputs["attention_mask"]))
        took["decode"] = ms / self.decoded_tokens
        return took

    def _condition(self) -> dict[str, Any]:
        with self.generator.fusion.condition(self.generator, [self.memory_prompt]) as inputs:
            return inputs

    def _decode(self, output: Any, mask: Tensor) -> None:
        for _ in range(self.decoded_tokens):
            mask = F.pad(mask, (0, 1), value=1)
            token = output.logits[:, -1:].argmax(-1)
            cache = output.past_key_values
            output = self.generator.model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)

    def _first_token(self, prompt: Prompt) -> None:
        self.generator.prefixes.clear()  # a question of its own, not the follow-up of the last run
        self.generator.generate([prompt], max_new_tokens=1)

    def _took(self, function: Callable[[], Any]) -> tuple[Any, float]:
        """What a function returned, and its milliseconds, up to the end of what it started on a GPU."""
        self._synchronize()
        begin = time.perf_counter()
        result = function()
        self._synchronize()
        return result, 1000 * (time.perf_counter() - begin)

    def _synchronize(self) -> None:
        if self.generator.device.type == "cuda":
            torch.cuda.synchronize(self.generator.device)
        elif self.generator.device.type == "mps":
            torch.mps.synchronize()


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The most memory so far: what tensors took of a CUDA device, elsewhere what the whole process took."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "tensors on the device"}
    try:
        import resource
    except ImportError:  # Windows
        return {"bytes": None, "of": "not known on this system"}
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return {"bytes": size * unit, "of": "the whole process since it began, Python and its libraries included"}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    low, median, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": round(median, 4), "q25": round(low, 4), "q75": round(high, 4)}
