"""A recipe -> a trained checkpoint: build the parts, run the stages, export."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer

from vist_rag.compression import PassageCompressor
from vist_rag.compression.memory import PASSAGE_GAP
from vist_rag.compression.vision import VisionTower, tower_config
from vist_rag.config import RendererConfig
from vist_rag.errors import MissingDependencyError
from vist_rag.generation import VistGenerator, best_device
from vist_rag.generation.words import word_embeddings
from vist_rag.references import Reference, resolve
from vist_rag.rendering import Renderer
from vist_rag.training.answers import own_answers
from vist_rag.training.checkpoints import load_parts, load_trained
from vist_rag.training.corpus import QuestionCorpus, open_passages, open_questions
from vist_rag.training.corpus_files import Corpus
from vist_rag.training.counts import TokenCounts, count_tokens
from vist_rag.training.data import LengthBatches, Question
from vist_rag.training.examples import Example, ExampleMix, SequenceMix
from vist_rag.training.export import save_checkpoint
from vist_rag.training.lexical import LexicalAlignment, WordSalad, lexical_batch, piece_salience
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
from vist_rag.training.probe import STEPS, TEXTS, probe_checkpoint
from vist_rag.training.reading import MemoryReading, without_adapter
from vist_rag.training.recipe import READING, TASKS, check_recipe, trained_parts
from vist_rag.training.sequences import open_sequences
from vist_rag.training.tower import TowerReading, reading_batch
from vist_rag.training.trainer import processes, train_stage
from vist_rag.training.vocabulary import prune_vocabulary
from vist_rag.types import Passage

try:
    from accelerate import PartialState
except ImportError as error:
    raise MissingDependencyError("Training", "accelerate", "train") from error

_PIXELS_PER_CHARACTER = 5.1  # of the embedded atlas, over English text: an estimate for batching only
_SAMPLE = 12  # one text in so many is counted
_PATIENCE = timedelta(hours=12)  # of processes that wait while the first one counts words or answers questions

Judge = Callable[[PassageCompressor, VistGenerator, Path], Mapping[str, float]]


class RecipeRun:
    """One recipe on one machine: parts are built when a stage first needs them.

    Args:
        recipe: What ``load_recipe`` read.
        data: Folder that the recipe's file patterns are relative to.
        output: Where checkpoints, logs and the exported model go.
        skip_bad: Leave malformed rows out, and list them beside what was read, in ``output/data``.
        judge: Evaluates the parts as they are, into a folder: what ``[evaluation]`` asks for. None: no evaluation.
    """

    def __init__(
        self,
        recipe: Mapping[str, Any],
        data: Path,
        output: Path,
        *,
        skip_bad: bool = False,
        judge: Judge | None = None,
    ) -> None:
        check_recipe(recipe)
        self.recipe, self.data, self.output, self.skip_bad, self.judge = recipe, data, output, skip_bad, judge
        PartialState(cpu=best_device().type == "cpu", timeout=_PATIENCE)
        self.cache = output / "data"
        self.seed = int(recipe.get("seed", 0))
        if threads := recipe.get("threads"):
            torch.set_num_threads(int(threads))
        torch.set_flush_denormal(True)
        torch.manual_seed(self.seed)
        output.mkdir(parents=True, exist_ok=True)
        self._texts: Corpus[Any] | None = None
        self._known: set[str] = set()
        self._goes_first = False

    def run(self) -> Path:
        """Run every stage that is not finished, and export; returns the checkpoint directory."""
        before: Path | None = None
        for stage in self.recipe["stages"]:
            directory = self.output / stage["name"]
            if not (directory / "final" / "model.safetensors").is_file():
                self._stages()[stage["kind"]](stage, directory, before)
            before = directory / "final"
        model = self.output / "model"
        compressor, generator = self.parts()  # in every process, as they wait for each other
        trained = load_parts(MemoryReading(compressor, generator), directory / "final")
        if PartialState().is_main_process:
            self.export(compressor, generator, trained, model)
            self.probe(model)
        PartialState().wait_for_everyone()
        return model

    def export(self, compressor: PassageCompressor, generator: VistGenerator, trained: set[str], model: Path) -> Path:
        """Write the checkpoint: what was trained, and references to pretrained parts that were not."""
        tower, base = self.recipe.get("tower", {}), self.recipe.get("generator", {})
        references: dict[str, Reference] = {}
        if "pretrained" in tower and not any(name.startswith("compressor.tower.") for name in trained):
            references["tower"] = Reference.of(tower["pretrained"], tower.get("revision"))
        if "pretrained" in base and not any(name.startswith("lm.") and "lora_" not in name for name in trained):
            references["generator_base"] = Reference.of(base["pretrained"], base.get("revision"))
        settings = self.recipe.get("settings", {})
        return save_checkpoint(model, compressor, generator, settings=settings, int8="base" in base, **references)

    def probe(self, model: Path) -> None:
        """Measure what the exported compressor misreads, and keep it beside it, unless ``[probe]`` says not to."""
        settings = self.recipe.get("probe", {})
        if not settings.get("measure", True):
            return
        count, steps = settings.get("texts", TEXTS), settings.get("steps", STEPS)
        rows: Corpus[Any] = self.texts() if self.recipe["data"].get("text") else self.questions()
        texts = [rows[int(i)].content for i in rows.order(self.seed)[:count]]
        probe_checkpoint(model, texts, count=count, steps=steps, seed=self.seed).save(model / "compressor")

    def parts(self) -> tuple[PassageCompressor, VistGenerator]:
        """A compressor and a generator with fresh weights, but for what is pretrained."""
        torch.manual_seed(self.seed)
        compressor = build_compressor(self.recipe)
        if "pretrained" in self.recipe["generator"]:
            return compressor, pretrained_generator(self.recipe, compressor.resampler_config)
        return compressor, sentence_generator(self.recipe, compressor.resampler_config, *self.tokenizer())

    def tokenizer(self) -> tuple[Tokenizer, list[int]]:
        """The pruned vocabulary of a generator made from a sentence encoder, counted once and kept."""
        vocabulary, ids = self.output / "tokenizer.json", self.output / "old_ids.json"
        with self._first_process_first():
            if not (vocabulary.is_file() and ids.is_file()):
                base = base_model(self.recipe["generator"]["base"])
                full = plain(Tokenizer.from_file(str(base / "tokenizer.json")))
                sample = self._sample()
                chunks = (sample[i : i + 1000] for i in range(0, len(sample), 1000))
                pruned, old_ids = prune_vocabulary(full, chunks, self.recipe["generator"]["vocabulary"])
                ids.write_text(json.dumps(old_ids))
                pruned.save(str(vocabulary))
        return plain(Tokenizer.from_file(str(vocabulary))), json.loads(ids.read_text())

    def texts(self) -> Corpus[Any]:
        """All plain text, on disk: passages, or sequences where the recipe asks for these."""
        settings = self.recipe["data"]
        with self._first_process_first():
            if self._texts is None and "sequence" in settings:
                shown, told = settings["sequence"]
                tokenizer: Any = AutoTokenizer.from_pretrained(str(self.generator_directory()))
                self._texts = open_sequences(
                    self.data, settings["text"], self.cache, tokenizer, shown=shown, told=told, skip_bad=self.skip_bad
                )
            elif self._texts is None:
                self._texts = open_passages(
                    self.data,
                    settings["text"],
                    self.cache,
                    skip_bad=self.skip_bad,
                    characters=tuple(settings.get("characters", (30, 1200))),
                )
        return self._texts

    def generator_directory(self) -> Path:
        """Where config and tokenizer of the pretrained generator are."""
        settings = self.recipe["generator"]
        return resolve(settings["pretrained"], settings.get("revision"), weights=False)

    def questions(self) -> QuestionCorpus:
        """All questions with their passages, on disk."""
        with self._first_process_first():
            return open_questions(self.data, self.recipe["data"]["questions"], self.cache, skip_bad=self.skip_bad)

    def token_counts(self, generator: VistGenerator) -> TokenCounts:
        """How often each token of the generator comes in the texts, counted once and kept."""
        texts, path = self.texts(), self.cache / "token_counts.safetensors"
        with self._first_process_first():
            return count_tokens((p.content for p in texts), generator.tokenizer, path=path, key=texts.key)

    @contextmanager
    def _first_process_first(self) -> Iterator[None]:
        """What is kept on disk is made by the first process, and found there by the others, who wait for it."""
        if self._goes_first:  # within another such block
            yield
            return
        with PartialState().main_process_first():
            self._goes_first = True
            try:
                yield
            finally:
                self._goes_first = False

    def _sample(self) -> list[str]:
        """One text in so many."""
        texts = self.texts()
        return [texts[int(i)].content for i in texts.order(self.seed)[::_SAMPLE]]

    def _tower_stage(self, stage: Mapping[str, Any], directory: Path, before: Path | None) -> None:
        tower = VisionTower.from_config(tower_config(dict(self.recipe["tower"])))
        tokenizer, old_ids = self.tokenizer()
        base = base_model(self.recipe["generator"]["base"])
        words = load_file(str(base / "model.safetensors"))["embeddings.word_embeddings.weight"]
        model = TowerReading(tower, words[torch.tensor(old_ids)], fresh=True)
        if before is not None:
            self._known = load_trained(model, before / "model.safetensors")
        renderer = Renderer(atlas(self.recipe), RendererConfig(channels=self.recipe["tower"]["num_channels"]))
        batches = self.text_batches(stage)
        texts = self.texts()

        def build(number: int) -> dict[str, Any]:
            return reading_batch([texts[i].content for i in batches[number]], renderer, tokenizer)

        self._train(model, stage, build, directory)

    def _lexical_stage(self, stage: Mapping[str, Any], directory: Path, before: Path | None) -> None:
        compressor, generator = self.parts()
        words = word_embeddings(generator.model).float()
        heads = None
        if stage.get("reading"):
            heads = TowerReading(cast(VisionTower, compressor.tower), words.detach().float())
        parts = MemoryReading(compressor, generator)
        if before is not None:
            self._known = load_parts(parts, before)
        train_only(parts, trained_parts(stage), generator_runs=False)
        tokenizer = plain(Tokenizer.from_str(generator.tokenizer.backend_tokenizer.to_str()))
        salience = None
        if compressor.resampler_config.salience:
            salience = piece_salience(tokenizer, self._sample())
        counts = self.token_counts(generator) if "pve" in stage else None
        model = LexicalAlignment(
            compressor, generator.fusion, words, heads, salience, pve=Pve.of(stage.get("pve"), counts)
        )
        model.train()
        texts, batches = self.texts(), self.text_batches(stage)
        salad = WordSalad(self._sample(), tokenizer) if stage.get("salad") else None

        def build(number: int) -> dict[str, Any]:
            rng = random.Random(f"{self.seed}-{stage['name']}-{number}")
            batch = texts_shown(stage, [texts[i].content for i in batches[number]], salad, rng)
            return lexical_batch(
                batch,
                compressor,
                tokenizer,
                reading=heads is not None,
                spelling=generator.fusion.config.spelling,
                pve=model.pve,
                rng=rng,
            )

        self._train(model, stage, build, directory, result=parts)

    def examples(
        self, stage: Mapping[str, Any], answers: Callable[[], Sequence[Question]]
    ) -> Callable[[random.Random], list[Example]]:
        """What a reading stage practises; ``answers`` gives the generator's own, where the stage asks for them."""
        if stage["kind"] == "lm":
            return SequenceMix(self.texts(), stage["batch"])
        tasks = stage.get("tasks", TASKS[stage["kind"]])
        texts: Sequence[Passage] = self.texts() if set(tasks) != {"answer"} or stage.get("distractors") else ()
        rows: Any = ()
        if "answer" in tasks:
            rows = answers() if stage.get("answers") else self.questions()
        return ExampleMix({**stage, "tasks": tasks}, texts, rows, getattr(rows, "weights", None))

    def text_batches(self, stage: Mapping[str, Any]) -> LengthBatches:
        """All plain text, in batches of ``stage["patches"]`` patches."""
        lengths = self.texts().lengths
        patches = [min(256, int(length * _PIXELS_PER_CHARACTER / 14) + 1) for length in lengths]
        return LengthBatches(patches, budget=stage["patches"], steps=self.batches(stage), seed=self.seed)

    def batches(self, stage: Mapping[str, Any]) -> int:
        """Batches that a stage takes, over all processes."""
        trainer = {**self.recipe.get("trainer", {}), **stage.get("trainer", {})}
        return int(stage["steps"]) * int(trainer.get("gradient_accumulation_steps", 1)) * processes()

    def _stages(self) -> dict[str, Callable[[Mapping[str, Any], Path, Path | None], None]]:
        return {
            "tower": self._tower_stage,
            "lexical": self._lexical_stage,
            **dict.fromkeys(READING, self._reading_stage),
        }

    def _reading_stage(self, stage: Mapping[str, Any], directory: Path, before: Path | None) -> None:
        compressor, generator = self.parts()
        counts = self.token_counts(generator) if "pve" in stage else None
        model = reading_model(stage, compressor, generator, Pve.of(stage.get("pve"), counts))
        if before is not None:
            self._known = load_parts(model, before)
        train_only(model, trained_parts(stage))
        if model.distil or model.states:
            model.teach_itself(frozen=stage.get("teacher", "start") == "start")
        draw = self.examples(stage, lambda: self._own_answers(stage, generator))
        model.train()

        def build(number: int) -> dict[str, Any]:
            rng = random.Random(f"{self.seed}-{stage['name']}-{number}")
            return model.batch(draw(rng), rng)

        judge = None
        if self.judge is not None:

            def judge(step: int) -> Mapping[str, float]:
                folder = directory / "evaluation" / f"step-{step}"
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped, and of other weights
                was_training = model.training
                model.eval()
                try:
                    return cast(Judge, self.judge)(compressor, generator, folder)
                finally:
                    model.train(was_training)

        self._train(model, stage, build, directory, evaluate=judge)

    def _own_answers(self, stage: Mapping[str, Any], generator: VistGenerator) -> QuestionCorpus:
        """Questions with the answers that the generator itself gives when it reads the passage as text."""
        asked: Any = self.questions() if self.recipe["data"].get("questions") else self.texts()
        for part in (generator.model, generator.fusion):
            cast(nn.Module, part).to(PartialState().device)
        with self._first_process_first(), without_adapter(generator.model):
            return own_answers(
                generator,
                asked,
                self.cache / f"answers-{stage['name']}.jsonl",
                count=stage["answers"],
                seed=self.seed,
            )

    def _train(
        self,
        model: nn.Module,
        stage: Mapping[str, Any],
        build: Callable[[int], dict[str, Any]],
        directory: Path,
        **more: Any,
    ) -> None:
        settings = {
            key: stage[key]
            for key in ("learning_rate", "schedule", "warmup", "weight_decay", "pretrained_rate", "save_every")
            if key in stage
        }
        evaluation = self.recipe.get("evaluation", {})
        train_stage(
            model,
            int(stage["steps"]),
            build,
            directory,
            seed=self.seed,
            known=self._known,
            pretrained=".bert." if "base" in self.recipe.get("generator", {}) else ".lm.",
            evaluate_every=evaluation.get("every", 0) if more.get("evaluate") else 0,
            metric=evaluation.get("metric", "em"),
            trainer={**self.recipe.get("trainer", {}), **stage.get("trainer", {})},
            **settings,
            **more,
        )


def reading_model(
    stage: Mapping[str, Any], compressor: PassageCompressor, generator: VistGenerator, pve: Pve | None
) -> MemoryReading:
    """What a reading stage trains, with the losses that it weighs."""
    return MemoryReading(
        compressor,
        generator,
        rates={float(rate): float(weight) for rate, weight in stage.get("rates", {"1.0": 1.0}).items()},
        ideal=stage.get("ideal", 0.0),
        slips=stage.get("slips", 0.0),
        distil=stage.get("distil", 1.0 if stage["kind"] == "distill" else 0.0),
        states=stage.get("states", 0.0),
        pve=pve,
    )


def texts_shown(stage: Mapping[str, Any], batch: list[str], salad: WordSalad | None, rng: random.Random) -> list[str]:
    """The texts of a lexical batch, joined where the stage says so, some of them made of single words."""
    joined, share = stage.get("joined", 1), stage.get("salad", 0.0)
    if joined > 1:
        batch = [PASSAGE_GAP.join(batch[i : i + joined]) for i in range(0, len(batch), joined)]
    return [salad(len(text), rng) if salad and rng.random() < share else text for text in batch]
