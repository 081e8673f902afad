"""Language modelling: perplexity of the end of a long text, whose beginning is read as passages."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from vist_rag.errors import ConfigError, InputError
from vist_rag.evaluation.datasets import load_texts
from vist_rag.evaluation.methods import Asked, EvalModel
from vist_rag.evaluation.task import PLAIN, Reading, sample
from vist_rag.generation import Prompt
from vist_rag.types import Passage


class LanguageModelling:
    """How well the end of a long text is foretold from what came before.

    Settings of a block: ``texts`` (patterns), ``encoded_tokens`` (read as passages, T_e), ``text_tokens`` (read as
    text, T_d, the scored ones included), ``scored`` (last tokens, 256), ``passage_tokens``, ``limit``.
    """

    metrics: tuple[str, ...] = ("perplexity",)

    def __init__(self, block: Mapping[str, Any], model: EvalModel, reading: Reading) -> None:
        self.asked: list[Asked] = []
        self._targets: dict[str, str] = {}
        self._lengths: dict[str, int] = {}
        encoded, text, scored = (
            int(block.get(name, default))
            for name, default in (("encoded_tokens", 2048), ("text_tokens", 2048), ("scored", 256))
        )
        if encoded < 1 or scored < 1 or text <= scored:
            raise ConfigError(
                "encoded_tokens and scored must be 1 or more, and text_tokens more than scored, got "
                f"{encoded}, {scored}, {text}."
            )
        size = int(block.get("passage_tokens", 128))
        windows = []
        for content in load_texts(block["texts"], **reading.options):
            tokenizer = model.generator.tokenizer
            ends = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets = ends.offset_mapping
            for begin in range(0, len(offsets) - encoded - text + 1, encoded + text):
                cuts = [
                    *range(begin, begin + encoded, size),
                    begin + encoded,
                    begin + encoded + text - scored,
                    begin + encoded + text,
                ]
                places = [*(offsets[c][0] for c in cuts[:-1]), offsets[cuts[-1] - 1][1]]
                windows.append([content[a:b] for a, b in pairwise(places)])
        if not windows:
            raise InputError(
                f"texts must hold one of {encoded + text} tokens (encoded_tokens + text_tokens) or more, got none; "
                "lower them or give longer texts."
            )
        for number, parts in enumerate(sample(windows, block.get("limit"), int(block.get("seed", 0)))):
            *passages, shown, target = parts
            # The nearest passage is the best one: what a small budget drops is the farthest.
            self.asked.append(Asked(f"{number:05}", shown, tuple(map(Passage, reversed(passages)))))
            self._targets[f"{number:05}"] = target
            # Cut out of its text, the end may take a token more than it did there.
            self._lengths[f"{number:05}"] = model.generator.count_tokens(target)
        self.facts: dict[str, Any] = {"encoded_tokens": encoded, "text_tokens": text, "scored": scored}
        self.facts["lower_is_better"] = ["perplexity"]

    def adapt(self, model: EvalModel) -> EvalModel:
        """Plain text: no template of a chat."""
        generator = copy.copy(model.generator)
        begin = generator.tokenizer.bos_token_id
        generator.frame = ([] if begin is None else [begin], [])
        return replace(model, template=PLAIN, generator=generator)

    def answer_tokens(self, asked: Asked) -> int:
        """The scored ones."""
        return self._lengths[asked.id]

    def judge(self, model: EvalModel, asked: Sequence[Asked], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """How likely the end is."""
        rows = []
        for one, prompt in zip(asked, prompts, strict=True):
            scores = model.generator.score(prompt, [model.generator.tokenize(self._targets[one.id])])[0]
            rows.append({"nll": -float(scores.sum()), "scored_tokens": len(scores)})
        return rows

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Perplexity: the exponential of the mean loss of a token, over all texts together."""
        nll = np.array([row["nll"] for row in rows])
        tokens = np.array([row["scored_tokens"] for row in rows])
        drawn = np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
        low, high = np.percentile(nll[drawn].sum(1) / tokens[drawn].sum(1), [2.5, 97.5])
        return {
            "perplexity": round(math.exp(nll.sum() / tokens.sum()), 3),
            "perplexity_95": [round(math.exp(low), 3), round(math.exp(high), 3)],
        }

    def value(self, row: Mapping[str, Any]) -> float:
        """Loss of a token."""
        return float(row["nll"] / row["scored_tokens"])
