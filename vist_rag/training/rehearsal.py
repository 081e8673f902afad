"""The stages of a recipe without their weights: what each trains, and the batches that it would take.

As in ``vist_rag.training.run``, but for what cannot be known before training: weights of earlier stages, counts of all
words, and answers that the generator has yet to write.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from vist_rag.compression import PassageCompressor
from vist_rag.compression.vision import VisionTower, tower_config
from vist_rag.config import RendererConfig
from vist_rag.generation import PromptTemplate, VistGenerator
from vist_rag.rendering import Renderer
from vist_rag.training.answers import ASK
from vist_rag.training.data import Question
from vist_rag.training.flops import Flops, answer_flops
from vist_rag.training.lexical import LexicalAlignment, WordSalad, lexical_batch
from vist_rag.training.objectives import Pve
from vist_rag.training.parts import (
    atlas,
    base_model,
    build_compressor,
    plain,
    pretrained_generator,
    sentence_generator,
    train_only,
)
from vist_rag.training.reading import MemoryReading
from vist_rag.training.recipe import trained_parts
from vist_rag.training.run import RecipeRun, reading_model, texts_shown
from vist_rag.training.tower import TowerReading, reading_batch
from vist_rag.types import Passage

_SALAD_TEXTS = 2000  # whose words are mixed
_ASKED = 64  # passages that own answers are taken to be of
_ANSWER_TOKENS = 48  # of a question, and of an answer: as many as ``own_answers`` allows
_QUESTION_WORDS, _ANSWER_WORDS = 12, 16  # of those that stand in their place


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """A stage that can be looked at.

    Attributes:
        model: What is trained; its parameters say which of them are. Pretrained parts have no values.
        build: Number of a batch -> what the model takes, and how many examples it is made of: the batches of training.
        before: FLOPs of what runs before the stage, by name.
    """

    model: nn.Module
    build: Callable[[int], tuple[Mapping[str, Any], int]]
    before: Mapping[str, Flops] = field(default_factory=dict)


def rehearse(run: RecipeRun, stage: Mapping[str, Any]) -> Rehearsed:
    """A stage of a run, without its weights.

    Raises:
        VistError: As training would.
    """
    kinds = {"tower": _tower_stage, "lexical": _lexical_stage}
    return kinds.get(stage["kind"], _reading_stage)(run, stage)


def _parts(run: RecipeRun) -> tuple[PassageCompressor, VistGenerator]:
    """Compressor and generator of a run; what is pretrained has no values."""
    recipe = run.recipe
    if "start" in recipe:
        return run.parts()
    compressor = build_compressor(recipe, meta=True)
    if "pretrained" in recipe["generator"]:
        return compressor, pretrained_generator(recipe, compressor.resampler_config, meta=True)
    return compressor, sentence_generator(recipe, compressor.resampler_config, *run.tokenizer())


def _tower_stage(run: RecipeRun, stage: Mapping[str, Any]) -> Rehearsed:
    tokenizer, old_ids = run.tokenizer()
    width = json.loads((base_model(run.recipe["generator"]["base"]) / "config.json").read_text())["hidden_size"]
    with torch.device("meta"):
        tower = VisionTower.from_config(tower_config(dict(run.recipe["tower"])))
        model = TowerReading(tower, torch.empty(len(old_ids), width))
    renderer = Renderer(atlas(run.recipe), RendererConfig(channels=run.recipe["tower"]["num_channels"]))
    texts, batches = run.texts(), run.text_batches(stage)

    def build(number: int) -> tuple[Mapping[str, Any], int]:
        batch = [texts[i].content for i in batches[number]]
        return reading_batch(batch, renderer, tokenizer), len(batch)

    return Rehearsed(model, build)


def _lexical_stage(run: RecipeRun, stage: Mapping[str, Any]) -> Rehearsed:
    compressor, generator = _parts(run)
    words = cast(Tensor, generator.model.get_input_embeddings().weight).detach().float()
    heads = None
    if stage.get("reading"):
        with torch.device("meta"):
            heads = TowerReading(cast(VisionTower, compressor.tower), torch.empty(words.shape))
    train_only(MemoryReading(compressor, generator), trained_parts(stage), generator_runs=False)
    model = LexicalAlignment(compressor, generator.fusion, words, heads, pve=_pve(stage, generator))
    tokenizer = plain(Tokenizer.from_str(generator.tokenizer.backend_tokenizer.to_str()))
    texts, batches = run.texts(), run.text_batches(stage)
    salad = None
    if stage.get("salad"):
        salad = WordSalad([texts[int(i)].content for i in texts.order(run.seed)[:_SALAD_TEXTS]], tokenizer)

    def build(number: int) -> tuple[Mapping[str, Any], int]:
        rng = random.Random(f"{run.seed}-{stage['name']}-{number}")
        batch = texts_shown(stage, [texts[i].content for i in batches[number]], salad, rng)
        shown = lexical_batch(batch, compressor, tokenizer, reading=heads is not None, pve=model.pve, rng=rng)
        return shown, len(batch)

    return Rehearsed(model, build)


def _reading_stage(run: RecipeRun, stage: Mapping[str, Any]) -> Rehearsed:
    compressor, generator = _parts(run)
    model = reading_model(stage, compressor, generator, _pve(stage, generator))
    train_only(model, trained_parts(stage))
    draw = run.examples(stage, lambda: _likely_answers(run))

    def build(number: int) -> tuple[Mapping[str, Any], int]:
        rng = random.Random(f"{run.seed}-{stage['name']}-{number}")
        batch = model.batch(draw(rng), rng)
        return batch, len(batch["targets"])

    own = stage.get("answers")
    return Rehearsed(model, build, {"answers": _answers(run, own, generator)} if own else {})


def _pve(stage: Mapping[str, Any], generator: VistGenerator) -> Pve | None:
    """As of the stage, without counts of words: how many are masked does not depend on them."""
    if "pve" not in stage:
        return None
    return Pve(torch.zeros(max(generator.tokenizer.get_vocab().values()) + 1), **stage["pve"])


# ---------------------------------------------------------------------------------------------------------- own answers


def _likely_answers(run: RecipeRun) -> Sequence[Question]:
    """Questions in the place of those that the generator has yet to write: as long as is likely, of the same texts."""
    if run.recipe["data"].get("questions"):
        return run.questions()
    texts = run.texts()
    likely = []
    for i in texts.order(run.seed)[:_ASKED]:
        passage = texts[int(i)]
        words = passage.text.split()
        question, answer = " ".join(words[-_QUESTION_WORDS:]), " ".join(words[:_ANSWER_WORDS])
        likely.append(Question(question, (answer,), passage.title, passage.text))
    return likely


def _answers(run: RecipeRun, count: int, generator: VistGenerator) -> Flops:
    """FLOPs of what the generator asks and answers before a stage, each as long as it may be."""
    template = PromptTemplate()
    labelled = bool(run.recipe["data"].get("questions"))
    asked: Any = run.questions() if labelled else run.texts()
    order = asked.order(run.seed)[:_ASKED]
    shown = [asked[int(i)] for i in order]
    passages = [Passage(one.context, title=one.title) if isinstance(one, Question) else one for one in shown]
    tokens = sum(generator.count_tokens(template.raw_text(passage)) for passage in passages) / len(passages)
    frame = sum(map(len, generator.frame)) + generator.count_tokens(ASK)
    once = answer_flops(generator.model, round(tokens) + frame, _ANSWER_TOKENS)
    return once.times(min(count, len(asked)) * (1 if labelled else 2))
